"""Imported by the scripts before torch, whose OpenMP (GNU's) reads this setting when it is loaded.

A thread that waits for others spins first: by default so long that a busy machine's other processes get nothing done, and nor do we.
10,000 turns cost about 4 % on an idle machine, and are twice as fast beside two busy processes. A user's own setting wins.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

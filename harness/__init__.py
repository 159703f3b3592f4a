"""Imported by the scripts before torch, whose OpenMP (GNU's) reads this setting when it is loaded.

A thread that waits for others spins first, by default so long that other busy processes cost most
of the speed. With 10,000 turns the demo was twice as fast beside two busy loops, and about 4 %
slower on an idle machine (two cores). A user's own setting wins.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

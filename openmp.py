"""Imported by the scripts before torch, whose OpenMP reads this setting when it is loaded.

Threads that wait for each other spin by default. Beside another busy process that costs most of the speed, so they sleep instead, unless
OMP_WAIT_POLICY is set.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

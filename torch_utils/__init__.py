"""Custom tensor ops with compiled implementations, and statistics of training.

Every entry point imports this package before torch, because it sets how OpenMP's threads wait for work. A
thread can wait in a loop ("spin") or sleep. Spinning threads take processor time from other processes, so
they spin only for a short time, unless the user has set OMP_WAIT_POLICY.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # With the policy "passive", GNU's OpenMP library, which torch uses, does not spin at all. This count
    # gives about 50 microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

"""Operations and statistics on tensors that are not specific to this project.

Every entry point imports this package before torch. It sets how OpenMP's threads wait for work: they spin
only briefly, unless the user set OMP_WAIT_POLICY. Beside other busy processes, spinning threads take
processor time from those that have work.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # For GNU's OpenMP library, which torch ships: spin for some 50 microseconds instead of not at all.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

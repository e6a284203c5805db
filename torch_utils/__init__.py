"""Operations and statistics on tensors that are not specific to this project.

Every entry point comes here before torch is loaded. OpenMP's threads spin only briefly while they wait for
work, unless the user set OMP_WAIT_POLICY: beside other busy processes spinning threads take the processor
from those that have work.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # GNU's library, which torch ships: some 50 microseconds, in place of none
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

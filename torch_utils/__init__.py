"""Operations and statistics on tensors that are not specific to this project.

Every entry point comes here before torch is loaded. OpenMP's threads wait for work without spinning, unless the user set OMP_WAIT_POLICY:
beside other busy processes spinning threads take the processor from those that have work.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

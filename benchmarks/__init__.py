"""Speed of the project against straightforward EG3D, in one process: `python -m benchmarks --help`."""

import torch_utils  # noqa: F401 (before torch: sets OMP_WAIT_POLICY)

"""Speed of the project against straightforward EG3D, in one process: `python -m benchmarks --help`."""

import torch_utils  # noqa: F401 (before torch: says how threads wait)

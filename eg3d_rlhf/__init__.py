"""The preference half: rewards on the density field, and fine-tuning with them."""

import torch_utils  # noqa: F401 (before torch: sets OMP_WAIT_POLICY)

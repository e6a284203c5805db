"""The preference half: rewards on the density field, and fine-tuning with them."""

import torch_utils  # noqa: F401 (before torch: says how threads wait)

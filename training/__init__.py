"""GAN training: networks, data, losses and the training loop. Rewards are in eg3d_rlhf."""

import torch_utils  # noqa: F401 (before torch: sets how OpenMP threads wait)

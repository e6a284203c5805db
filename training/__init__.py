"""The GAN half: networks, data, losses and the training loop; knows nothing of rewards."""

import torch_utils  # noqa: F401 (before torch: says how threads wait)

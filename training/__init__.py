"""The GAN half: networks, data, losses and the training loop; knows nothing of rewards."""

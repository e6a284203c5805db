"""Preference tuning of GANs: reward phase beside adversarial training, early stopping, preference rounds."""

"""The preference half: rewards on the density field, and fine-tuning with them."""

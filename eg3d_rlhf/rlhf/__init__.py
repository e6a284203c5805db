"""Reward fine-tuning: one more phase of the training loop."""

"""Preference labels: formats, splits, losses, and the annotators that give them."""

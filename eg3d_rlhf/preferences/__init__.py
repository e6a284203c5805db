"""Preference labels: formats, splits, losses, and the annotators that give them."""

GOOD, BAD = 4.0, 3.5  # of a single shape: least score of a preferred one, highest of one that is not

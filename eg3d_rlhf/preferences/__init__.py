"""Preference labels: formats, splits, losses, and the annotators that give them."""

# of a single shape: least score of a preferred one, highest of one that is not
GOOD = 4.0
BAD = 3.5

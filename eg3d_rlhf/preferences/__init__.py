"""Preference labels: formats, splits, losses, and simulated annotators."""

# scores of single shapes: preferred from GOOD on, not preferred up to BAD, no label in between
GOOD = 4.0
BAD = 3.5

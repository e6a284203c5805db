"""Preference labels: formats, splits, losses, and simulated annotators."""

# Thresholds for scores (0 to 5) of single shapes: a shape is preferred from GOOD upwards, and not preferred
# up to BAD. A score between both thresholds gives no label.
GOOD = 4.0
BAD = 3.5

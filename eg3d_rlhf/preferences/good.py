"""What a score says of one shape by itself. Imports nothing."""

GOOD, BAD = 4.0, 3.5  # least score of a preferred shape, highest of one that is not

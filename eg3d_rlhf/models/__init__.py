"""Plain networks of other people's checkpoints, and the reading of their weights."""

"""Networks of published checkpoints, written in plain PyTorch, and the code that reads their weights."""

"""The reward network on density slabs: architecture, files, training."""

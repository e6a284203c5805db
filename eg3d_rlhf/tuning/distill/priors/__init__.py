"""Frozen diffusion models of pictures."""

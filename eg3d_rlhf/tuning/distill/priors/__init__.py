"""Frozen diffusion models of images, from which assets are distilled (priors)."""

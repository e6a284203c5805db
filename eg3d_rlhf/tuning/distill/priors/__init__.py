"""Frozen diffusion models of images, which serve as priors."""

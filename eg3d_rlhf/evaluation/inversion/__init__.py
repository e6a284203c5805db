"""Inversion of images: search for the latent whose render equals a photograph, with a reward as prior."""

"""Hunyuan3D-2.1, shapes: a flow over a set of latent vectors, in one stage."""

"""Tuning of a stage by stored latents and what people said of single assets, or by whole rankings of them:
nothing is sampled.
"""

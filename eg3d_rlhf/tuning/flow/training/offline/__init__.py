"""Tune a stage on stored latents and people's labels of single assets, or their rankings of several assets.

No assets are generated during training.
"""

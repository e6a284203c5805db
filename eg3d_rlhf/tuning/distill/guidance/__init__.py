"""Distillation methods, which compute the gradient of a step with respect to the latents of the renders."""

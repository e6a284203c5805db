"""Distillation methods. Each computes the gradient of one step with respect to the latents of the rendered
views.
"""

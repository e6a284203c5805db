"""Methods of score distillation. Each computes the gradient of one step on the latents of the rendered
views.
"""

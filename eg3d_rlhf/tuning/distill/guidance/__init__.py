"""Methods of score distillation: each gives the gradient of one step on the latents of the rendered views."""

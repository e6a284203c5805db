"""Text to 3D by score distillation from a diffusion prior, with rewards."""

"""Text to 3D by score distillation: one asset is optimised against an image prior, and preferences enter the gradient."""

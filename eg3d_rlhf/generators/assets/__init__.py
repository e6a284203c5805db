"""Assets that score distillation optimises, their renders, and the cameras around them."""

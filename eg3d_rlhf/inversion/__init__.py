"""From one image to a shape: a latent, then the generator around it, with a reward on geometry at rising weight."""

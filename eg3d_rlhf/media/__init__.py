"""Pictures and films of a generator: seeds, cameras, views side by side, latent walks, mp4."""

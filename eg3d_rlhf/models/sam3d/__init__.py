"""Sam3d."""

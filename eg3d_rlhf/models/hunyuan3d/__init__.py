"""Hunyuan3d."""

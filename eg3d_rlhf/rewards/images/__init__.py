"""Rewards and judges of pictures and meshes."""

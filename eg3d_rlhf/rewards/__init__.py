"""Rewards: observations, reward networks, their training, and ensembles, with rewards of images and of
meshes.
"""

"""Rewards of fields, images and meshes: observations, networks, training and ensembles."""

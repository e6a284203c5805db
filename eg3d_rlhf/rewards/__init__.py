"""Rewards: observations, networks, training, ensembles; pictures and meshes."""

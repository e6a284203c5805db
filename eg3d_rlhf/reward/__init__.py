"""Rewards: networks on what an observation gives, their files, their training."""

"""Rewards of images, and evaluators that compare images or finished assets."""

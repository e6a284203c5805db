"""Baselines ordered by cost: from doing nothing to steering and then tuning, on the same held-out latents.

A rung is one way to improve samples, see `rungs`. A rung with a strength is a frontier of points. `samples`
makes the samples of a point, `measurements` measures them, `frontier` chooses the points that are shown and
the advice, and `report` puts the parts together. `flows` does the same for a flow generator's folder WORK.
"""

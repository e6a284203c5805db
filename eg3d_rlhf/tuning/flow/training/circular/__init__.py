"""Circular-DPO: train every stage from preferences on finished assets, from the last stage to the first, and
compare the variants of the method (its ablation).
"""

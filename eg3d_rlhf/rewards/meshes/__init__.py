"""RewardCS, the mesh reward of DreamCS (arXiv 2506.09814): mesh encoder, data, and training.

The code of DreamCS is not published, so this is a reconstruction from the paper.
"""

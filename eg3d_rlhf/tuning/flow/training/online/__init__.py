"""Tune a stage online by a reward. The policy itself generates groups of samples of one prompt, which are
compared with each other (as in GRPO, Shao et al. 2024).
"""

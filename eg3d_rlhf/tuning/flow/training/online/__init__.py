"""Online tuning of a stage by a reward: groups of samples of one condition, drawn from the policy itself
(GRPO).
"""

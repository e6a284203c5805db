"""What an update minimises, one file a loss: pure functions of tensors that return one value a sample,
unreduced.
"""

"""Attribution of a change of the reward to regions of the shape: Shapley values, Integrated Gradients."""

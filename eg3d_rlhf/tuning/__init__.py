"""Tuning of generators by rewards and preferences: GANs, flow generators, and score distillation."""

"""Tests of the baselines by cost."""

"""Measures of the quality of a generator or of a 3D asset. No module of this package reads a reward."""

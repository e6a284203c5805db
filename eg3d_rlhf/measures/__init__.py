"""Measures of a generator or of an asset. No module of this package reads a reward."""

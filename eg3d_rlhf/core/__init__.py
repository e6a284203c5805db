"""Shared basics of all packages: command line, registries, seeds, statistics, Field, grids."""

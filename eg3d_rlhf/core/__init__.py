"""Shared basics of all packages: command line, registries, seeds, statistics, the `Field` interface and
grids.
"""

"""Measures of a triangle mesh that need neither labels nor a network.

`mesh_measures.measure_mesh` computes all of them.
"""

"""Measures of a triangle mesh that need neither labels nor a network, such as whether it is a physically
valid body.

`mesh_measures.measure_mesh` computes all of them.
"""

"""Shapes as numbers: slabs of density, level sets, meshes."""

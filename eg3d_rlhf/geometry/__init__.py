"""Geometry of shapes: sigma slabs (cropped density grids), level sets, meshes, solids and mesh files."""

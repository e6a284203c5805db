"""Readers of mesh files from untrusted sources.

`glb`, `ply` and `obj` read a file with its materials and textures for display (`model.Model`). `triangles`
reads only the vertices and triangles of a file of any mesh format.
"""

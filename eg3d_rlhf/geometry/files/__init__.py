"""Readers of mesh files from untrusted sources: GLB, PLY and OBJ as they are shown (`model.Model`), or
any mesh file as triangles alone (`triangles`).
"""

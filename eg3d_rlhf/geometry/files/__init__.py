"""Files of meshes, read without trust: GLB, PLY and OBJ as they are shown (`model.Model`), or any mesh as
triangles alone (`triangles`).
"""

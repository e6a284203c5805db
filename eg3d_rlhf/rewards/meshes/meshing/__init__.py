"""Surfaces of fields as triangle meshes and patches, so that a mesh reward reaches the field."""

"""Procedural heads of people: parametric meshes with texture, and their renderer."""

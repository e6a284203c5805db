"""Synthetic heads: parametric meshes with colours, their renderer, and simulated scan damage."""

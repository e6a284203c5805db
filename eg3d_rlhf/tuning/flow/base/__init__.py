"""Interfaces and data of flow generators in stages: what training, families and workspace build on."""

"""Trellis2."""

"""TRELLIS.2: structure, then shape in a cascade of two resolutions,
then the surface's colours and materials.
"""

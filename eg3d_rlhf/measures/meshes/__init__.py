"""Is a mesh a sound body? Measures of a triangle mesh that need neither a label nor a network:
`measure.measure_mesh`.
"""

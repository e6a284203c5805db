"""A small generator in two stages, for machines without a GPU: eight shapes in eight colours on a grid of
eight voxels per axis.

Stage "structure" is a flow over an occupancy grid. Stage "voxels" is a flow over colour and size of the
voxels above the threshold.

Letters: N samples, R grid points per axis, K variants of a shape, V voxels of a batch, T tokens of a prompt,
E their size.
Grids are [..., R, R, R] over x, y, z with z up; every shape mirrors itself in x.
"""

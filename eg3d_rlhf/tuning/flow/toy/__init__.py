"""The bundled toy: a small generator with two stages, for machines without a GPU.

The toy makes 16 shapes in 12 colours, on a grid of eight voxels per axis. The stage "structure" is a flow
over an occupancy grid. The stage "voxels" is a flow over the colour and the size of the occupied voxels.

Shapes: N samples; R = 8 grid points per axis; K = 4 variants of a shape; V voxels of a batch; T tokens of a
prompt; E entries of a token. Grids are [..., R, R, R] over x, y, z, where z points up. Every shape is
symmetric in x.
"""

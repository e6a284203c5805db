"""Which part of a face the reward likes: attributions of a reward difference to regions and voxels of the slab."""

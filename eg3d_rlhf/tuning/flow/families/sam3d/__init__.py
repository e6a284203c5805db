"""SAM 3D Objects: shape and pose of an object in a picture together, then latents on the shape's voxels."""

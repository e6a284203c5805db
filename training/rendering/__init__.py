"""Volume rendering of tri-planes: cameras, rays, sampling and the ray marcher."""

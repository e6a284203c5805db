"""The density field as data: which part of it is read (spec), how it is sampled (slab, separable) and turned into a mesh (mesh)."""

from eg3d_rlhf.sigma.mesh import extract_mesh
from eg3d_rlhf.sigma.mesh_export import save_mesh
from eg3d_rlhf.sigma.slab import DecoderWeights, normalise_slab, sample_slab, sigma_from_planes, sigma_grid
from eg3d_rlhf.sigma.spec import SlabSpec

__all__ = [
    "DecoderWeights",
    "SlabSpec",
    "extract_mesh",
    "normalise_slab",
    "sample_slab",
    "save_mesh",
    "sigma_from_planes",
    "sigma_grid",
]

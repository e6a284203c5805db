"""Slab geometry and normalisation against the reference values (fixtures/reward).

The published slab is meant, or the one of `slab` in recipe.json: the fields of a SlabSpec.
"""

import numpy as np
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.slab import normalise_slab
from tests.compat.reference import ROOT, arrays, hold, of_set, read_json

SPEC = SlabSpec(**read_json(ROOT / "reward" / "recipe.json").get("slab", {}))


def test_the_crop_has_the_reference_indices_and_shapes(fixtures_dir):
    reference = arrays(fixtures_dir / "reward" / "slab_axes.npz")
    hold(
        reference,
        {
            "crop": lambda crop: np.testing.assert_array_equal(np.array(SPEC.index_ranges), crop),
            "shape_xyz": lambda shape: np.testing.assert_array_equal(SPEC.shape[::-1], shape),
            "net_input_shape": lambda shape: np.testing.assert_array_equal((1, 1, *SPEC.shape), shape),
        },
    )


def test_the_straight_grid_stays_within_a_voxel_of_the_sheared_reference(fixtures_dir):
    """The reference lattice drifts by y/N + z/N^2 of a voxel in x and z/N in y; ours is straight."""
    reference = arrays(fixtures_dir / "reward" / "slab_axes.npz")
    index, coords, crop = of_set(reference, "idx_xyz", "coords_xyz", "crop")  # [points, 3], inside the slab
    n = SPEC.resolution
    ours = np.stack([axis.numpy()[i] for axis, i in zip(SPEC.axes(), index.T, strict=True)], axis=1)
    offset = (coords - ours) / SPEC.voxel
    assert np.abs(offset).max() < 1
    whole = index + crop[:, 0]  # indices into the cube
    shear = np.stack([whole[:, 1] / n + whole[:, 2] / n**2, whole[:, 2] / n, 0 * whole[:, 2]], axis=1)
    np.testing.assert_allclose(offset, shear, atol=1e-4)


def test_self_normalisation_values_and_gradients_with_ties(fixtures_dir):
    reference = arrays(fixtures_dir / "reward" / "normalise_self.npz")
    values, upper, normalised = of_set(reference, "x", "hi", "y")
    x = torch.from_numpy(values)[None].requires_grad_()
    y = normalise_slab(x, float(upper))
    np.testing.assert_allclose(y[0].detach().numpy(), normalised, rtol=1e-6)
    cotangent, gradient = of_set(reference, "w", "grad_x")
    (grad,) = torch.autograd.grad(y, x, torch.from_numpy(cotangent)[None])
    np.testing.assert_allclose(grad[0].numpy(), gradient, rtol=1e-5, atol=1e-5)

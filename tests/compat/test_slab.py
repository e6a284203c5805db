"""Slab geometry and normalisation against the reference values (fixtures/reward)."""

import numpy as np
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.slab import normalise_slab
from tests.compat.reference import arrays


def test_the_crop_has_the_reference_indices_and_shapes(fixtures_dir):
    reference = arrays(fixtures_dir / "reward" / "slab_axes.npz")
    spec = SlabSpec()
    np.testing.assert_array_equal(np.array(spec.index_ranges), reference["crop"])
    np.testing.assert_array_equal(spec.shape[::-1], reference["shape_xyz"])
    np.testing.assert_array_equal((1, 1, *spec.shape), reference["net_input_shape"])


def test_the_straight_grid_stays_within_a_voxel_of_the_sheared_reference(fixtures_dir):
    """The reference lattice drifts by y/256 + z/65536 of a voxel in x and z/256 in y; ours is straight."""
    reference = arrays(fixtures_dir / "reward" / "slab_axes.npz")
    spec = SlabSpec()
    index = reference["idx_xyz"]  # [points, 3], inside the slab
    ours = np.stack([axis.numpy()[i] for axis, i in zip(spec.axes(), index.T, strict=True)], axis=1)
    offset = (reference["coords_xyz"] - ours) / spec.voxel
    assert np.abs(offset).max() < 1
    whole = index + reference["crop"][:, 0]  # indices into the cube
    shear = np.stack([whole[:, 1] / 256 + whole[:, 2] / 65536, whole[:, 2] / 256, 0 * whole[:, 2]], axis=1)
    np.testing.assert_allclose(offset, shear, atol=1e-4)


def test_self_normalisation_values_and_gradients_with_ties(fixtures_dir):
    reference = arrays(fixtures_dir / "reward" / "normalise_self.npz")
    x = torch.from_numpy(reference["x"])[None].requires_grad_()
    y = normalise_slab(x, float(reference["hi"]))
    np.testing.assert_allclose(y[0].detach().numpy(), reference["y"], rtol=1e-6)
    (grad,) = torch.autograd.grad(y, x, torch.from_numpy(reference["w"])[None])
    np.testing.assert_allclose(grad[0].numpy(), reference["grad_x"], rtol=1e-5, atol=1e-5)

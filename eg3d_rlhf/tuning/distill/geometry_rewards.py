"""Geometry rewards from files: a mesh reward (RewardCS), or a reward on density, depth or points as tools/train_reward.py makes it."""

from collections.abc import Callable
from pathlib import Path

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.rewards.meshes.meshing.lattice import cube
from eg3d_rlhf.rewards.meshes.meshing.patches import MeshReader
from eg3d_rlhf.rewards.meshes.model import KIND, load_mesh_reward
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.distill.guidance.geometry import GeometryReward, MeshGeometry, ObservedGeometry
from training.storage import read_meta


def file_of(name: str) -> Path | None:
    """The file that --geometry-reward names; None for none."""
    return {"none": None, "sigma": bundled.REWARD}.get(name, Path(name))


def load_geometry(name: str, device: torch.device) -> Callable[[], GeometryReward] | None:
    """A maker of the reward that --geometry-reward names: none, sigma (the bundled reward of densities), or a file.

    Raises: FileNotFoundError, ValueError: one line that names the flag.
    """
    path = file_of(name)
    if path is None:
        return None
    with naming("--geometry-reward"):
        if not path.is_file():
            raise FileNotFoundError(f"expected none, sigma or the file of a reward, got nothing at {path}. Check the path.")
        if _is_mesh_reward(path):
            mesh = load_mesh_reward(path, device)
            return lambda: MeshGeometry(MeshReader(cube(mesh.resolution), mesh.patches), mesh)
        observed = ObservedGeometry(load_reward(path, device))
    return lambda: observed


def _is_mesh_reward(path: Path) -> bool:
    try:
        read_meta(path, KIND)
    except ValueError:
        return False
    return True

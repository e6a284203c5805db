"""Preference learning for 3D generators: rewards that read the density field, and fine-tuning with them.

The public names below are imported lazily, at their first use, so that `import eg3d_rlhf` is fast:

    from eg3d_rlhf import load_generator, load_reward, ws_of_seeds

    generator = load_generator().generator            # bundled; or a file, an EG3D pickle, a run's folder
    field = generator.field(ws_of_seeds(generator, [1, 2, 3], truncation_psi=0.7))
    print(load_reward().score(field))                 # one score per shape; higher is better
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch_utils  # noqa: F401 (must precede torch: sets how OpenMP threads wait)

if TYPE_CHECKING:
    from eg3d_rlhf.core.field import Field
    from eg3d_rlhf.generators import load_generator, ws_of_seeds
    from eg3d_rlhf.geometry.mesh_export import export_mesh
    from eg3d_rlhf.geometry.settings import MeshOptions
    from eg3d_rlhf.modes.gan import tune
    from eg3d_rlhf.photographs.poses import poses_of
    from eg3d_rlhf.preferences.labels import Preference, load_labels, write_labels
    from eg3d_rlhf.preferences.losses import preference_loss
    from eg3d_rlhf.rewards.observations import observation_of
    from eg3d_rlhf.rewards.reward import Reward, load_reward
    from eg3d_rlhf.tuning.gan.latent_search import improve
    from eg3d_rlhf.tuning.gan.steering import steer

__all__ = [
    "Field",
    "MeshOptions",
    "Preference",
    "Reward",
    "export_mesh",
    "improve",
    "load_generator",
    "load_labels",
    "load_reward",
    "observation_of",
    "poses_of",
    "preference_loss",
    "steer",
    "tune",
    "write_labels",
    "ws_of_seeds",
]

# Keys: public names. Values: the module of eg3d_rlhf that defines the name.
_MODULES = {
    "Field": "core.field",
    "MeshOptions": "geometry.settings",
    "Preference": "preferences.labels",
    "Reward": "rewards.reward",
    "export_mesh": "geometry.mesh_export",
    "improve": "tuning.gan.latent_search",
    "load_generator": "generators",
    "load_labels": "preferences.labels",
    "load_reward": "rewards.reward",
    "observation_of": "rewards.observations",
    "poses_of": "photographs.poses",
    "preference_loss": "preferences.losses",
    "steer": "tuning.gan.steering",
    "tune": "modes.gan",
    "write_labels": "preferences.labels",
    "ws_of_seeds": "generators",
}


def __getattr__(name: str) -> Any:
    """Import a public name of the package at its first use (PEP 562).

    Raises: AttributeError for a name that is not one of the public names.
    """
    if name not in _MODULES:
        # hasattr() and `from eg3d_rlhf import X` rely on this type of exception
        raise AttributeError(f"module 'eg3d_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"eg3d_rlhf.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the names of this module, including the public names that have not been imported yet.

    Without this function, tab completion would offer only the names that were used already.
    """
    return sorted({*globals(), *__all__})

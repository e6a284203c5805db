"""Read TRELLIS's reference values: files are found by what they hold, whatever they are called.

Settings of trajectories are those that a file has under smp_json (by name: steps, cfg_strength, cfg_interval,
rescale_t), else those that the present set was made with.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from eg3d_rlhf.tuning.flow.base.stage import Sampling
from tests.compat.absent import some
from tests.compat.reference import ROOT, array_names

FOLDER = ROOT / "trellis"
SAMPLINGS = {  # by the name under which the values have them
    "euler": {"cfg_strength": 0.0, "rescale_t": 1.0},
    "cfg": {"cfg_strength": 5.0, "cfg_interval": (0.0, 1.0), "rescale_t": 3.0},
    "interval": {"cfg_strength": 7.5, "cfg_interval": (0.5, 0.95), "rescale_t": 3.0},
    "": {"cfg_strength": 5.0, "cfg_interval": (0.5, 1.0), "rescale_t": 3.0},
}


def read(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def config_of(values: dict[str, torch.Tensor], name: str = "config_json") -> dict:
    return json.loads(bytes(values[name].numpy()))


def holding(*names: str) -> list[Path]:
    """Return the files that have these arrays."""
    return [path for path in sorted(FOLDER.glob("*.npz")) if set(names) <= set(array_names(path))]


def each(*names: str, without: str = ""):
    """Parametrize a test over the files that have these arrays and lack another."""
    found = [path for path in holding(*names) if without not in array_names(path)]
    params = [pytest.param(path, id=path.stem) for path in found]
    reason = f"this set has no file of trellis with {', '.join(names)}"
    return pytest.mark.parametrize("path", some(params, reason), indirect=True)


def sampling_of(values: dict[str, torch.Tensor], name: str) -> Sampling:
    """Return the settings of the trajectory smp_<name>_x_t, or smp_x_t where it has no name."""
    told = config_of(values, "smp_json") if "smp_json" in values else {}
    if name not in told and name not in SAMPLINGS:
        pytest.skip(f"this set does not say the settings of smp_{name}_x_t")
    settings = {"steps": len(values[prefix(name) + "x_t"]), **(told.get(name) or SAMPLINGS[name])}
    return Sampling(**{key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()})


def prefix(name: str) -> str:
    return f"smp_{name}_" if name else "smp_"


def trajectories() -> list:
    """List file and name of every trajectory, as pytest's parameters."""
    found = [
        pytest.param(path, match[1] or "", id=f"{path.stem}-{match[1] or 'only'}")
        for path in sorted(FOLDER.glob("*.npz"))
        for key in array_names(path)
        if (match := re.fullmatch(r"smp_(?:(.+)_)?x_t", key))
    ]
    return some(found, "this set has no trajectory smp_..._x_t in trellis", width=2)

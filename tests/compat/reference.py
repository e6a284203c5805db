"""How the reference values were made: draw injection, weight recipes, discovery and error measures
(eg3d.md, section 11).
"""

import contextlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from training.discriminator import DualDiscriminator
from training.triplane import TriPlaneGenerator

OURS = Path(__file__).resolve().parents[1] / "references"
ROOT = Path(os.environ.get("EG3D_RLHF_FIXTURES", OURS)).resolve()


def discover(pattern: str) -> list[str]:
    """Stems of the reference cases eg3d/<pattern>.json; empty where the folder does not exist."""
    return sorted(path.stem for path in (ROOT / "eg3d").glob(f"{pattern}.json"))


def read_json(path: Path) -> dict:
    """Its content; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def array_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz; none where there is no file."""
    if not path.is_file():
        return []
    with np.load(path) as arrays:
        return list(arrays.files)


def crc_random(name: str, shape) -> np.ndarray:
    """RandomState(crc32(name)).standard_normal(shape)."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def relative_error(value, reference) -> float:
    """||a - b|| / ||b|| in float64."""
    a = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    b = np.asarray(reference, dtype=np.float64)
    assert a.shape == b.shape, f"expected shape {b.shape}, got {a.shape}"
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def of_root(path: Path) -> str:
    """Return a file's path from the folder of the set, as reasons of skips name it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def existing(path: Path) -> Path:
    """The file; skips the test where a set has left it out."""
    if not path.is_file():
        pytest.skip(f"this set has no {of_root(path)}")
    return path


def arrays(path: Path):
    """Arrays of a file; skips the test where a set has left it out."""
    return np.load(existing(path))


def strides(have: int, want: int) -> list[int]:
    """Return the steps that keep `want` of `have` entries."""
    if want == have:
        return [1]
    if want < 2:
        return [have] if want == 1 else []
    return [step for step in range(-(-have // want), have) if -(-have // step) == want]


def thinned(value, kept, first: bool = False) -> np.ndarray:
    """Keep every so many entries of each axis, as a set has kept them.

    A set does not state the steps. The lengths often leave one choice; where they leave several, the set
    means the one whose entries are nearest to its own. With `first`, it may also have kept the first entries.
    """
    value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
    kept = np.asarray(kept)
    assert value.ndim == kept.ndim, f"expected {kept.ndim} axes, got {value.ndim}"
    slices = [
        [slice(None, None, step) for step in strides(have, want)]
        + [slice(want)] * (first and 0 < want < have)
        for have, want in zip(value.shape, kept.shape, strict=True)
    ]
    assert all(slices), f"no steps through {list(value.shape)} keep {list(kept.shape)}"
    count = math.prod(map(len, slices))
    assert count <= 10_000, f"too many ways to keep {list(kept.shape)} of {list(value.shape)}"
    ways = (value[way] for way in itertools.product(*slices))
    if count == 1:
        return next(ways)
    return min(ways, key=lambda way: float(np.linalg.norm(np.float64(way) - np.float64(kept))))


def hold(reference: Mapping[str, np.ndarray], computed: Mapping[str, Callable[[np.ndarray], None]]) -> None:
    """Run the check of every value that a set has, with the value;
    skips the test where it has none of them.
    """
    present = [key for key in computed if key in reference]
    if not present:
        pytest.skip(f"this set has no {', '.join(computed)}")
    for key in present:
        computed[key](reference[key])


def of_set(reference: Mapping[str, np.ndarray], *keys: str) -> list[np.ndarray]:
    """The values of keys; skips the test where a set has left one out."""
    absent = [key for key in keys if key not in reference]
    if absent:
        pytest.skip(f"this set has no {', '.join(absent)}")
    return [reference[key] for key in keys]


def weight_of(name: str, shape, gain: float, salt: str) -> torch.Tensor:
    """The entry of a state dict that its name determines, float32: by the recipe of the reward zoo."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    n = np.asarray(crc_random(salt + name, tuple(shape)))
    if n.ndim >= 2:
        n = gain * n / np.sqrt(np.prod(n.shape[1:]))
    elif name.endswith("running_var"):
        n = 1 + 0.2 * np.abs(n)
    else:
        n = 1 + 0.1 * n if name.endswith(".weight") else 0.1 * n
    return torch.from_numpy(np.asarray(n, np.float32))


def close(got, want, tolerance: float) -> None:
    """Equal within `tolerance` of the value, and as much of the largest entry."""
    got = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got, np.float64)
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(
        got.reshape(want.shape), want, rtol=tolerance, atol=tolerance * np.abs(want).max()
    )


class Draws:
    """Replacement for torch's random functions: draw k is RandomState(base + k), or the midpoints of the
    'fixed' mode.
    """

    def __init__(self, base: int | None):
        self.base = base
        self.log = []

    def _draw(self, kind: str, shape) -> torch.Tensor:
        shape = [int(s) for s in shape]
        k = len(self.log)
        self.log.append([kind, shape])
        if self.base is None:
            if kind == "randn":
                raise AssertionError("the fixed mode holds no normal draws")
            if len(shape) == 2:
                return ((torch.arange(shape[1]) + 0.5) / shape[1]).expand(shape).clone()
            return torch.full(shape, 0.5)
        state = np.random.RandomState(self.base + k)
        value = state.random_sample(shape) if kind == "rand" else state.standard_normal(shape)
        return torch.as_tensor(np.asarray(value, dtype=np.float32))

    def _sized(self, kind: str):
        def function(*size, **_kwargs):
            return self._draw(
                kind, size[0] if len(size) == 1 and isinstance(size[0], (list, tuple, torch.Size)) else size
            )

        return function

    def _like(self, kind: str):
        return lambda x, **_kwargs: self._draw(kind, x.shape)

    @contextlib.contextmanager
    def injected(self):
        """Patch torch.rand, randn, rand_like and randn_like."""
        with (
            mock.patch("torch.rand", self._sized("rand")),
            mock.patch("torch.randn", self._sized("randn")),
            mock.patch("torch.rand_like", self._like("rand")),
            mock.patch("torch.randn_like", self._like("randn")),
        ):
            yield self


def build(config: dict) -> tuple[TriPlaneGenerator, DualDiscriminator]:
    """Networks from a reference case's configuration."""
    G, D = (
        network(**{k: v for k, v in config[part].items() if k != "class_name"})
        for part, network in (("G", TriPlaneGenerator), ("D", DualDiscriminator))
    )
    G.neural_rendering_resolution = config["neural_rendering_resolution"]
    return G, D


# the full-size recipe's factors, which a case may state as "fill"
FILL = {
    "mapping_weight": 100,
    "mapping_bias": 10,
    "affine_bias": 0.1,
    "bias": 0.1,
    "w_avg": 0.3,
    "density_row": 40,
}


def load_case(name: str):
    """Return (case, G, D) of one network with its weights set."""
    case = json.loads((ROOT / "eg3d" / f"{name}.json").read_text())
    G, D = build(case["config"])
    set_weights(case, ROOT / "eg3d" / f"{name}_state.npz", G, D)
    return case, G, D


def set_weights(case: dict, stored: Path, G: torch.nn.Module, D: torch.nn.Module) -> None:
    """Load weights from a file where there is one, else make them from their names."""
    for prefix, module in (("G/", G), ("D/", D)):
        if stored.exists():
            arrays = np.load(stored)
            tensors = {
                k.removeprefix(prefix): torch.as_tensor(arrays[k]) for k in arrays if k.startswith(prefix)
            }
            module.load_state_dict(tensors, strict=True)
        else:
            salt = case.get("salt", "")
            deterministic_fill(module, salt + prefix.replace("/", "."), case.get("fill", {}))


def deterministic_fill(module: torch.nn.Module, prefix: str, factors: Mapping[str, float] = FILL) -> None:
    """The full-size recipe: every entry but resample filters from its name's checksum, scaled by kind."""
    by = {**FILL, **factors}
    state = module.state_dict()
    for name, tensor in state.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "resample_filter":
            continue
        r = crc_random(prefix + name, tuple(tensor.shape))
        r = np.asarray(r, dtype=np.float32)
        in_mapping = "mapping.fc" in name
        if in_mapping and leaf == "weight":
            r = r * by["mapping_weight"]
        elif in_mapping and leaf == "bias":
            r = r * by["mapping_bias"]
        elif name.endswith("affine.bias"):
            r = 1 + by["affine_bias"] * r
        elif leaf == "bias" or leaf == "noise_strength":
            r = r * by["bias"]
        elif leaf == "w_avg":
            r = r * by["w_avg"]
        if name == "decoder.net.2.weight":
            r[0] *= by["density_row"]
        tensor.copy_(torch.as_tensor(np.asarray(r, dtype=np.float32)))

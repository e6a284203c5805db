"""How the reference values were made: draw injection, weight recipes, discovery and error measures
(eg3d.md, section 11).
"""

import contextlib
import json
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

ROOT = Path(os.environ.get("EG3D_RLHF_FIXTURES", Path(__file__).parents[1] / "references")).resolve()


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


def existing(path: Path) -> Path:
    """The file; skips the test where a set has left it out."""
    if not path.is_file():
        pytest.skip(f"this set has no {path}")
    return path


def arrays(path: Path):
    """Arrays of a file; skips the test where a set has left it out."""
    return np.load(existing(path))


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


def load_case(name: str):
    """(case, inference arrays, G, D) of one network with its weights set."""
    folder = ROOT / "eg3d"
    case = json.loads((folder / f"{name}.json").read_text())
    G, D = build(case["config"])
    state = folder / f"{name}_state.npz"
    for prefix, module in (("G/", G), ("D/", D)):
        if state.exists():
            arrays = np.load(state)
            tensors = {
                k.removeprefix(prefix): torch.as_tensor(arrays[k]) for k in arrays if k.startswith(prefix)
            }
            module.load_state_dict(tensors, strict=True)
        else:
            deterministic_fill(module, prefix.replace("/", "."))
    return case, np.load(folder / f"{name}_infer.npz"), G, D


def deterministic_fill(module: torch.nn.Module, prefix: str) -> None:
    """The full-size recipe: every entry but resample filters from its name's checksum, scaled by kind."""
    state = module.state_dict()
    for name, tensor in state.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "resample_filter":
            continue
        r = crc_random(prefix + name, tuple(tensor.shape))
        r = np.asarray(r, dtype=np.float32)
        in_mapping = "mapping.fc" in name
        if in_mapping and leaf == "weight":
            r = r * 100
        elif in_mapping and leaf == "bias":
            r = r * 10
        elif name.endswith("affine.bias"):
            r = 1 + 0.1 * r
        elif leaf == "bias" or leaf == "noise_strength":
            r = r * 0.1
        elif leaf == "w_avg":
            r = r * 0.3
        if name == "decoder.net.2.weight":
            r[0] *= 40
        tensor.copy_(torch.as_tensor(np.asarray(r, dtype=np.float32)))

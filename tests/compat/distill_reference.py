"""Reading the reference values of score distillation, and the stand-in prior that they were made with.

Cases, sizes, seeds and salts come from the JSON and the arrays: a second set of the same layout runs,
whatever it leaves out.
"""

import functools
import re

import numpy as np
import pytest
import torch

from tests.compat import reference
from tests.compat.absent import some

ROOT = reference.ROOT / "distill"


class Given(dict):
    """Arrays or settings by name. Looking up a name that a set has left out skips the test."""

    def __init__(self, content, place: str):
        super().__init__(content)
        self.place = place

    def __missing__(self, name: str):
        pytest.skip(f"this set has no {name} in {self.place}")


def present(given: Given, *names: str) -> list[torch.Tensor]:
    """Return several arrays; skip the test where a set has left one out."""
    return [given[name] for name in names]


@functools.cache
def values(name: str) -> dict[str, torch.Tensor]:
    """Arrays of a set; empty where the file is not there."""
    path = ROOT / f"{name}.npz"
    if not path.is_file():
        return Given({}, path.name)
    with np.load(path) as data:
        return Given({key: torch.as_tensor(data[key]) for key in data.files}, path.name)


@functools.cache
def recipe(name: str) -> dict:
    """Settings of a set's cases."""
    return {"cases": {}} | reference.read_json(ROOT / f"{name}.json")


def entry_of(name: str, case: str) -> dict:
    """Return the settings of one case."""
    return Given(recipe(name)["cases"][case], f"{name}.json, {case}")


def under(name: str, prefix: str) -> dict[str, torch.Tensor]:
    """The arrays below a prefix, without it."""
    found = {
        key.removeprefix(prefix + "/"): value
        for key, value in values(name).items()
        if key.startswith(prefix + "/")
    }
    return Given(found, f"{name}.npz, {prefix}")


def each(name: str, prefix: str = ""):
    """Parametrize a test over the cases of the JSON whose names start with `prefix`."""
    found = sorted(case for case in recipe(name)["cases"] if case.startswith(prefix))
    return pytest.mark.parametrize("case", some(found, f"this set has no case {prefix}... in {name}.json"))


def members(name: str, group: str) -> list[str]:
    """List the names right below a group of arrays: "ddim_step" -> "epsilon_15", ...; "": the groups
    themselves.
    """
    return sorted({key.split("/")[0] for key in (under(name, group) if group else values(name))})


def filled(entry: dict) -> dict[str, torch.Tensor]:
    """Weights by the JSON's fill rule: tensor i of `order` from RandomState(base + i), scaled by `scale` or
    by kind.
    """
    made = {}
    for i, (name, shape) in enumerate(entry["order"]):
        z = np.random.RandomState(entry["base"] + i).standard_normal(shape)
        if "scale" in entry:
            z = z * entry["scale"]
        elif len(shape) > 1:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
        made[name] = torch.from_numpy(np.asarray(z, np.float32))
    return made


def needs(name: str):
    """Mark for tests of a set."""
    return pytest.mark.skipif(not values(name), reason=f"this set has no distill/{name}.npz")


def close(got, want, tolerance: float) -> None:
    """Equal within `tolerance` of the largest entry."""
    got = torch.as_tensor(got).detach().double()
    want = torch.as_tensor(want).double()
    assert got.shape == want.shape, f"expected shape {list(want.shape)}, got {list(got.shape)}"
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
    assert error <= tolerance, f"largest error {error:.3g} of the largest entry"


class StandIn:
    """eps = (1 + u.e) P x + (1 + v.e) (t / 1000) Q + r mean over the asset's views of x + cameras.cam;
    matrices as autoencoder.
    """

    def __init__(
        self,
        arrays: dict[str, torch.Tensor],
        alphas_cumprod: torch.Tensor,
        embeddings: dict[str, torch.Tensor],
        views: int = 1,
        scale: float = 1.0,
    ):
        self.scale = scale  # of latents
        self.net = {key.removeprefix("net_"): value for key, value in arrays.items()}
        self.alphas_cumprod = alphas_cumprod
        self.embeddings = embeddings
        self.views = views
        self.latent_shape = tuple(self.net["P"].shape)
        self.calls: list[torch.Tensor] = []  # t of each

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.einsum(
            "ij,bjhw->bihw", self.net.get("E", self.net.get("vae_E")), 2 * images - 1
        )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        matrix = self.net.get("Dm", self.net.get("vae_Dm"))
        return (torch.einsum("ij,bjhw->bihw", matrix, latents / self.scale) / 2 + 0.5).clamp(0, 1)

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        keys = (
            prompts if directions is None else [f"{p}, {d}" for p, d in zip(prompts, directions, strict=True)]
        )
        return torch.stack([self.embeddings[key] for key in keys])

    def predict_noise(self, x_t, t, cond, cameras=None):
        self.calls.append(t)
        # [B, D]
        net = self.net
        e = cond.mean(1)
        mean = x_t.unflatten(0, (-1, self.views)).mean(1).repeat_interleave(self.views, 0)
        column = (-1, 1, 1, 1)
        out = (
            (1 + e @ net["u"]).view(column) * net["P"] * x_t
            + ((1 + e @ net["v"]) * t / 1000).view(column) * net["Q"]
            + net["r"] * mean
        )
        return out if cameras is None else out + (cameras @ net["cam"]).view(column)


class Recorded:
    """Named draws that hand out recorded noises."""

    def __init__(self, *noises: torch.Tensor):
        self.recorded = torch.stack(noises)

    def noises(self, count, like, step):
        assert count == len(self.recorded) and like.shape == self.recorded.shape[1:]
        return self.recorded


class Pictures:
    """A reward that is linear in each picture, or recites recorded scores; keeps what it saw."""

    views = 1
    modality = "image"
    differentiable = True

    def __init__(self, w: torch.Tensor | None = None, recited: torch.Tensor | None = None):
        self.w = w
        self.recited = recited
        self.seen = None

    def score(self, pixels, prompts):
        self.seen = pixels
        return self.recited if self.recited is not None else (pixels * self.w).mean((1, 2, 3))


def latent_scale(name: str) -> float:
    """Read the scale of the set's latents from its JSON, by a number of its own or in words."""
    if "latent_scale" in recipe(name):
        return recipe(name)["latent_scale"]
    said = re.search(r"latents = .*?(\d\.\d{3,})", recipe(name).get("fake_network", ""))
    return float(said[1]) if said else pytest.skip(f"{name}.json does not say the scale of latents")


def views_of(name: str, case: str) -> int:
    """Return the number of views of an asset: as the JSON states it, else the 4 of the published programs."""
    return recipe(name)["cases"][case].get("n_view", recipe(name).get("n_view", 4))


def multiview(name: str, views: int) -> StandIn:
    """The stand-in of the multi-view sets, which knows "text" and the empty prompt."""
    from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule

    net = under(name, "net")
    embeddings = {"text": net["cond"][0], "": net["null"][0]}
    arrays = {key: array for key, array in net.items() if key not in ("cond", "null")}
    return StandIn(arrays, NoiseSchedule().alphas_cumprod, embeddings, views, latent_scale(name))


def seen_by(cam2world: torch.Tensor) -> torch.Tensor:
    """Cameras [B, 4, 4] as MVDream's network gets them, [B, 16]: at distance 1."""
    cameras = cam2world.clone()
    cameras[:, :3, 3] /= cameras[:, :3, 3].norm(dim=1, keepdim=True) + 1e-8
    return cameras.flatten(1)

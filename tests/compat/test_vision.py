"""transformers' vision networks against those that this project had: values of tests/references/vision.

`python -m tests.compat.test_vision` prints the table of differences.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eg3d_rlhf.models.blip import from_published
from eg3d_rlhf.models.dino import DinoConfig, from_hub, read_dino, read_dino3
from eg3d_rlhf.models.sam3d import ImageEncoder
from eg3d_rlhf.models.weights import adopt, empty, fill
from eg3d_rlhf.rewards.images.reward3d import Reward3dNetwork
from tests.compat.reference import ROOT, arrays, read_json
from tests.references.vision.make import LARGE, images, prompts, thinned, weights

FOLDER = ROOT / "vision"
CASES = read_json(FOLDER / "networks.json").get("cases", {})
LONG = {LARGE}  # half a minute: 450 million numbers
TOLERANCE = 1e-5  # see `difference`

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'eg3d-rlhf[vision]'")
if not CASES:
    pytest.skip("this set has no vision/networks.json", allow_module_level=True)


def dino_of(case: Mapping, state: Mapping[str, torch.Tensor], folder: Path) -> torch.nn.Module:
    """Read a case's network from a file of its layout."""
    settings = case["settings"]
    if case["layout"] == "hub":
        torch.save(dict(state), folder / "dino.pth")
        return read_dino(str(folder / "dino.pth"))
    save_file(dict(state), folder / "model.safetensors")
    kind = "dinov2_with_registers" if settings.get("num_register_tokens") else "dinov2"
    kind = "dinov3_vit" if case["kind"] == "dino3" else kind
    shown = {} if case["kind"] == "dino3" else {"shown": case["images"][1]}
    (folder / "config.json").write_text(json.dumps(settings | shown | {"model_type": kind}))
    return (read_dino3 if case["kind"] == "dino3" else read_dino)(str(folder))


@torch.no_grad()
def tokens(name: str, case: Mapping, folder: Path) -> dict[str, torch.Tensor]:
    """Compute the outputs of a case with a DINO."""
    state = weights(case["shapes"])
    pixels = images(name, *case["images"])
    if case["kind"] == "images":
        outputs = {}
        for key, before in (("before", True), ("after", False)):
            config = DinoConfig.from_state(state, name, shown=pixels.shape[-1])
            encoder = empty(lambda c=config, b=before: ImageEncoder(c, pixels.shape[-1], before_norm=b))
            fill(encoder.backbone, from_hub(state, config), name)
            outputs[key] = encoder.eval()(pixels)
        return outputs
    network = dino_of(case, state, folder)
    if case["kind"] == "dino3":
        before = network(pixels)
        return {"before": before, "after": network.norm(before)}
    return {"before": network(pixels, normed=False), "after": network(pixels)}


def scores(name: str, case: Mapping) -> dict[str, torch.Tensor]:
    """Compute the outputs of a case with a reward on BLIP, and the gradient of the scores."""
    shapes = case.get("shapes")
    if shapes is None:
        rows = (line.split("\t") for line in (ROOT / case["table"]).read_text().splitlines())
        shapes = {n: [int(x) for x in shape.split("x")] for n, shape in rows if "position_ids" not in n}
    state = weights(shapes)
    network = (
        adopt(Reward3dNetwork.from_state_dict(state, name), from_published(state), name)
        .eval()
        .requires_grad_(False)
    )
    assert network.kind == case["kind"]
    side = network.blip.side
    pixels = (images(name, case["images"], side, side) * 2 - 1).requires_grad_()
    features = network.blip(pixels, *prompts(case["images"], network.blip.text_encoder.config.vocab_size))
    given = network.head(features)
    (slope,) = torch.autograd.grad(given.sum(), pixels)
    return {"seen": network.blip.encode_images(pixels), "features": features, "scores": given, "slope": slope}


def outputs_of(name: str, folder: Path) -> dict[str, torch.Tensor]:
    case = CASES[name]
    return scores(name, case) if name.startswith("blip") else tokens(name, case, folder)


def difference(key: str, output: torch.Tensor, want: np.ndarray) -> float:
    """Return the largest difference relative to the largest value; of scores, relative to 1, which is their
    standard deviation, as they may be near 0.
    """
    scale = 1.0 if key == "scores" else float(np.abs(want).max())
    return float(np.abs(thinned(output) - want).max()) / scale


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CASES]
)
def test_outputs_are_those_of_our_networks(name, tmp_path):
    wanted = arrays(FOLDER / "networks.npz")
    for key, output in outputs_of(name, tmp_path).items():
        assert difference(key, output, wanted[f"{name}/{key}"]) < TOLERANCE, key


def table() -> None:
    """Print network, mean |output| of ours and theirs, largest difference over largest output."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    wanted = arrays(FOLDER / "networks.npz")
    print("| network | output | ours, mean abs | theirs | largest difference / largest value |")
    print("| --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        with TemporaryDirectory() as folder:
            outputs = outputs_of(name, Path(folder))
        for key, output in outputs.items():
            error = difference(key, output, wanted[f"{name}/{key}"])
            ours = case["mean_abs"][key]
            theirs = float(output.detach().abs().mean())
            print(f"| {name} | {key} | {ours:.7g} | {theirs:.7g} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    table()

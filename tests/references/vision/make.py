"""Write the values of this folder with the vision networks that this project had up to commit 52ebe99.

They are the networks that transformers' have replaced: DINOv2 and DINOv3 (`eg3d_rlhf/models/vit.py`) and the
two encoders of BLIP (`eg3d_rlhf/models/blip.py`). In a checkout of that commit, with transformers installed,
whose DINOv2 gives the names of its own files:

    PYTHONPATH=CHECKOUT python tests/references/vision/make.py

The tests import `weights`, `images` and `prompts`, so that both sides have the same checkpoints and inputs.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
KEPT = 1200  # values of an output, at equal steps
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 4}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
# name -> network, settings as transformers' config.json states them, names of its file, images [N, h, w]
CASES = {
    "dinov2-registers-hub": ("dino", TINY | {"image_size": 20, "num_register_tokens": 2}, "hub", (2, 20, 20)),
    "dinov2-hub": ("dino", TINY | {"image_size": 20}, "hub", (2, 20, 20)),
    # as SAM 3D shows it images of another size than that of the position embeddings
    "dinov2-registers-hub-resized": (
        "images",
        TINY | {"image_size": 20, "num_register_tokens": 2},
        "hub",
        (2, 28, 28),
    ),
    "dinov2-hub-resized": ("images", TINY | {"image_size": 20}, "hub", (2, 12, 12)),
    "dinov2-transformers": ("dino", TINY | {"image_size": 20}, "transformers", (2, 12, 12)),
    "dinov2-registers-transformers": (
        "dino",
        TINY | {"image_size": 20, "num_register_tokens": 2},
        "transformers",
        (2, 28, 28),
    ),
    "dinov3": (
        "dino3",
        TINY | {"intermediate_size": 96, "num_register_tokens": 4},
        "transformers",
        (2, 12, 20),
    ),
    "dinov2-vits14-reg": (
        "dino",
        SMALL | {"image_size": 518, "patch_size": 14, "num_register_tokens": 4},
        "hub",
        (1, 518, 518),
    ),
    "dinov2-small": ("dino", SMALL | {"image_size": 518, "patch_size": 14}, "transformers", (1, 224, 224)),
    "dinov3-vits16": (
        "dino3",
        SMALL | {"patch_size": 16, "intermediate_size": 1536, "num_register_tokens": 4},
        "transformers",
        (1, 224, 320),
    ),
}
BLIP = {
    "image": 32,
    "patch": 16,
    "vision_width": 128,
    "vision_layers": 2,
    "text_width": 192,
    "text_layers": 2,
    "text_hidden": 256,
    "vocabulary": 60,
    "positions": 16,
    "projection": 8,
}
REWARDS = {"blip-imagereward": "ImageReward", "blip-scorer": "Scorer", "blip-fusion": "CrossViewFusion"}
LARGE = "blip-large"  # Reward3D_Scorer.pt's own names and shapes, from distill/params


def normal(name: str, shape) -> torch.Tensor:
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(np.asarray(n, np.float32))


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Return the state dict whose every entry is determined by its name and shape."""
    state = {}
    for name, shape in shapes.items():
        n = normal(name, shape)
        if "token" in name or "pos" in name or "class_embedding" in name:
            n = 0.3 * n
        elif n.ndim >= 2:
            n = n / max(1, np.prod(shape[1:])) ** 0.5
        elif name.endswith(("gamma", "lambda1")):
            n = 0.5 + 0.1 * n
        else:
            n = 1 + 0.1 * n if name.endswith(".weight") else 0.1 * n
        state[name] = n
    return state


def images(name: str, count: int, height: int, width: int) -> torch.Tensor:
    """Return images [N, 3, h, w] of 0..1, the same for the same case."""
    return (0.5 + 0.2 * normal(f"images of {name}", (count, 3, height, width))).clamp(0, 1)


def prompts(count: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token numbers [N, 9] and their mask [N, 9] bool; every other prompt is shorter."""
    tokens = torch.from_numpy(np.random.RandomState(7).randint(0, vocabulary, (count, 9)))
    mask = torch.arange(9) < torch.tensor([9, 6])[torch.arange(count) % 2][:, None]
    return tokens, mask


def thinned(output: torch.Tensor) -> np.ndarray:
    flat = output.detach().flatten()
    return flat[:: -(-len(flat) // KEPT)].numpy()


def run_dino(kind: str, settings: dict, layout: str, side: int, name: str, pixels: torch.Tensor):
    """Return (shapes by name of the file, outputs)."""
    from eg3d_rlhf.models.vit import Dino, Dino3, Dino3Config, DinoConfig, hub_names

    from eg3d_rlhf.models.sam3d import ImageEncoder

    if kind == "dino3":
        network = Dino3(Dino3Config.of(settings))
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        network.load_state_dict(weights(shapes))
        before = network.eval()(pixels)
        return shapes, {"before": before, "after": network.norm(before)}
    registers = settings.get("num_register_tokens", 0)
    settings = {"mlp_ratio": 4, **settings, "antialias": registers > 0}
    if layout == "hub":
        shapes = {n: list(t.shape) for n, t in Dino(DinoConfig.of(settings)).state_dict().items()}
        state = weights(shapes)
        config = DinoConfig.of_state(state, name)
    else:
        import transformers

        kinds = (transformers.Dinov2Config, transformers.Dinov2Model)
        if registers:
            kinds = (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel)
        shapes = {n: list(t.shape) for n, t in kinds[1](kinds[0](**settings)).state_dict().items()}
        state = hub_names(weights(shapes))
        config = DinoConfig.of({**settings, "shown": side})
    if kind == "images":
        outputs = {}
        for key, flag in (("before", True), ("after", False)):
            network = ImageEncoder(config, side, before_norm=flag)
            network.backbone.load_state_dict(state)
            outputs[key] = network.eval()(pixels)
        return shapes, outputs
    network = Dino(config)
    network.load_state_dict(state)
    network.eval()
    return shapes, {"before": network(pixels, normed=False), "after": network(pixels)}


def run_blip(name: str, kind: str, shapes: dict | None, count: int):
    from eg3d_rlhf.rewards.pictures.reward3d import Reward3dNetwork

    from eg3d_rlhf.models.blip import BlipSizes
    from eg3d_rlhf.models.weights import adopt

    if shapes is None:
        shapes = {n: list(t.shape) for n, t in Reward3dNetwork(kind, BlipSizes(**BLIP)).state_dict().items()}
    state = weights(shapes)
    network = adopt(Reward3dNetwork.of(state, name), state, name).eval().requires_grad_(False)
    side = network.blip.visual_encoder.side
    pixels = (images(name, count, side, side) * 2 - 1).requires_grad_()
    seen = network.blip.visual_encoder(pixels)
    features = network.blip(pixels, *prompts(count, network.blip.text_encoder.vocabulary))
    scores = network.head(features)
    (slope,) = torch.autograd.grad(scores.sum(), pixels)
    return shapes, {"seen": seen, "features": features, "scores": scores, "slope": slope}


def main() -> None:
    torch.set_num_threads(1)
    arrays = {}
    recipe = {
        "source": "eg3d_rlhf.models.vit and blip of commit 52ebe99, float32, one CPU thread",
        "cases": {},
    }

    def keep(name: str, content: dict, outputs: dict[str, torch.Tensor]) -> None:
        means = {key: float(output.detach().abs().mean()) for key, output in outputs.items()}
        recipe["cases"][name] = {**content, "mean_abs": means}
        arrays.update({f"{name}/{key}": thinned(output) for key, output in outputs.items()})
        print(name, means, flush=True)

    for name, (kind, settings, layout, size) in CASES.items():
        with torch.no_grad():
            shapes, outputs = run_dino(kind, settings, layout, size[1], name, images(name, *size))
        content = {"kind": kind, "settings": settings, "layout": layout, "images": size, "shapes": shapes}
        keep(name, content, outputs)
    for name, kind in REWARDS.items():
        shapes, outputs = run_blip(name, kind, None, 8)
        keep(name, {"kind": kind, "images": 8, "shapes": shapes}, outputs)
    table = FOLDER.parent / "distill" / "params" / "Reward3D_Scorer.tsv"
    rows = (line.split("\t") for line in table.read_text().splitlines())
    shapes = {name: [int(n) for n in shape.split("x")] for name, shape in rows if "position_ids" not in name}
    shapes, outputs = run_blip(LARGE, "Scorer", shapes, 4)
    keep(LARGE, {"kind": "Scorer", "images": 4, "table": "distill/params/Reward3D_Scorer.tsv"}, outputs)
    (FOLDER / "networks.json").write_text(json.dumps(recipe, separators=(",", ":")) + "\n")
    np.savez_compressed(FOLDER / "networks.npz", **arrays)


if __name__ == "__main__":
    main()

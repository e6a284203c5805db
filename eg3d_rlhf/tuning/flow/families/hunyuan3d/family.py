"""Hunyuan3D-2.1 among the families of flow generators: shapes alone. Its paint stage is a diffusion model of pictures and no part of this.

Shape letters as in denoiser.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.hunyuan3d.autoencoder import BOUND, ShapeDecoder
from eg3d_rlhf.models.hunyuan3d.denoiser import Denoiser
from eg3d_rlhf.models.lora import merge_rounding, merged_state
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, register
from eg3d_rlhf.tuning.flow.families.hunyuan3d import files
from eg3d_rlhf.tuning.flow.stage import FlowPath, FlowStage, Sampling, TokenSet

SHAPE = "shape"  # name of the stage
MAIN = "main"  # name of the only tensor of a condition
STEPS, SCALE = 50, 5.0  # published: points of time, and s of v_null + s (v_cond - v_null)
TARGETS = ("to_q", "to_k", "to_v", "out_proj")
GRID = 128  # points per axis of the grid that a mesh to look at is read from; the published one has 384
PICTURE, BORDER = 512, 0.15  # pixels of a prepared picture, and the share of its side around what it shows
NOTICE = (
    "Hunyuan3D-2.1 is under Tencent's community licence, which grants nothing in the European Union, the United Kingdom and South Korea "
    "and limits large services: read the LICENSE beside its weights."
)


@dataclass(frozen=True)
class ShapeAsset:
    """A finished shape: numbers on a grid, positive inside, read when they are asked for."""

    latent: torch.Tensor  # [T, C]
    decoder: ShapeDecoder

    def volume(self, resolution: int = GRID) -> torch.Tensor:
        """[R, R, R] over x, y, z within +-1.01."""
        return self.decoder.volume(self.latent, resolution)


def call(module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The network's own call; its t is 1 at the data."""
    return module(x_t, t, contexts=dict(cond))


class ShapePipeline:
    """See stage.Pipeline; one stage, so nothing is advanced or encoded."""

    def __init__(self, found: files.ShapeFiles, model: Denoiser, decoder: ShapeDecoder | None, conditions: Conditions | None):
        """Args: decoder and conditions: None where nothing is sampled."""
        self.tokens, self.decoder = conditions, decoder
        if conditions is not None:
            conditions.check("conditions", {MAIN: found.tokens}, "`eg3d-rlhf flow files conditions`, by the DINOv2 of this checkpoint")
        self.stages = [FlowStage(
            name=SHAPE, model=model, latents=TokenSet(tokens=found.model.input_size, channels=found.model.in_channels), call=call,
            data_at_one=True, path=FlowPath(sigma_min=0.0, schedule="uniform"), sampling=sampling(found.shift), lora_targets=TARGETS,
        )]

    def conditions(self, names: Sequence[str], stage: str):
        """{"main": [N, L, E]}."""
        assert self.tokens is not None
        return self.tokens.of(names)

    def no_condition(self, n: int, stage: str):
        """The same of zeros."""
        assert self.tokens is not None
        return self.tokens.null(n)

    def decode(self, x_0: torch.Tensor) -> list[ShapeAsset]:
        """Shapes of latents."""
        if not bool(torch.isfinite(x_0).all()):
            raise ValueError("decode: expected finite latents, got NaN or infinite ones. Use an earlier checkpoint.")
        assert self.decoder is not None
        return [ShapeAsset(one.detach().float(), self.decoder) for one in x_0]


def sampling(shift: float = 1.0) -> Sampling:
    """The published sampler in this package's terms.

    Its times are 0 (noise) to 1 in STEPS points, so one step fewer, moved by t' = s t / (1 + (s - 1) t); here time runs from 1 down and
    is moved by r t / (1 + (r - 1) t), the same with r = 1 / s. Its guidance v_null + s (v - v_null) is w = s - 1 here, at all times.
    """
    return Sampling(steps=STEPS - 1, cfg_strength=SCALE - 1, cfg_interval=(0.0, 1.0), rescale_t=1 / shift)


def load(
    root: Path, conditions: Conditions | None, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ShapePipeline:
    """From its files; without conditions the flow stays without weights."""
    found = files.read_files(root)
    if conditions is None:
        with torch.device("meta"):
            model = Denoiser(found.model)
        return ShapePipeline(found, model, None, None)
    sections = files.read_sections(found.checkpoint)
    model = files.denoiser(found, sections, dtype, device)
    model.recompute = True
    return ShapePipeline(found, model, files.decoder(found, sections, device), conditions)


def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    """Tokens of pictures by the checkpoint's own DINOv2, after its last norm."""
    found = files.read_files(root)
    encoder = files.image_encoder(found, files.read_sections(found.checkpoint), device)
    first = 0 if found.class_token else 1
    tokens = {}
    for name, path in pictures.items():
        picture = F.interpolate(prepared(Image.open(path))[None], size=[found.encoder.image_size] * 2, mode="bilinear", antialias=True)
        with torch.no_grad():
            tokens[name] = {MAIN: encoder(picture.to(device))[0, first:].float().cpu()}
    return Conditions(tokens=tokens, encoder=f"DINOv2 of {found.checkpoint.name}", zero_null=True)


def prepared(image: Image.Image) -> torch.Tensor:
    """What a picture with a transparent background shows, in the middle of a white square -> [3, 512, 512] of 0..1.

    The box of all that is not transparent fills 85 % of the square's side. Deviates: resized by PILLOW (box or bilinear, then bicubic), not
    by OpenCV as published; the last bits differ.
    Raises: ValueError for a picture without transparency, or one that shows nothing.
    """
    if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255:
        raise ValueError(f"image: expected a transparent background (RGBA), got {image.mode} without. Remove the background first.")
    box = image.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 2:
        raise ValueError("image: expected something larger than a pixel that is not transparent, got less. Choose another image.")
    side = max(image.size)
    width, height = box[2] - box[0] - 1, box[3] - box[1] - 1
    scale = int(side * (1 - BORDER)) / max(width, height)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    seen = image.crop((box[0], box[1], box[2] - 1, box[3] - 1)).resize(size, kind)
    square = Image.new("RGBA", (side, side))
    square.paste(seen, ((side - size[0]) // 2, (side - size[1]) // 2))
    pixels = np.asarray(square).astype(np.float32) / 255
    white = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    final = Image.fromarray((white * 255).clip(0, 255).astype(np.uint8)).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(final).astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def show(asset: ShapeAsset, path: Path) -> Path:
    """A mesh, .obj; a shape without a surface, such as an untrained network makes, leaves a text that says so.

    Raises: ValueError for numbers that are not finite.
    """
    volume = asset.volume()
    axis = np.linspace(-BOUND, BOUND, len(volume))
    low, high = float(volume.min()), float(volume.max())
    if not low < 0 < high:
        file = path.with_name(path.name + ".txt")
        file.write_text(f"No surface: all numbers lie between {low:g} and {high:g}; inside is above 0.\n")
        return file
    vertices, faces = extract_mesh(volume.permute(2, 1, 0), (axis, axis, axis), 0.0)
    return save_mesh(path.with_name(path.name + ".obj"), vertices, faces)


def export(root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """config.yaml and the checkpoint, with the tuned network merged, in the file's own types.

    Returns: {"tuned": {stage: {"file", "rounding"}}}; rounding: share of the update that merging into those types loses.
    """
    found = files.read_files(root)
    sections = files.read_sections(found.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    state = merged_state(tuned_model(files.denoiser(found, sections, torch.float32), tuned[SHAPE]))
    rounding = merge_rounding(tuned_model(files.denoiser(found, sections), tuned[SHAPE]))
    files.write_checkpoint(found.checkpoint, out / found.checkpoint.name, state)
    files.copy_config(found.root / files.CONFIG, out / files.CONFIG)
    return {"tuned": {SHAPE: {"file": found.checkpoint.name, "rounding": rounding}}}


def identity(root: Path) -> dict[str, Path]:
    """Its two files."""
    found = files.read_files(root)
    return {files.CONFIG: found.root / files.CONFIG, found.checkpoint.name: found.checkpoint}


register(FlowFamily(
    name="hunyuan3d", layout="config.yaml of Hunyuan3D-2.1's shape and its checkpoint", recognises=files.recognises, stages=(SHAPE,),
    load=load, files=identity, embed=embed, show=show, export=export, notice=NOTICE,
))

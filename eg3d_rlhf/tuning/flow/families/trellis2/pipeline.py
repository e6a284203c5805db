"""TRELLIS.2 as a generator in stages: structure, shape on its voxels, the same again on finer voxels where it is a cascade, texture.

    structure -> occupancy of a grid, pooled to the shape's       latents of the first stage have no normalisation, others are kept
    shape_512 -> (cascade) voxels that its decoder splits into     normalised, as their flows see them
                 children, joined on the finer grid
    last shape -> its voxels, and its latents as what is given to the texture

Stages are tuned one by one: the encoders, which the loop would need, are not read.

Shape letters: N samples, C channels, v voxels of a sample, L tokens of a condition, E their size, W voxels and F triangles of an asset.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.pictures import on_black_first, read_cut_out
from eg3d_rlhf.models.policies import link
from eg3d_rlhf.models.sparse import Batch, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.autoencoders import voxels_of
from eg3d_rlhf.models.trellis2 import Flow, VoxelAsset, VoxelDecoder, assets_of
from eg3d_rlhf.models.vit import MEAN, STD
from eg3d_rlhf.models.weights import in_types_of, write
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, check_stages, register
from eg3d_rlhf.tuning.flow.families.folder import OpenedFolder, check_finite, merged, spare_memory
from eg3d_rlhf.tuning.flow.families.trellis.encoders import pretrained
from eg3d_rlhf.tuning.flow.families.trellis.files import base_state, find_model, find_weights, with_ending
from eg3d_rlhf.tuning.flow.families.trellis2 import files
from eg3d_rlhf.tuning.flow.stage import DenseGrid, FlowPath, FlowStage, LatentKind, SparseVoxels, Voxels
from training.storage import write_atomic

SMALL, LARGER = "512", "1024"  # names of a condition's tensors: edges in pixels of the picture that they are of


class Trellis2Pipeline(OpenedFolder):
    """Implements `Pipeline`; assets are `VoxelAsset`. Decoders are loaded when they are first needed; there are no encoders."""

    def __init__(
        self, file: files.PipelineFile, flows: Mapping[str, nn.Module], conditions: Conditions | None, parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Args: flows by stage name; conditions: None where nothing is sampled; parts: decoders by their names in pipeline.json."""
        super().__init__(conditions, parts, device, file.normalization)
        self.file = file
        self.configs: dict[str, Any] = {name: flows[name].config for name in file.flows}  # FlowConfig of every stage
        self.stages = [self._stage(name, flows[name]) for name in file.flows]
        for name, (mean, _) in file.normalization.items():
            channels = self.configs[name].out_channels
            if len(mean) != channels:
                key = files.NORMALIZATIONS[name]
                raise ValueError(f"pipeline.json: expected {key} of {channels} channels, got {len(mean)}. Correct it.")
        shape, texture = (self.configs[stage.name] for stage in self.stages[-2:])
        if (texture.given, texture.resolution) != (shape.out_channels, shape.resolution):
            got = f"{texture.given} on {texture.resolution}^3"
            raise ValueError(
                f"stage {files.TEXTURE!r}: expected a model that is given {shape.out_channels} channels on {shape.resolution}^3, which the "
                f"shape's has, got {got}. Take the models of one release."
            )

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        config = self.configs[name]
        self.check_tokens(name, config.cond_channels, f"Embed the pictures with {self.file.encoder}.")
        size = dict(channels=config.out_channels, resolution=config.resolution)
        kind: LatentKind = DenseGrid(**size) if name == files.STRUCTURE else SparseVoxels(**size, given=config.given)
        return FlowStage(
            name=name, model=model, latents=kind, path=FlowPath(sigma_min=self.file.sigma_min[name]), sampling=self.file.sampling[name]
        )

    def told(self, stage: str) -> str:
        """The tokens of which picture."""
        fine = stage == files.HIGH or (stage == files.TEXTURE and files.HIGH in self.file.flows)
        return LARGER if fine else SMALL

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """What latents of a stage leave to the next, per sample: voxels [v, 3] int32, and to the texture the shape's latents on them."""
        names = [s.name for s in self.stages]
        if stage not in names[:-1]:
            raise ValueError(f"advance: expected a stage among {', '.join(names[:-1])}, got {stage!r}. Nothing comes after the last stage.")
        after = names[names.index(stage) + 1]
        resolution = self.configs[after].resolution
        check_finite("advance", x_0)
        if isinstance(x_0, torch.Tensor):
            return [self._pooled(latent, resolution) for latent in x_0]
        assert isinstance(x_0, SparseBatch)
        if after == files.TEXTURE:
            return [SparseSample(s.coords, s.feats) for s in x_0.samples()]
        return [self._finer(sample, stage, resolution) for sample in x_0.samples()]

    def _pooled(self, latent: torch.Tensor, resolution: int) -> torch.Tensor:
        """Voxels of a grid of `resolution` with an occupied one of the decoder's grid in them; of an empty structure its likeliest."""
        logits = self.part(files.STRUCTURE_DECODER)(latent[None].to(self.device, torch.float32))  # [1, 1, R, R, R]
        logits = logits.where(logits != logits.amax(), logits.amax().clamp_min(1.0))
        factor, rest = divmod(logits.shape[-1], resolution)
        if rest or not factor:
            got = f"{logits.shape[-1]}. Take models of one release"
            raise ValueError(f"structure: expected a grid of a multiple of {resolution} voxels per side, got {got}.")
        return voxels_of(nn.functional.max_pool3d(logits, factor))[0]

    def _finer(self, sample: SparseSample, stage: str, resolution: int) -> torch.Tensor:
        """Voxels of the finer grid that the shape's decoder puts a voxel of the finest grid into."""
        decoder = self._shape_decoder()
        latent = SparseBatch.join([SparseSample(sample.coords, self.unnormalised(sample.feats.float(), stage))]).to(self.device)
        levels = len(decoder.config.up_block_type)
        fine, _ = decoder(latent, levels=levels)
        side = self.configs[stage].resolution * 2**levels
        places = (fine.coords[:, 1:].double() + 0.5) / side * resolution
        return torch.unique(places.floor().int(), dim=0)

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[VoxelAsset]:
        """Latents of the texture, given those of the shape -> assets."""
        check_finite("decode", x_0)
        if x_0.given is None:
            raise ValueError("decode: expected latents of the texture with those of the shape given, got none given. Sample them together.")
        shape_stage, assets = self.stages[-2].name, list[VoxelAsset]()
        shape_decoder, texture_decoder = self._shape_decoder(), self.part(files.TEXTURE_DECODER)
        resolution = self.configs[files.TEXTURE].resolution * 2 ** len(shape_decoder.config.up_block_type)
        for sample in x_0.samples():  # one by one: millions of voxels each
            shape, texture = (
                SparseBatch.join([SparseSample(sample.coords, self.unnormalised(feats.float(), stage))]).to(self.device)
                for feats, stage in ((sample.given, shape_stage), (sample.feats, files.TEXTURE)) if feats is not None
            )
            surface, children = shape_decoder(shape)
            materials, _ = texture_decoder(texture, children)
            assets += assets_of(surface, materials, resolution, shape_decoder.config.voxel_margin)
        return assets

    def _shape_decoder(self) -> VoxelDecoder:
        decoder: Any = self.part(files.SHAPE_DECODER)
        return decoder


def load_pipeline(
    root: Path, conditions: Conditions | None, *, dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> Trellis2Pipeline:
    """A pipeline from TRELLIS.2's files.

    Args: dtype: of the flows' weights; None keeps the file's. Decoders are float32.
    Raises: FileNotFoundError or ValueError for files that are missing or do not fit; nothing is downloaded.
    """
    file = files.read_pipeline(root)
    stems = {name: find_model(file, name) for name in (*file.flows.values(), *files.DECODERS)}
    flows = {stage: files.load_model(stems[model], dtype=dtype, device=device) for stage, model in file.flows.items()}
    for stage, flow in flows.items():
        if isinstance(flow, files.StructureFlow) != (stage == files.STRUCTURE):
            got = type(flow).__name__
            raise ValueError(f"{file.flows[stage]}: expected a model of stage {stage!r}, got a {got}. Correct pipeline.json.")
    spare_memory(flows.values(), device)
    return Trellis2Pipeline(
        file, flows, conditions, lambda name: files.load_model(stems[name], dtype=torch.float32, device=device), device
    )


# What it is told: DINOv3's tokens of a picture at two sizes. Weights are those on this machine; nothing is downloaded.


class PictureEncoder:
    """DINOv3's tokens before its last norm, normalised without parameters: 1 for the whole, 4 registers, then the patches."""

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        """Args: name: of the weights, or a folder of them. Raises: ValueError where they are not on this machine."""
        self.name = name
        self.model = pretrained("AutoModel", name).eval().to(device)

    @torch.no_grad()
    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """A picture [3, S, S] of 0..1 -> [L, E] float32 on the CPU."""
        mean, std = (torch.tensor(v, device=picture.device).view(3, 1, 1) for v in (MEAN, STD))
        first = next(self.model.parameters())
        tokens = self.model(pixel_values=((picture - mean) / std)[None].to(first), output_hidden_states=True).hidden_states[-1][0].float()
        return F.layer_norm(tokens, tokens.shape[-1:]).cpu()


def embedded(pictures: Mapping[str, Path], encoder: PictureEncoder, sizes: Sequence[str] = (SMALL, LARGER)) -> Conditions:
    """Pictures with transparent backgrounds by name, at every size."""
    tokens, pixels = {}, tuple(map(int, sizes))
    for name, path in pictures.items():
        seen = read_cut_out(path, lambda image: on_black_first(image, pixels))
        tokens[name] = {size: encoder(picture) for size, picture in zip(sizes, seen, strict=True)}
    return Conditions(tokens=tokens, encoder=encoder.name, zero_null=True)


# The surface of an asset: a vertex in every voxel, a face about every crossed edge that four voxels share (dual contouring).


def surface_of(asset: VoxelAsset) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices [W, 3] in the cube of +-0.5 and triangles [F, 3] of their rows. Not differentiable in: crossed.

    A voxel's edge along an axis is the one at its far corner, which it shares with the next voxels along both other axes. A face is cut
    along the diagonal whose ends have the larger product of `split`. Faces lacking a voxel are left out; they have no common side.
    """
    places = asset.coords.long()
    side = asset.resolution + 1
    strides = torch.tensor([side**2, side, 1], device=places.device)
    codes, triangles = (places * strides).sum(1), [torch.zeros(0, 3, dtype=torch.int64, device=places.device)]
    known, rows = codes.sort()
    for axis in range(3):
        b, c = (strides[(axis + k) % 3] for k in (1, 2))
        wanted = codes[asset.crossed[:, axis], None] + torch.stack([torch.zeros_like(b), b, b + c, c])  # [faces, 4] round the edge
        at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        quads = rows[at[(known[at] == wanted).all(1)]]
        first, second, third, fourth = asset.split[quads].unbind(1)
        cut = (first * third >= second * fourth)[:, None]
        halves = [(0, 1, 2), (0, 2, 3)], [(1, 2, 3), (1, 3, 0)]
        triangles += [torch.where(cut, quads[:, early], quads[:, late]) for early, late in zip(*halves, strict=True)]
    return (places + asset.vertices) / asset.resolution - 0.5, torch.cat(triangles)


def recognises(root: Path) -> bool:
    """Whether pipeline.json is TRELLIS.2's."""
    path = root / "pipeline.json"
    try:
        return path.is_file() and json.loads(path.read_text()).get("name") == files.NAME
    except (ValueError, AttributeError):
        return False


def load(
    root: Path, conditions: Conditions | None, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Trellis2Pipeline:
    """To sample and to train: blocks are computed again in the backward pass."""
    pipeline = load_pipeline(root, conditions, dtype=dtype, device=device)
    for stage in pipeline.stages:
        if isinstance(stage.model, Flow):
            stage.model.recompute = True
    return pipeline


def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    """By the DINOv3 that pipeline.json names."""
    return embedded(pictures, PictureEncoder(files.read_pipeline(root).encoder, device))


def show(asset: VoxelAsset, path: Path) -> Path:
    """The surface with its base colours, .ply."""
    vertices, faces = surface_of(asset)
    colours = None if asset.materials is None else (255 * asset.materials[:, :3]).round().byte().cpu().numpy()
    return save_mesh(path.with_name(path.name + ".ply"), vertices.cpu().numpy(), faces.cpu().numpy(), colours)


def export(root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """pipeline.json and all models in a new folder, with tuned flows merged, in the types of the files that they replace.

    Models that nothing changed are linked, or copied where the file system cannot; those that are elsewhere ("owner/repo/path") and not
    read here stay references.
    Returns: {"tuned": {stage: {"file", "rounding"}}, "kept": [...], "elsewhere": [...]}; rounding: share of the update that merging loses.
    """
    file = files.read_pipeline(root)
    check_stages("export", FAMILY, list(tuned))
    models, done, kept, elsewhere = dict(file.models), {}, [], []
    stages = {model: stage for stage, model in file.flows.items() if stage in tuned}
    absent = sorted(set(tuned) - set(stages.values()))
    if absent:
        raise ValueError(f"export: expected stages of {file.kind!r}, {', '.join(file.flows)}, got {', '.join(absent)}. Leave it out.")
    needed = {*file.flows.values(), *files.DECODERS}
    for name in file.models:
        try:
            stem = find_model(file, name)
        except FileNotFoundError:
            if name in needed:
                raise
            elsewhere.append(name)
            continue
        target = out / "ckpts" / stem.name
        weights = find_weights(stem)
        assert weights is not None  # find_model looked
        link(with_ending(stem, ".json"), with_ending(target, ".json"))
        if name in stages:
            state, rounding = merged(partial(files.load_model, stem), tuned[stages[name]])
            write(with_ending(target, ".safetensors"), in_types_of(base_state(weights), state))
            done[stages[name]] = {"file": f"{stem.name}.safetensors", "rounding": rounding}
        else:
            link(weights, with_ending(target, weights.suffix))
            kept.append(name)
        models[name] = f"ckpts/{stem.name}"
    content = {**file.content, "args": {**file.content["args"], "models": models}}
    write_atomic(out / "pipeline.json", (json.dumps(content, indent=4) + "\n").encode())
    return {"tuned": done, "kept": kept, "elsewhere": elsewhere}


FAMILY = register(FlowFamily(
    name="trellis2", layout=f"pipeline.json of {files.NAME}", recognises=recognises, stages=files.STAGES, load=load,
    files=lambda root: files.model_files(files.read_pipeline(root)), embed=embed, show=show, export=export,
))

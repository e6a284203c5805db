"""TRELLIS.2 as a generator in stages: structure, shape on its voxels, the same again on finer voxels where it
is a cascade, texture.

    structure -> occupancy of a grid, pooled to the shape's
    shape_512 -> (cascade) voxels that its decoder splits into children, joined on the finer grid
    last shape -> its voxels, and its latents as what is given to the texture

Latents of the first stage have no normalisation, others are kept normalised, as their flows see them.

The loop runs on structure and shape. Assets are encoded by way of their dual grids (geometry/dual_grid.py).

Shape letters: N samples, C channels, v voxels of a sample, L tokens of a condition, E their size, W voxels
and F triangles of an asset.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.geometry.dual_grid import DualGrid, dual_grid
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.dino import Dino3, read_dino3
from eg3d_rlhf.models.pictures import on_black_first, read_cut_out
from eg3d_rlhf.models.sparse import Batch, Latent, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.autoencoders import grid_of, voxels_of
from eg3d_rlhf.models.trellis2 import Flow, VoxelAsset, VoxelDecoder, VoxelEncoder, assets_of
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions
from eg3d_rlhf.tuning.flow.base.export import Release
from eg3d_rlhf.tuning.flow.base.problem import Problem, ProblemSource
from eg3d_rlhf.tuning.flow.base.ranking import asset_candidate
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, LatentKind, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.families import FlowFamily, Network, open_folder, pairs_in, register, tell
from eg3d_rlhf.tuning.flow.families import trellis2_files as files
from eg3d_rlhf.tuning.flow.families.folder import (
    EncodingFolder,
    check_finite,
    embedding,
    never_empty,
    read_mesh,
    spare_memory,
)
from eg3d_rlhf.tuning.flow.families.learned_evaluators import RewardOfPairs
from eg3d_rlhf.tuning.flow.families.trellis_files import (
    find_model,
    flows_of,
    is_there,
    networks_of,
    release_of,
)

# names of a condition's tensors: edges in pixels of the picture that they are of
SMALL = "512"
LARGER = "1024"


class Trellis2Pipeline(EncodingFolder):
    """Implements `Pipeline`; assets are `VoxelAsset`. Decoders and encoders are loaded when they are first
    needed.
    """

    def __init__(
        self,
        file: files.PipelineFile,
        flows: Mapping[str, nn.Module],
        conditions: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Args: flows by stage name, without the texture's where the shape is all that is wanted; conditions:
        None where nothing is sampled; parts: decoders and encoders by their names in pipeline.json.
        """
        super().__init__(conditions, parts, device, file.normalization)
        self.file = file
        self._last: tuple[Any, int, tuple[DualGrid, torch.Tensor | None]] | None = None
        # FlowConfig of every stage
        self.configs: dict[str, Any] = {name: flows[name].config for name in file.flows if name in flows}
        if conditions is not None:
            conditions.check_source("conditions", source_of(file), "`eg3d-rlhf flow new`")
        # the stage whose latents are the asset's shape
        self.shape = [name for name in self.configs if name in (files.LOW, files.HIGH)][-1]
        self.stages = [self._stage(name, flows[name]) for name in self.configs]
        for name, (mean, _) in file.normalization.items():
            channels = self.configs[name].out_channels if name in self.configs else len(mean)
            if len(mean) != channels:
                key = files.NORMALIZATIONS[name]
                raise ValueError(
                    f"pipeline.json: expected {key} of {channels} channels, got {len(mean)}. Correct it."
                )
        given = (
            self.configs[files.TEXTURE].given
            if files.TEXTURE in self.configs
            else self.configs[self.shape].out_channels
        )
        if given != self.configs[self.shape].out_channels:
            raise ValueError(
                f"stage {files.TEXTURE!r}: expected a model that is given"
                f" {self.configs[self.shape].out_channels} channels, which the shape's has, got {given}. Take"
                " the models of one release."
            )

    def cells(self, stage: str) -> int:
        """Along an axis of a stage's grid, the largest in a cascade that is asked for more. A texture's file
        may say another number.
        """
        name = self.shape if stage == files.TEXTURE else stage
        wider = WIDER if name == files.HIGH and self.file.kind == "1536_cascade" else 1
        return int(self.configs[name].resolution * wider)

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        config = self.configs[name]
        on_voxels = name != files.STRUCTURE
        self.check_tokens(name, config.cond_channels, f"Embed the pictures with {self.file.encoder}.")
        size = dict(channels=config.out_channels, resolution=self.cells(name))
        kind: LatentKind = SparseVoxels(**size, given=config.given) if on_voxels else DenseGrid(**size)
        path = FlowPath(
            sigma_min=self.file.sigma_min[name], schedule="uniform" if on_voxels else "logit-normal"
        )
        return FlowStage(name=name, model=model, latents=kind, path=path, sampling=self.file.sampling[name])

    def told(self, stage: str) -> str:
        """The tokens of which picture."""
        fine = stage == files.HIGH or (stage == files.TEXTURE and files.HIGH in self.file.flows)
        return LARGER if fine else SMALL

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """What latents of a stage leave to the next, per sample: voxels [v, 3] int32, and to the texture the
        shape's latents on them.
        """
        names = [s.name for s in self.stages]
        if stage not in names[:-1]:
            raise ValueError(
                f"advance: expected a stage among {', '.join(names[:-1])}, got {stage!r}. Nothing comes after"
                " the last stage."
            )
        after = names[names.index(stage) + 1]
        check_finite("advance", x_0)
        if isinstance(x_0, torch.Tensor):
            return [self._pooled(latent, self.cells(after)) for latent in x_0]
        assert isinstance(x_0, SparseBatch)
        if after == files.TEXTURE:
            return [SparseSample(s.coords, s.feats, cells=s.cells) for s in x_0.samples()]
        return [self._finer(sample, stage) for sample in x_0.samples()]

    def _pooled(self, latent: torch.Tensor, resolution: int) -> torch.Tensor:
        """Voxels of a grid of `resolution` with an occupied one of the decoder's grid in them."""
        # [1, 1, R, R, R]
        logits = self.part(files.STRUCTURE_DECODER)(latent[None].to(self.device, torch.float32))
        logits = never_empty(logits, f"stage {files.STRUCTURE!r}")
        factor, rest = divmod(logits.shape[-1], resolution)
        if rest or not factor:
            got = f"{logits.shape[-1]}. Take models of one release"
            raise ValueError(
                f"structure: expected a grid of a multiple of {resolution} voxels per side, got {got}."
            )
        return voxels_of(nn.functional.max_pool3d(logits, factor))[0]

    def _finer(self, sample: SparseSample, stage: str) -> SparseSample:
        """Voxels of the finer grid that the shape's decoder puts a voxel of the finest grid into."""
        decoder = self._decoder()
        fine, _ = decoder(
            self._unnormalised(sample.coords, sample.feats, stage), levels=len(decoder.config.up_block_type)
        )
        side = self.configs[stage].resolution * decoder.config.finer
        finer = decoder.config.finer
        coords, cells = finer_voxels(
            fine.coords[:, 1:],
            side,
            self.cells(files.HIGH) * finer,
            self.configs[files.HIGH].resolution * finer,
            finer,
        )
        return SparseSample(coords, coords[:, :1].float(), cells=cells)  # features that nobody reads

    def _unnormalised(self, coords: torch.Tensor, feats: torch.Tensor, stage: str) -> SparseBatch:
        """One sample, as decoders read it."""
        return SparseBatch.join([SparseSample(coords, self.unnormalised(feats.float(), stage))]).to(
            self.device
        )

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[VoxelAsset]:
        """Latents of the texture, given those of the shape, or of a shape alone -> assets."""
        check_finite("decode", x_0)
        coloured = files.TEXTURE in self.configs
        assets = list[VoxelAsset]()
        decoder = self._decoder()
        if coloured and x_0.given is None:
            raise ValueError(
                "decode: expected latents of the texture with those of the shape given, got none given."
                " Sample them together."
            )
        for sample in x_0.samples():  # one by one: millions of voxels each
            resolution = (sample.cells or self.cells(self.shape)) * decoder.config.finer
            latent = sample.given if sample.given is not None else sample.feats
            surface, children = decoder(self._unnormalised(sample.coords, latent, self.shape))
            materials = None
            if coloured:
                texture = self._unnormalised(sample.coords, sample.feats, files.TEXTURE)
                materials, _ = self.part(files.TEXTURE_DECODER)(texture, children)
            assets += assets_of(surface, materials, resolution, decoder.config.voxel_margin)
        return assets

    def _decoder(self) -> VoxelDecoder:
        return self.part(files.SHAPE_DECODER)

    def encodes(self, asset: VoxelAsset | Mesh) -> Sequence[str]:
        """All stages; of what has no materials those of the shape."""
        coloured = isinstance(asset, VoxelAsset) and asset.materials is not None
        return [stage.name for stage in self.stages if coloured or stage.name != files.TEXTURE]

    @torch.no_grad()
    def encode_stage(self, asset: VoxelAsset | Mesh, stage: str) -> Latent:
        """From the dual grid: of a mesh, which is brought into the cube first, or what an asset has of its
        own resolution.

        Raises: FileNotFoundError where an encoder is not there; ValueError for what has no surface.
        """
        if stage == files.STRUCTURE:
            network = self.part(files.STRUCTURE_ENCODER)
            side = self.configs[stage].resolution * 2 ** (len(network.config.channels) - 1)
            resolution = (
                asset.resolution if isinstance(asset, VoxelAsset) else side * self._encoder().config.coarser
            )
            voxels = torch.unique(self._grid(asset, resolution)[0].coords.long() * side // resolution, dim=0)
            return network(grid_of([voxels], side).to(self.device))[0][0].cpu()
        network = self._encoder()
        of_asset = stage in (self.shape, files.TEXTURE) and isinstance(asset, VoxelAsset)
        name = self.shape if stage == files.TEXTURE else stage
        if of_asset:
            resolution = asset.resolution  # type: ignore[union-attr]
        else:
            resolution = self.configs[name].resolution * network.config.coarser
        grid, materials = self._grid(asset, resolution)
        given = encoded_shape(grid.coords, grid.vertices, grid.crossed).to(self.device)
        mean, _ = network(given)
        cells = (
            resolution // network.config.coarser
            if self.file.kind == "1536_cascade" and name == files.HIGH
            else None
        )
        feats = self.normalised(mean.feats, name).cpu()
        if stage != files.TEXTURE:
            return SparseSample(mean.coords[:, 1:].cpu(), feats, cells=cells)
        assert materials is not None
        colours, _ = self.part(files.TEXTURE_ENCODER)(
            given.with_feats(2 * materials.clamp(0, 1).to(self.device) - 1)
        )
        return SparseSample(
            mean.coords[:, 1:].cpu(), self.normalised(colours.feats, stage).cpu(), feats, cells
        )

    def _encoder(self) -> VoxelEncoder:
        return self.part(files.SHAPE_ENCODER)

    def _grid(self, asset: VoxelAsset | Mesh, resolution: int) -> tuple[DualGrid, torch.Tensor | None]:
        """And the materials on it, where it is the asset's own. The last one is kept: several stages ask for
        it.
        """
        known = self._last
        if known is None or known[0] is not asset or known[1] != resolution:
            if not isinstance(asset, VoxelAsset):
                made: Any = dual_grid(*centred(asset), resolution), None
            else:
                made = (
                    dual_grid_of(asset)
                    if asset.resolution == resolution
                    else (dual_grid_at(asset, resolution), None)
                )
            self._last = known = asset, resolution, made
        return known[2]


# 1536 of 1024; by how much the resolution is lowered while there are so many voxels
WIDER = 1.5
SHRINK = 128
TOKENS = 49152


def finer_voxels(
    coords: torch.Tensor, side: int, asked: int, least: int, finer: int, most: int = TOKENS
) -> tuple[torch.Tensor, int]:
    """The cascade: voxels [W, 3] of a grid of `side` -> those of the latents of an asset, sorted, and their
    cells along an axis.

    Args: asked: resolution of the asset, lowered while there are `most` voxels or more, and it is not
        `least`; finer: of a voxel's side.
    """
    while True:
        cells = asked // finer
        voxels = torch.unique(((coords.double() + 0.5) / side * cells).floor().int(), dim=0)
        if len(voxels) < most or asked <= least:
            return voxels, cells
        asked -= SHRINK


def load_pipeline(
    root: Path,
    conditions: Conditions | None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    sampled: bool = True,
    coloured: bool = True,
) -> Trellis2Pipeline:
    """A pipeline from TRELLIS.2's files.

    Args:
        dtype: of the flows' weights; None keeps the file's. Decoders and encoders are float32.
        sampled: False leaves the flows without weights: to encode and decode alone; coloured: False leaves
            the texture's out.
    Raises: FileNotFoundError or ValueError for files that are missing or do not fit; nothing is downloaded.
    """
    file = files.read_pipeline(root)
    named = {stage: model for stage, model in file.flows.items() if coloured or stage != files.TEXTURE}
    stems = {name: find_model(file, name) for name in (*named.values(), *files.DECODERS)}
    of_stages = {stage: stems[model] for stage, model in named.items()}
    flows = flows_of(of_stages, dtype, device, sampled, files.load_model, files.ARCHITECTURES)
    for stage, flow in flows.items():
        if isinstance(flow, files.StructureFlow) != (stage == files.STRUCTURE):
            got = type(flow).__name__
            raise ValueError(
                f"{file.flows[stage]}: expected a model of stage {stage!r}, got a {got}. Correct"
                " pipeline.json."
            )
    spare_memory(flows.values(), device)
    return Trellis2Pipeline(
        file,
        flows,
        conditions,
        lambda name: files.load_model(find_model(file, name), dtype=torch.float32, device=device),
        device,
    )


# What it is told: DINOv3's tokens of a picture at two sizes. Weights are those on this machine; nothing is
# downloaded.


def source_of(file: files.PipelineFile) -> str:
    """What computes conditions, for their file."""
    return f"{file.encoder} before its last norm, pictures over black before they are resized"


@torch.no_grad()
def picture_tokens(encoder: Dino3, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, h, w] of 0..1 -> tokens [N, L, E] on the CPU, before the last norm, normalised without
    parameters.
    """
    tokens = encoder(pictures.to(encoder.norm.weight.device))
    return F.layer_norm(tokens, tokens.shape[-1:]).cpu()


def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    """Pictures with transparent backgrounds by name, at both sizes,
    by the DINOv3 that pipeline.json names.
    """
    file = files.read_pipeline(root)
    tokens = {}
    encoder = read_dino3(file.encoder, device)
    sizes = (SMALL, LARGER)
    for name, path in embedding(pictures.items(), "picture"):
        seen = read_cut_out(path, lambda image: on_black_first(image, tuple(map(int, sizes))))
        tokens[name] = {
            size: picture_tokens(encoder, picture[None])[0] for size, picture in zip(sizes, seen, strict=True)
        }
    return Conditions(tokens=tokens, encoder=source_of(file), zero_null=True)


# The surface of an asset: a vertex in every voxel, a face about every crossed edge that four voxels share
# (dual contouring).


def faces_of(asset: VoxelAsset) -> list[torch.Tensor]:
    """The rows [F, 4] of the voxels about each crossed edge, in the original's order, along axis 1, along 2
    and along 3.

    A voxel's edge along an axis is the one at its far corner, which it shares with the next voxels along both
    other axes. Faces lacking a voxel are left out. Their winding follows the axis, not the inside.
    """
    places = asset.coords.long()
    side = asset.resolution + 1
    strides = torch.tensor([side**2, side, 1], device=places.device)
    codes = (places * strides).sum(1)
    quads = list[torch.Tensor]()
    known, rows = codes.sort()
    for axis in range(3):
        b, c = (strides[(axis + k) % 3] for k in (1, 2))
        # [faces, 4] round the edge
        wanted = codes[asset.crossed[:, axis], None] + torch.stack([torch.zeros_like(b), c, b + c, b])
        at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        quads.append(rows[at[(known[at] == wanted).all(1)]])
    return quads


def surface_of(asset: VoxelAsset) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices [W, 3] in the cube of +-0.5 and triangles [F, 3] of their rows, z up. Not differentiable in:
    crossed.

    A face is cut along the diagonal whose ends have the larger product of `split`.
    """
    quads = torch.cat(faces_of(asset))
    first, second, third, fourth = asset.split[quads].unbind(1)
    cut = (first * third > second * fourth)[:, None]
    halves = [(0, 1, 2), (0, 2, 3)], [(0, 1, 3), (3, 1, 2)]
    triangles = [
        torch.where(cut, quads[:, early], quads[:, late]) for early, late in zip(*halves, strict=True)
    ]
    return asset.means, torch.stack(triangles, 1).flatten(0, 1)


def dual_grid_of(asset: VoxelAsset) -> tuple[DualGrid, torch.Tensor | None]:
    """The voxels of an asset that lie about its faces, sorted, and the materials on them; of one without a
    face all.
    """
    quads = faces_of(asset)
    crossed = torch.zeros_like(asset.crossed)
    for axis, about in enumerate(quads):
        crossed[about[:, 0], axis] = True
    kept = torch.unique(torch.cat(quads))
    if not len(kept):
        kept = torch.arange(len(asset.coords), device=asset.coords.device)
        crossed = asset.crossed
    places = asset.coords[kept].long()
    kept = kept[((places[:, 0] << 42) + (places[:, 1] << 21) + places[:, 2]).argsort()]
    grid = DualGrid(asset.coords[kept].cpu(), asset.vertices[kept].clamp(0, 1).cpu(), crossed[kept].cpu())
    return grid, None if asset.materials is None else asset.materials[kept]


def dual_grid_at(asset: VoxelAsset, resolution: int) -> DualGrid:
    """By way of the asset's surface; of one that crosses no line, such as an untrained network makes, the
    voxels alone.
    """
    vertices, faces = surface_of(asset)
    try:
        return dual_grid(vertices, faces, resolution)
    except ValueError:
        coords = torch.unique(asset.coords.cpu().long() * resolution // asset.resolution, dim=0).int()
        return DualGrid(coords, torch.full(coords.shape, 0.5), torch.zeros(coords.shape, dtype=torch.bool))


def encoded_shape(coords: torch.Tensor, vertices: torch.Tensor, crossed: torch.Tensor) -> SparseBatch:
    """What the shape's encoder reads, [W, 6]."""
    return SparseBatch.join(
        [SparseSample(coords, torch.cat([vertices - 0.5, crossed.to(vertices) - 0.5], 1))]
    )


LONGEST = 0.99999  # side of a mesh that is encoded


def centred(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices and faces of a mesh within +-0.5."""
    vertices = mesh.vertices.double()
    low = vertices.amin(0)
    high = vertices.amax(0)
    if not float((high - low).max()) > 0:
        raise ValueError("expected a mesh with a size, got a point. Export the surface as triangles.")
    return (vertices - (low + high) / 2) * (LONGEST / (high - low).max()), mesh.faces


def read_asset(path: Path) -> Mesh:
    """A triangle mesh of one's own, z up; of glTF, which has y up, it is turned."""
    mesh = read_mesh(path)
    if path.suffix.lower() not in (".glb", ".gltf"):
        return mesh
    x, y, z = mesh.vertices.unbind(1)
    return Mesh(torch.stack([x, -z, y], 1), mesh.faces)


def recognises(root: Path) -> bool:
    """Whether pipeline.json is TRELLIS.2's."""
    path = root / "pipeline.json"
    try:
        return path.is_file() and json.loads(path.read_text()).get("name") == files.NAME
    except (ValueError, AttributeError):
        return False


def networks(root: Path) -> list[Network]:
    """All that are named; the encoders may be missing."""
    file = files.read_pipeline(root)
    models = (*file.flows.values(), *files.DECODERS, *files.ENCODERS)
    return networks_of(
        file,
        models,
        files.LOST,
        released=files.RELEASED,
        architectures=files.ARCHITECTURES,
        prepare=files.prepared,
    )


def load(
    root: Path,
    conditions: Conditions | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    coloured: bool = True,
) -> Trellis2Pipeline:
    """To sample and to train: blocks are computed again in the backward pass."""
    pipeline = load_pipeline(root, conditions, dtype=dtype, device=device, coloured=coloured)
    for stage in pipeline.stages:
        if isinstance(stage.model, Flow):
            stage.model.recompute = True
    return pipeline


def open_problem(source: ProblemSource, device: str | torch.device) -> Problem:
    """Without pairs of the texture its flow is left out, and the loop can run: colours tell the stages before
    them nothing.
    """
    folders = pairs_in(FAMILY, source)
    coloured = files.TEXTURE in folders
    file = files.read_pipeline(Path(source.pipeline))
    lost = (
        []
        if coloured
        else [name for name in (files.STRUCTURE_ENCODER, files.SHAPE_ENCODER) if not is_there(file, name)]
    )
    if lost:
        tell(f"{', '.join(lost)} not found: stages are tuned one by one, without the loop.")
    judge = None if coloured or lost else RewardOfPairs
    return open_folder(replace(FAMILY, load=partial(load, coloured=coloured), judge=judge), source, device)


def show(asset: VoxelAsset, path: Path) -> Path:
    """The surface with its base colours, .ply."""
    vertices, faces = surface_of(asset)
    colours = None if asset.materials is None else (255 * asset.colours).round().byte().cpu().numpy()
    return save_mesh(path.with_name(path.name + ".ply"), vertices.cpu().numpy(), faces.cpu().numpy(), colours)


def release(root: Path, stages: Sequence[str]) -> Release:
    """See `release_of`; both pipelines' files, and the encoders."""
    file = files.read_pipeline(root)
    absent = sorted(set(stages) - set(file.flows))
    if absent:
        raise ValueError(
            f"export: expected stages of {file.kind!r}, {', '.join(file.flows)}, got {', '.join(absent)}."
            " Leave it out."
        )
    return release_of(
        file,
        stages,
        file.flows,
        files.load_model,
        {*file.flows.values(), *files.DECODERS},
        (files.TEXTURING,),
    )


FAMILY = register(
    FlowFamily(
        name="trellis2",
        layout=f"pipeline.json of {files.NAME}",
        recognises=recognises,
        stages=files.STAGES,
        load=load,
        files=lambda root: files.model_files(files.read_pipeline(root)),
        judge=RewardOfPairs,
        open=open_problem,
        embed=embed,
        show=show,
        release=release,
        encoder=partial(load_pipeline, conditions=None, sampled=False),
        candidate=asset_candidate(read_asset),
        told=lambda pipeline, stage: [
            5 + (int(pipeline.told(stage)) // 16) ** 2,
            pipeline.configs[stage].cond_channels,
        ],
        networks=networks,
        address="https://huggingface.co/microsoft/TRELLIS.2-4B",
        up="z",
        version="TRELLIS.2-4B, of images",
    )
)

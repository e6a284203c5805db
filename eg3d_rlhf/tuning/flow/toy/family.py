"""The bundled toy as a family of flow generators. The toy is chosen by its name, without a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Release, Stored
from eg3d_rlhf.tuning.flow.families import BUNDLED, register
from eg3d_rlhf.tuning.flow.toy.names import PROMPTS, STAGES, STRUCTURE, VOXELS

if TYPE_CHECKING:  # `--help` imports this module, and would be slow with torch
    import torch
    from torch import nn

    from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
    from eg3d_rlhf.tuning.flow.toy.toy_pipeline import ToyAsset, ToyPipeline


class Toy(FlowFamily):
    """Family of the bundled toy, whose files belong to this package."""

    name = "toy"
    layout = "the bundled toy, called by that name"
    stages = STAGES
    version = "the bundled toy"
    loaded_by = 'toy.bundled.load_network(name, Path("{out}"))'
    up = "z"
    batch = 32
    bundled = True
    prompts = PROMPTS
    common, options = BUNDLED["toy"]

    def recognises(self, root: Path) -> bool:
        return False  # the toy is chosen by its name, never by a folder

    def files(self, root: Path, stages: Sequence[str] | None = None) -> dict[str, Path]:
        from eg3d_rlhf.tuning.flow.toy.bundled import NETWORKS, path_of

        return {name: path_of(name) for name in NETWORKS}

    def load(
        self,
        root: Path,
        conditioning: Conditioning | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> ToyPipeline:
        """Read the networks of both stages in float32. Arguments other than `device` have no effect."""
        from eg3d_rlhf.tuning.flow.toy.bundled import load_network
        from eg3d_rlhf.tuning.flow.toy.toy_pipeline import ToyPipeline

        return ToyPipeline(load_network(STRUCTURE), load_network(VOXELS), device)

    def condition(self, pipeline: ToyPipeline, stage: str) -> list[int]:
        return list(pipeline.null_conditioning(1, stage).shape[1:])

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem

        return toy_problem(source.seed, device, labelled=source.labelled)

    def embed_texts(self, root: Path, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Make the conditioning tokens of toy prompts, such as "red ball"; no encoder is needed."""
        from torch import nn

        from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
        from eg3d_rlhf.tuning.flow.toy.toy_pipeline import ToyPipeline

        tokens = ToyPipeline(nn.Identity(), nn.Identity()).conditioning(texts, STRUCTURE)
        return Conditioning(tokens=dict(zip(texts, tokens, strict=True)), encoder="toy", zero_null=True)

    def show(self, asset: ToyAsset, path: Path) -> Path:
        """Write voxels as coloured cubes to a .ply file, without the faces between two cubes.

        z is up, and the grid is one unit wide.
        """
        import torch
        import torch.nn.functional as F

        from eg3d_rlhf.geometry.mesh_export import save_mesh
        from eg3d_rlhf.tuning.flow.toy.toy_pipeline import R

        # An empty border, R + 2 cells per axis, so that voxels at the edge of the grid get outer faces.
        padded_occupancy = F.pad(asset.occupancy, (1, 1) * 3)
        # Corners of a face, counter-clockwise in the plane of the two axes that follow `axis` cyclically.
        face_corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]])
        corners_by_side = []
        colours_by_side = []
        for axis in range(3):
            for side in (0, 1):
                # Indices of the voxels whose neighbour in this direction is empty, [faces, 3]. roll shifts
                # the neighbours onto the voxels, and the slices remove the border.
                face_voxels = (
                    asset.occupancy & ~padded_occupancy.roll(1 - 2 * side, axis)[1:-1, 1:-1, 1:-1]
                ).nonzero()
                face_offsets = torch.full((4, 3), side)
                # The order of the corners determines the direction of a face, which has to be outwards on
                # both sides.
                face_offsets[:, [(axis + 1) % 3, (axis + 2) % 3]] = (
                    face_corners if side else face_corners.flip(0)
                )
                corners_by_side.append((face_voxels[:, None] + face_offsets).flatten(0, 1))  # [faces * 4, 3]
                colours_by_side.append(asset.colours[face_voxels.unbind(1)].repeat_interleave(4, 0))
        vertices = (torch.cat(corners_by_side).double() / R - 0.5).numpy()
        square_faces = torch.arange(len(vertices)).view(-1, 4)
        # two triangles per square
        faces = torch.cat([square_faces[:, [0, 1, 2]], square_faces[:, [0, 2, 3]]]).numpy()
        return save_mesh(
            path.with_name(path.name + ".ply"),
            vertices,
            faces,
            (255 * torch.cat(colours_by_side)).round().byte().numpy(),
        )

    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """Describe the files of an exported model: tuned networks of `stages`, original files otherwise."""
        import torch

        from eg3d_rlhf.tuning.flow.toy.bundled import KIND, load_network, path_of, write_network
        from training.storage import read_tensors

        def stored(stage_name: str) -> Stored:
            def load(dtype: torch.dtype | None) -> nn.Module:
                return load_network(stage_name).to(dtype or torch.float16)  # the files hold float16

            meta = read_tensors(path_of(stage_name), KIND)[1]
            return Stored(
                file=path_of(stage_name).name,
                load=load,
                write=lambda path, state: write_network(path, stage_name, state, meta),
            )

        other_files = {path_of(name).name: path_of(name) for name in STAGES if name not in stages}
        return Release(files=other_files, networks={name: stored(name) for name in stages})


register(Toy())

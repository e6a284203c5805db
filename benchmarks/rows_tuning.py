"""Rows: score distillation's test problem with and without a reward on meshes, four orthographic views of
voxels, and updates of flows.

Letters: A assets, N voxels per edge.
"""

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rows import Case, Outcome, Row, Target
from eg3d_rlhf.generators.assets.grids import Voxels
from eg3d_rlhf.generators.assets.views import DISTANCE, FourViews, evenly_around, nearness
from eg3d_rlhf.models.lora import add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig, StructureFlow, StructureFlowConfig
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards.meshes.model import EncoderOptions, RewardCS
from eg3d_rlhf.rewards.meshes.patches import MeshReader, PatchOptions
from eg3d_rlhf.rewards.meshes.surfaces import cube
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings, LoopConfig, SceneConfig
from eg3d_rlhf.tuning.distill.guidance.geometry import MeshGeometry
from eg3d_rlhf.tuning.distill.scene_boxes import bundled_scene
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, SparseVoxels
from eg3d_rlhf.tuning.flow.families.folder import return_freed_memory
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import Updates
from eg3d_rlhf.tuning.flow.training.reference import AdapterOff
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.workspace.estimate import pairs_of
from training.distributed import SINGLE

ASSETS = 32
VIEWS = 4
# steps at which the mesh reward is timed; a weight that moves nothing and is not left out
_FROM = 40
_STEPS = 20
_NO_WEIGHT = 1e-25
# of TRELLIS's flows with random weights: channels of a latent; of CLIP's text; channels per head
CHANNELS = 8
TOKENS = 77
EMBEDDING = 768
HEAD = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the measured flow; the defaults are those of TRELLIS text-large."""

    stage: str
    voxels: int = 8000  # of each latent of the second stage
    blocks: int = 24
    width: int = 1024  # a multiple of HEAD
    grid: int = 0  # points per axis of the latent; 0: 16 of the first stage, 64 of the second
    device: str = "cpu"

    @property
    def points(self) -> int:
        return self.grid or (16 if self.stage == "structure" else 64)


class RandomConditions:
    """As much of a pipeline as an update asks for: tokens by name."""

    def conditions(self, names, stage: str) -> torch.Tensor:
        return torch.stack(
            [
                torch.randn(TOKENS, EMBEDDING, generator=torch.Generator().manual_seed(i))
                for i in range(len(names))
            ]
        )


def build_stage(size: Size) -> FlowStage:
    """The flow with random weights, on its device."""
    common: dict[str, Any] = dict(
        resolution=size.points,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        model_channels=size.width,
        cond_channels=EMBEDDING,
        num_blocks=size.blocks,
        num_head_channels=HEAD,
        qk_rms_norm=True,
        use_checkpoint=True,
    )
    with torch.device(size.device):
        if size.stage == "structure":
            model: torch.nn.Module = StructureFlow(StructureFlowConfig(patch_size=1, **common))
        else:
            model = LatentFlow(LatentFlowConfig(patch_size=2, io_block_channels=(size.width // 8,), **common))
    kind = SparseVoxels if size.stage == "latent" else DenseGrid
    return FlowStage(name=size.stage, model=model, latents=kind(channels=CHANNELS, resolution=size.points))


def _rays(n: int, view: int) -> tuple[torch.Tensor, torch.Tensor]:
    """World points [N, N, N, 3] (row, column, step from the camera) of the rays of one view, and their depths
    [N].
    """
    axis = torch.linspace(-0.5, 0.5, n)
    up, right, near = torch.meshgrid(-axis, axis, -axis, indexing="ij")
    x, z = ((right, near), (near, -right), (-right, -near), (-near, right))[view]
    return torch.stack([x, up, z], dim=-1), DISTANCE + axis


def _looped(voxels: Voxels) -> torch.Tensor:
    """The straightforward renderer, [4 A, 4, N, N]: asset by asset and view by view, trilinear samples all
    along every ray, running products of what is let through.
    """
    n = voxels.resolution
    images = []
    for asset in range(len(voxels)):
        volume = torch.cat([voxels.raw[asset, None], voxels.paint[asset]])[None]  # [1, 4, N, N, N]
        for view in range(VIEWS):
            points, depths = _rays(n, view)
            # [4, N, N, N]
            read = F.grid_sample(
                volume, 2 * points[None], mode="bilinear", padding_mode="border", align_corners=True
            )[0]
            alpha = 1 - torch.exp(-F.softplus(read[0] - 1) * voxels.pitch)
            through = torch.cumprod(
                torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha[..., :-1]], dim=-1), dim=-1
            )
            inverse = nearness(depths, DISTANCE - 0.5, DISTANCE + 0.5).expand_as(alpha)
            values = torch.cat([torch.sigmoid(read[1:]), inverse[None]])
            images.append((alpha * through * values).sum(dim=-1))
    return torch.stack(images)


def four_views(device: str, tiny: bool, n: int) -> Case:
    """Compare renders and, under a random cotangent, gradients of shape and paint."""
    rng = torch.Generator().manual_seed(0)
    voxels = Voxels(2 if tiny else ASSETS, 4 if tiny else n)
    with torch.no_grad():
        for parameter in voxels.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) - 0.5)
    voxels.to(device)
    views = evenly_around(len(voxels), VIEWS, DISTANCE)
    background = torch.zeros(3, device=device)
    cotangent = torch.randn(VIEWS * len(voxels), 4, voxels.resolution, voxels.resolution, generator=rng).to(
        device
    )
    renderer = FourViews(voxels.resolution)

    def run(render) -> Outcome:
        images = render()
        shape, paint = torch.autograd.grad(images, [voxels.shape, voxels.paint], cotangent)
        return Outcome({"images": images.detach()}, {"shape": shape, "paint": paint})

    return Case(
        fast=lambda: run(lambda: renderer.render(voxels, views, background).images),
        reference=lambda: run(lambda: _looped(voxels)),
    )


def mesh_reward_steps(device: str, tiny: bool) -> Case:
    """Twenty steps of the default problem in the midst of a run, with one rebuild of the meshes: plain
    distillation with RewardCS (fast) and without (reference). Its weight is too small to move an asset, so
    both end alike, and the ratio is 1 / overhead.
    """
    torch.manual_seed(0)
    reward = RewardCS(
        PatchOptions(patches=32, faces=16), EncoderOptions(faces=16, width=48, depth=2), resolution=15
    )
    reward.to(device).eval().requires_grad_(False)
    settings = DistillSettings(
        prompts=tuple(prompt.text for prompt in box_prompts.PROMPTS),
        arms=("sds",),
        scene=SceneConfig(assets=box_prompts.SEEDS),
        loop=LoopConfig(batch=4) if tiny else LoopConfig(),
        guidance={"geometry_weight": _NO_WEIGHT, "geometry_weight_from": _NO_WEIGHT},
    )
    scene = replace(
        bundled_scene(settings, torch.device(device)),
        geometry=lambda: MeshGeometry(MeshReader(cube(reward.resolution).to(device), reward.patches), reward),
    )
    works = {arm: scene.distillation(settings, Arm.parse(arm), 0) for arm in ("sds", "sds+geometry")}
    states = {}
    for arm, work in works.items():
        for step in range(_FROM - 20, _FROM):
            work.step(step)
        states[arm] = copy.deepcopy(work.state())

    def prepare() -> None:
        for arm, work in works.items():
            work.load(*copy.deepcopy(states[arm]))

    def run(arm: str) -> Outcome:
        for step in range(_FROM, _FROM + _STEPS):
            works[arm].step(step)
        return Outcome({name: value.detach().clone() for name, value in works[arm].asset.named_parameters()})

    return Case(fast=lambda: run("sds+geometry"), reference=lambda: run("sds"), prepare=prepare)


ROWS = [
    *(
        Row(
            name=f"voxels {n}^3, {ASSETS} assets x {VIEWS} views, forward + backward",
            size="bundled",
            seconds=seconds,
            make=functools.partial(four_views, n=n),
            target=Target(at_least=3, aim=6),
        )
        for n, seconds in ((16, 0.4), (24, 1.2))
    ),
    Row(
        name="twenty steps of distillation, with RewardCS against without",
        size="bundled",
        seconds=1,
        make=mesh_reward_steps,
        target=Target(at_least=1 / 1.5, aim=0.8),
    ),
]


# One DPO update of TRELLIS's flows on a pair, of the width and tokens of its text-large models and a twelfth
# of their depth.

BLOCKS = 2  # of 24


def dpo_update(device: str, tiny: bool, stage_name: str) -> Case:
    """Errors of a pair by policy and reference, and gradients of the adapters. The reference is what
    published training code does: both networks one after the other, every block computed again in the
    backward pass, attention and products by torch.
    """
    return_freed_memory()
    size = Size(stage=stage_name, blocks=BLOCKS, device=device)
    if tiny:
        size = replace(size, width=64, grid=8, voxels=60)
    torch.manual_seed(0)
    stage = build_stage(size)
    add_lora(stage.model, LoraConfig(), 0)
    adapters = lora_parameters(stage.model)
    with torch.no_grad():
        for parameter in adapters:  # as in the midst of a training
            parameter += 0.01 * torch.randn_like(parameter)
    config = TrainConfig(batch=1)
    pairs = pairs_of(stage, 1, size.voxels)
    conditioned = ConditionedStage(stage, RandomConditions())
    work = Updates(conditioned, pairs, config, stage.model, AdapterOff(stage.model), SINGLE)
    draw = work._draw(pairs, 0)

    def prepare() -> None:
        for parameter in adapters:
            parameter.grad = None

    def run() -> Outcome:
        _, loss, preferred, rejected = work._pass(draw)[:4].unbind()
        margin = -loss.expm1().log() / config.dpo.beta  # the loss has it times beta, and its rounding
        outputs = {"preferred error": preferred, "rejected error": rejected, "margin": margin}
        return Outcome(
            outputs, {f"adapter {i}": p.grad for i, p in enumerate(adapters) if p.grad is not None}
        )

    return Case(fast=run, prepare=prepare)


ROWS += [
    Row(
        name=f"TRELLIS {stage} flow, one DPO update",
        size="full",
        make=functools.partial(dpo_update, stage_name=stage),
        seconds=seconds,
        meter_in_round=True,
        target=Target(at_least=1.5, aim=2.5),
    )
    for stage, seconds in (("structure", 25), ("latent", 20))
]

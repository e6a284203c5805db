"""TRELLIS.2 against values of the original's own classes (fixtures/flow_trellis2); case.json says what its
keys mean.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import train
from eg3d_rlhf.geometry.dual_grid import dual_grid
from eg3d_rlhf.models.dino import read_dino3
from eg3d_rlhf.models.image_preprocessing import at_most, on_black_first, over_black, squared
from eg3d_rlhf.models.lora import adapter_state, adapters_off, lora_parameters, merged_state
from eg3d_rlhf.models.policies import PREFIX, read_weights, tuned_model, write_adapter
from eg3d_rlhf.models.sparse import SparseBatch, SparseSample, feats_of
from eg3d_rlhf.models.trellis2 import VoxelEncoder, assets_of
from eg3d_rlhf.models.weights import empty, shapes
from eg3d_rlhf.modes import flow_check, flow_export
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, read_conditioning
from eg3d_rlhf.tuning.flow.base.export import export
from eg3d_rlhf.tuning.flow.base.sampling import generate, sample, times, trajectory
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families import trellis2 as family
from eg3d_rlhf.tuning.flow.families import trellis2_assets as assets
from eg3d_rlhf.tuning.flow.families import trellis2_files as files
from eg3d_rlhf.tuning.flow.families.trellis_files import build_model, find_model
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, pair_loss
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.compat.family_reference import (
    cases,
    check_gradients,
    each,
    error,
    grad_norm,
    gradients,
    having,
    pictures_of,
    recorded,
    released,
    surfaces,
    table,
)
from tests.compat.family_tolerances import (
    ADAPTED,
    DECODED,
    ENCODER,
    GRADIENT,
    HALF,
    TOKENS,
    TRAJECTORY,
    VELOCITY,
)
from tests.rejections import raising
from tests.tuning.flow.documented_commands import run_section

# in voxels, how near vertices are, and how many of them
DUAL = 1e-3
NEAR = 0.99


case = cases("flow_trellis2")


@pytest.fixture(scope="module")
def root(case):
    case.file(f"{case.fact('root')}/pipeline.json")
    return case.folder / case.fact("root")


@pytest.fixture(scope="module")
def pipeline(root):
    return family.FAMILY.load(root, None)


EACH_STAGE = each("flow_trellis2", "stage", lambda case: case.facts.get("stages", {}))


@pytest.fixture
def stage(request, case, pipeline):
    """A stage of the case with a network of its own to change."""
    (known,) = (stage for stage in pipeline.stages if stage.name == request.param)
    path = find_model(pipeline.file, case.fact("stages")[request.param])
    return replace(known, model=files.load_model(path, torch.float32).requires_grad_(False))


def at(case, stage, name, *, coords="coords", given="given", size=None):
    """A value of a stage, on its voxels where it has some."""
    key = f"{stage.name}/{name}"
    if stage.name == files.STRUCTURE:
        return case[key]
    places = case[f"{stage.name}/{coords}"]
    more = case[f"{stage.name}/{given}"] if f"{stage.name}/{given}" in case else None
    return SparseBatch(
        places.contiguous(), case[key], int(places[:, 0].max()) + 1 if size is None else size, given=more
    )


# Names, shapes, settings.


@pytest.mark.parametrize("path", released("flow_trellis2"))
def test_names_and_shapes_are_the_originals(path):
    model = empty(lambda: build_model(json.loads(path.read_text()), str(path), files.ARCHITECTURES))
    want = table(path.with_suffix(".tsv"))
    want.pop("rope_phases", None)  # a buffer, which is computed here
    assert shapes(model.state_dict()) == want


def test_pipeline_json_is_resolved_as_the_original_does(case, pipeline):
    assert list(pipeline.file.flows.items()) == list(case.fact("stages").items())
    assert pipeline.file.kind == case.fact("pipeline_type")
    for stage in pipeline.stages:
        asked = UNNAMED | case_params(pipeline.file, case.fact("sampler_of", stage.name))
        made = stage.sampling
        assert (made.steps, made.rescale_t, made.cfg_rescale) == (
            asked["steps"],
            asked["rescale_t"],
            asked["guidance_rescale"],
        )
        assert (made.cfg_strength, list(made.cfg_interval)) == (
            asked["guidance_strength"] - 1,
            asked["guidance_interval"],
        )
        assert stage.path.sigma_min == case.fact("sigma_min")
        assert stage.path.schedule == ("logit-normal" if stage.name == files.STRUCTURE else "uniform")
        assert stage.latents.resolution == case.fact("resolutions", stage.name)
    assert (pipeline.stages[0].path.mean, pipeline.stages[0].path.std) == (1, 1)


UNNAMED = {  # what the original takes where `params` says nothing
    "steps": 50,
    "guidance_strength": 3.0,
    "guidance_rescale": 0.0,
    "guidance_interval": [0.0, 1.0],
    "rescale_t": 1.0,
}


def case_params(file, sampler):
    return json.loads((file.root / "pipeline.json").read_text())["args"][sampler].get("params", {})


def test_the_published_settings(tmp_path):
    """As three public copies of pipeline.json have them, and what the original takes where `params` says
    nothing.
    """

    def params(steps, strength, rescale, interval, r):
        named = ("steps", "guidance_strength", "guidance_rescale", "guidance_interval", "rescale_t")
        return {"params": dict(zip(named, (steps, strength, rescale, interval, r), strict=True))}

    norm = {"mean": [0.0] * 32, "std": [1.0] * 32}
    args = {
        "models": dict.fromkeys((*files.CHAINS["1024_cascade"].values(), *files.DECODERS), "ckpts/x"),
        "sparse_structure_sampler": params(12, 7.5, 0.7, [0.6, 1], 5),
        "shape_slat_sampler": params(12, 7.5, 0.5, [0.6, 1], 3),
        "tex_slat_sampler": params(12, 1.0, 0.0, [0.6, 0.9], 3),
        "shape_slat_normalization": norm,
        "tex_slat_normalization": norm,
    }
    (tmp_path / "pipeline.json").write_text(json.dumps({"name": files.NAME, "args": args}))
    made = files.read_pipeline(tmp_path).sampling
    settings = {
        n: (s.steps, s.cfg_strength, s.cfg_rescale, s.cfg_interval, s.rescale_t) for n, s in made.items()
    }
    shape = (12, 6.5, 0.5, (0.6, 1.0), 3.0)
    assert settings == {
        "structure": (12, 6.5, 0.7, (0.6, 1.0), 5.0),
        "shape_512": shape,
        "shape_1024": shape,
        "texture": (12, 0.0, 0.0, (0.6, 0.9), 3.0),
    }
    assert (
        sum(0.6 <= t for t in times(made["structure"])[:-1]) == 10
        and sum(0.6 <= t for t in times(made["shape_512"])[:-1]) == 9
    )
    args["shape_slat_sampler"] = {}
    (tmp_path / "pipeline.json").write_text(json.dumps({"name": files.NAME, "args": args}))
    bare = files.read_pipeline(tmp_path).sampling["shape_512"]
    assert (bare.steps, bare.cfg_strength, bare.cfg_rescale, bare.cfg_interval, bare.rescale_t) == (
        50,
        2.0,
        0.0,
        (0.0, 1.0),
        1.0,
    )


# The flows.


@EACH_STAGE
def test_velocity_blocks_and_the_token_of_the_time(case, stage):
    x = at(case, stage, "x")
    t, cond = case.of(f"{stage.name}/t", f"{stage.name}/cond")
    made = {}
    model = stage.model
    hooks = [model.t_embedder.register_forward_hook(lambda module, given, out: made.update(t_token=out))]
    if hasattr(model, "adaLN_modulation"):
        hooks.append(
            model.adaLN_modulation.register_forward_hook(
                lambda module, given, out: made.update(modulation=out)
            )
        )
    with torch.no_grad():
        assert error(feats_of(model(x, t, cond)), case[f"{stage.name}/y"]) < VELOCITY
    for name, value in made.items():
        if f"{stage.name}/{name}" in case:
            assert error(value, case[f"{stage.name}/{name}"]) < VELOCITY
    made.clear()
    blocks = []
    hooks += [
        block.register_forward_hook(lambda module, given, out: blocks.append(out)) for block in model.blocks
    ]
    shown = case.facts.get("blocks_of", {}).get("sample", 0)
    one = slice(shown, shown + 1)
    with torch.no_grad():
        model(
            x[one] if isinstance(x, torch.Tensor) else SparseBatch.join(x.samples()[one]), t[one], cond[one]
        )
    for hook in hooks:
        hook.remove()
    assert (
        error(torch.stack([block.flatten(0, -2) for block in blocks]), case[f"{stage.name}/blocks_out"])
        < VELOCITY
    )


def test_angles_are_the_stored_ones(case, pipeline):
    model = pipeline.stages[0].model
    angles = model.angles(model.places())
    assert error(angles.cos(), case["structure/rope_phases_real"]) < VELOCITY
    assert error(angles.sin(), case["structure/rope_phases_imag"]) < VELOCITY


@EACH_STAGE
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(case, stage, recompute):
    model = stage.model.requires_grad_(True).train()
    model.recompute = recompute
    x = at(case, stage, "x")
    t, cond, weight = case.of(*(f"{stage.name}/{name}" for name in ("t", "cond", "grad_weight")))
    cond = cond.requires_grad_()
    numbers = feats_of(x).clone().requires_grad_()
    given = None if getattr(x, "given", None) is None else x.given.clone().requires_grad_()
    x = numbers if isinstance(x, torch.Tensor) else replace(x, feats=numbers, given=given)
    total = (feats_of(model(x, t, cond)) * weight).sum()
    total.backward()
    inputs = {"grad_x": numbers.grad, "grad_cond": cond.grad} | (
        {} if given is None else {"grad_given": given.grad}
    )
    for name, grad in inputs.items():
        assert error(grad, case[f"{stage.name}/{name}"]) < GRADIENT, name
    size = float((weight * case[f"{stage.name}/y"]).abs().sum())
    assert total.item() == pytest.approx(float(case[f"{stage.name}/grad_scalar"]), abs=VELOCITY * size)
    got = gradients(model)
    for name, grad in case.below(f"{stage.name}/grad/").items():
        assert error(got[name], grad) < GRADIENT, name
    norms = torch.stack([got[name].norm() for name in sorted(got)])
    want = case[f"{stage.name}/grad_norms"]
    assert error(norms, want) < GRADIENT
    assert grad_norm(model) == pytest.approx(float(case[f"{stage.name}/grad_norm"]), rel=GRADIENT)


@EACH_STAGE
def test_the_path_and_its_loss(case, stage):
    """The original's loss is a mean over all voxels of a batch; here samples count alike, as pairs must."""
    places = {"coords": "fm_coords", "given": "fm_given"}
    data, noise = (at(case, stage, f"fm_{name}", **places) for name in ("x0", "noise"))
    t, cond = case.of(f"{stage.name}/fm_t", f"{stage.name}/fm_cond")
    model = stage.model.requires_grad_(True).train()
    x_t = stage.path.mix(data, t, noise)
    target = stage.path.velocity(data, noise)
    assert error(feats_of(x_t), case[f"{stage.name}/fm_x_t"]) < VELOCITY
    assert error(feats_of(target), case[f"{stage.name}/fm_target"]) < VELOCITY
    v = stage.velocity(x_t, t, cond)
    assert error(feats_of(v), case[f"{stage.name}/fm_pred"]) < VELOCITY
    assert error(stage.path.errors(v, data, noise), case[f"{stage.name}/fm_loss_each"]) < VELOCITY
    loss = (feats_of(v) - feats_of(target)).square().mean()
    assert error(loss, case[f"{stage.name}/fm_loss"]) < VELOCITY
    loss.backward()
    assert (
        error(model.blocks[0].self_attn.to_qkv.weight.grad, case[f"{stage.name}/fm_grad_block0_to_qkv"])
        < GRADIENT
    )
    assert grad_norm(model) == pytest.approx(float(case[f"{stage.name}/fm_grad_norm"]), rel=GRADIENT)


def sampling_of(stage, params: dict):
    """Translate the original's settings of a sampler, whose strength of guidance is larger by 1."""
    return replace(
        stage.sampling,
        steps=params["steps"],
        cfg_strength=params["guidance_strength"] - 1,
        rescale_t=params["rescale_t"],
        cfg_interval=tuple(params["guidance_interval"]),
        cfg_rescale=params["guidance_rescale"],
    )


@EACH_STAGE
def test_samplers(case, stage):
    """Without `past_one` and the like, r < 1, whose first time is 1 + 2^-52 there and exactly 1 here; and
    without guidance below 1.
    """
    noise = at(case, stage, "smp_noise", coords="smp_coords", given="smp_given")
    cond = case[f"{stage.name}/smp_cond"]
    asked = {
        **case.fact("samplings"),
        "published": case.facts.get("published", {}).get(stage.name),
        "own": case_params(
            files.read_pipeline(case.folder / case.fact("root")), case.fact("sampler_of", stage.name)
        ),
    }
    tried = 0
    for name, params in asked.items():
        if params is None or f"{stage.name}/smp_{name}_x_t" not in case:
            continue
        params = UNNAMED | params
        if params["rescale_t"] < 1 or params["guidance_strength"] < 1:
            continue
        tried += 1
        sampling = sampling_of(stage, params)
        assert torch.equal(
            torch.tensor(times(sampling), dtype=torch.float64), case[f"{stage.name}/smp_{name}_times"]
        )
        steps = recorded(list(trajectory(stage, noise, cond, torch.zeros_like(cond), sampling)), params)
        for kind, which in (("x_t", 0), ("x_0", 1)):
            made = torch.stack([feats_of(step[which]) for step in steps])
            assert error(made, case[f"{stage.name}/smp_{name}_{kind}"]) < TRAJECTORY, (name, kind)
    if not tried:
        pytest.skip(f"{case.folder.name} has no trajectory of {stage.name} that is sampled here")


# The whole way, and the decoders.


def batch(coords, feats, given=None):
    return SparseBatch(coords.int().contiguous(), feats, int(coords[:, 0].max()) + 1, given=given)


def rows(coords, *values):
    """Values of voxels in the order of their indices."""
    places = coords.long()
    order = (
        (places[:, -3] << 42)
        + (places[:, -2] << 21)
        + places[:, -1]
        + (places[:, 0] << 58) * (places.shape[1] == 4)
    ).argsort()
    return [places[order], *(value[order] for value in values)]


def check_voxels(made, coords, feats, limit):
    """Equal sets, and features on them."""
    got = rows(made.coords, made.feats)
    want = rows(coords, feats)
    assert torch.equal(got[0], want[0])
    assert error(got[1], want[1]) < limit


def triangles(faces):
    """As a set, the way round kept."""
    smallest = torch.stack([faces.roll(-i, 1) for i in range(3)], 1)
    first = faces.argmin(1)
    return sorted(map(tuple, smallest[torch.arange(len(faces)), first].tolist()))


def check_surface(asset, coords, vertices, faces):
    """The rows of ours may be in another order."""
    made, told = assets.surface_of(asset)
    (order,), (wanted,) = (rows(c, torch.arange(len(c)))[1:] for c in (asset.coords, coords))
    assert error(made[order], vertices[wanted]) < DECODED
    number = torch.empty(len(order), dtype=torch.int64)
    number[order] = wanted
    assert triangles(number[told]) == triangles(faces.long())


def told(case, pipeline, name):
    return case[f"run/cond_{pipeline.conditioning_key(name)}"]


def test_one_asset_from_the_recorded_noise(case, pipeline):
    left = None
    for number, stage in enumerate(pipeline.stages):
        noise = case[f"run/{stage.name}/noise"]
        cond = told(case, pipeline, stage.name)
        if left is not None:
            places = left.coords if isinstance(left, SparseSample) else left
            key = f"run/{stage.name}/coords"
            want = case[key] if key in case else case[f"run/{pipeline.shape}/coords"]
            assert torch.equal(rows(places)[0], rows(want[:, 1:])[0])
            given = left.feats if stage.latents.given else None
            noise = batch(
                torch.nn.functional.pad(places, (1, 0)), noise[order_of(want[:, 1:], places)], given
            )
        x_0 = sample(stage, noise, cond, torch.zeros_like(cond))
        if isinstance(x_0, torch.Tensor):
            assert error(x_0, case[f"run/{stage.name}/x_0"]) < TRAJECTORY
            assert (
                error(pipeline.part(files.STRUCTURE_DECODER)(x_0), case[f"run/{stage.name}/logits"]) < DECODED
            )
        else:
            slat = pipeline.unnormalised(x_0.feats, stage.name)
            assert error(slat, case[f"run/{stage.name}/slat"][order_of(want[:, 1:], places)]) < TRAJECTORY
        if number + 1 < len(pipeline.stages):
            (left,) = pipeline.advance(stage.name, x_0)
    (asset,) = pipeline.decode(x_0)
    assert asset.resolution == int(case["run/resolution"])
    check_voxels(
        asset_batch(asset),
        case["run/decoded/coords"],
        case["run/decoded/materials"],
        case.fact("tolerances", "run"),
    )


def asset_batch(asset):
    return SparseBatch(torch.nn.functional.pad(asset.coords, (1, 0)).contiguous(), asset.materials, 1)


def order_of(theirs, ours):
    """theirs[order] are ours."""
    (_, a), (_, b) = (rows(c, torch.arange(len(c))) for c in (theirs, ours))
    order = torch.empty(len(a), dtype=torch.int64)
    order[b] = a
    return order


def test_what_the_recorded_latents_decode_to(case, pipeline):
    decoder = pipeline._decoder()
    shape = f"run/{pipeline.shape}"
    texture = "run/texture"
    with torch.no_grad():
        made, logits = decoder(batch(case[f"{shape}/coords"], case[f"{shape}/slat"]))
        check_voxels(made, case["run/decoded/coords"], case["run/decoded/shape"], DECODED)
        for i, each in enumerate(logits):
            assert error(each, case[f"run/decoded/subdivision_{i}"]) < DECODED
        given = batch(case[f"{shape}/coords"], case[f"{texture}/slat"])
        materials, _ = pipeline.part(files.TEXTURE_DECODER)(given, logits)
    (asset,) = assets_of(made, materials, int(case["run/resolution"]), decoder.config.voxel_margin)
    check_voxels(asset_batch(asset), case["run/decoded/coords"], case["run/decoded/materials"], DECODED)
    check_surface(
        asset, case["run/decoded/coords"][:, 1:], case["run/decoded/vertices"], case["run/decoded/faces"]
    )


@having("flow_trellis2", "run/shape_512/slat", "run/upsampled")
def test_the_cascade_and_its_limit_of_tokens(case, pipeline):
    low = case["run/shape_512/slat"]
    finer = pipeline._decoder().config.finer
    with torch.no_grad():
        fine, _ = pipeline._decoder()(
            batch(case["run/shape_512/coords"], low),
            split_count=len(pipeline._decoder().config.up_block_type),
        )
    assert torch.equal(rows(fine.coords)[0], rows(case["run/upsampled"])[0])
    side = case.fact("lr_resolution")
    high = case.fact("resolution")
    coords, cells = family.finer_voxels(fine.coords[:, 1:], side, high, high, finer)
    assert torch.equal(coords, rows(case["run/shape_1024/coords"][:, 1:])[0].int()) and cells * finer == int(
        case["run/resolution"]
    )
    asked = int(case["run/reduced_asked"])
    most = int(case["run/reduced_max_tokens"])
    coords, cells = family.finer_voxels(fine.coords[:, 1:], side, asked, high, finer, most)
    assert torch.equal(coords, rows(case["run/reduced_coords"][:, 1:])[0].int()) and cells * finer == int(
        case["run/reduced_resolution"]
    )


def test_decoders_alone(case, pipeline):
    decoder = pipeline._decoder()
    places = case["dec/coords_in"]
    with torch.no_grad():
        made, logits = decoder(batch(places, case["dec/latent"]))
        check_voxels(made, case["dec/coords"], case["dec/shape"], DECODED)
        for i, (each, childless) in enumerate(zip(logits, case["dec/childless"].tolist(), strict=True)):
            assert (
                error(each, case[f"dec/subdivision_{i}"]) < DECODED
                and int((each <= 0).all(1).sum()) == childless
            )
        materials, _ = pipeline.part(files.TEXTURE_DECODER)(batch(places, case["dec/tex_latent"]), logits)
        check_voxels(materials, case["dec/coords"], case["dec/materials"], DECODED)
    # The recorded vertices are of the resolution that the pipeline had set before, not of the JSON file's.
    assets = assets_of(made, None, case.fact("resolution"), decoder.config.voxel_margin)
    for i, asset in enumerate(assets):
        coords = case["dec/coords"]
        check_surface(asset, coords[coords[:, 0] == i, 1:], case[f"dec/vertices_{i}"], case[f"dec/faces_{i}"])


# Encoders, and the dual grid of a mesh.


def encoder(case, pipeline, name) -> VoxelEncoder:
    case.file(f"{case.fact('root')}/ckpts/{pipeline.file.usual[name]}.safetensors")
    return pipeline.part(name)


def inputs(case):
    feats = torch.cat([case["enc/dual_vertices"] - 0.5, case["enc/intersected"].float() - 0.5], 1)
    return batch(torch.nn.functional.pad(case["enc/coords"], (1, 0)), feats)


def test_encoders_of_shape_and_material(case, pipeline):
    shape = inputs(case)
    halves = {
        "shape": (files.SHAPE_ENCODER, shape),
        "tex": (files.TEXTURE_ENCODER, shape.with_feats(case["enc/materials"])),
    }
    for short, (name, given) in halves.items():
        with torch.no_grad():
            mean, logvar = encoder(case, pipeline, name)(given)
        check_voxels(mean, case["enc/shape_coords"], case[f"enc/{short}_mean"], ENCODER)
        check_voxels(logvar, case["enc/shape_coords"], case[f"enc/{short}_logvar"], ENCODER)


def test_an_asset_becomes_latents_as_the_flows_see_them(case, pipeline):
    for name in (files.SHAPE_ENCODER, files.TEXTURE_ENCODER):
        encoder(case, pipeline, name)
    asset = family.VoxelAsset(
        coords=case["enc/coords"].int(),
        resolution=int(case["enc/resolution"]),
        vertices=case["enc/dual_vertices"],
        crossed=case["enc/intersected"],
        split=torch.ones(len(case["enc/coords"])),
        materials=case["enc/materials"] / 2 + 0.5,
    )
    args = json.loads((pipeline.file.root / "pipeline.json").read_text())["args"]
    for stage, short in ((pipeline.shape, "shape"), (files.TEXTURE, "tex")):
        latent = pipeline.encode_stage(asset, stage)
        scale = args[f"{short}_slat_normalization"]
        want = (case[f"enc/{short}_mean"] - torch.tensor(scale["mean"])) / torch.tensor(scale["std"])
        check_voxels(SparseBatch.join([latent]), case["enc/shape_coords"], want, ENCODER)


def test_the_dual_grid_of_a_mesh(case):
    cells = int(case["enc/resolution"])
    made = dual_grid(case["enc/mesh_vertices"], case["enc/mesh_faces"], cells)
    assert torch.equal(made.coords.long(), rows(case["enc/coords"])[0])
    assert torch.equal(made.crossed, case["enc/intersected"])
    away = (made.vertices - case["enc/dual_vertices"]).abs().amax(1)
    assert (
        float((away < DUAL).double().mean()) >= NEAR
        and 0 <= float(made.vertices.min())
        and float(made.vertices.max()) <= 1
    )
    asset = family.VoxelAsset(
        coords=made.coords,
        resolution=cells,
        vertices=made.vertices,
        crossed=made.crossed,
        split=torch.ones(len(made.coords)),
    )
    assert len(assets.surface_of(asset)[1]) == int(case["enc/back_faces"])


def test_a_mesh_becomes_latents(case, pipeline):
    cells = int(case["enc/resolution"])
    network = encoder(case, pipeline, files.SHAPE_ENCODER)
    made = dual_grid(case["enc/mesh_vertices"], case["enc/mesh_faces"], cells)
    with torch.no_grad():
        mean, _ = network(assets.encoded_shape(made.coords, made.vertices, made.crossed))
    # which grows with the three vertices that differ
    check_voxels(mean, case["enc/shape_coords"], case["enc/shape_mean"], 0.1)


@having("flow_trellis2", "enc/tex_decoded", "enc/tex_mean")
def test_materials_decode_on_the_voxels_that_they_were_encoded_from(case, pipeline):
    fine = case["enc/tex_decoded"]
    latent = batch(case["enc/shape_coords"], case["enc/tex_mean"])
    levels = []
    places = torch.nn.functional.pad(case["enc/coords"], (1, 0))
    splits = len(pipeline.part(files.TEXTURE_DECODER).config.up_block_type)
    coords = latent.coords
    for i in range(splits):  # the children that there are, in the order of the decoder's voxels
        there = {
            tuple(row) for row in torch.cat([places[:, :1], places[:, 1:] >> (splits - 1 - i)], 1).tolist()
        }
        bits = torch.tensor([[0, n & 1, n >> 1 & 1, n >> 2 & 1] for n in range(8)])
        children = coords[:, None] * torch.tensor([1, 2, 2, 2]) + bits  # [V, 8, 4]
        levels.append(
            torch.tensor([[tuple(child) in there for child in voxel] for voxel in children.tolist()])
        )
        coords = children[levels[-1]]
    with torch.no_grad():
        made, _ = pipeline.part(files.TEXTURE_DECODER)(latent, levels)
    got = rows(made.coords, made.feats)
    want = rows(places, fine)
    assert torch.equal(got[0], want[0]) and error(got[1], want[1]) < DECODED


# Pictures.


def test_pictures_are_equal_to_the_bit(case):
    sizes = tuple(case.fact("picture_sizes"))
    for k in pictures_of(case):
        image = Image.fromarray(case[f"pre{k}/rgba"].numpy())
        most = case.facts.get("picture_most", 1024)
        assert np.array_equal(over_black(squared(at_most(image, most), 1.0)), case[f"pre{k}/cut"].numpy())
        for size, made in zip(sizes, on_black_first(image, sizes, most), strict=True):
            assert np.array_equal(
                (made.permute(1, 2, 0) * 255).round().byte().numpy(), case[f"pre{k}/image_{size}"].numpy()
            )


def test_tokens_are_those_before_the_last_norm(case):
    network = read_dino3(str(case.file(case.fact("encoder"))))
    image = case["enc_image"]
    assert error(family.image_tokens(network, image), case["enc_tokens"]) < TOKENS
    with torch.no_grad():
        assert error(network.norm(network(image)), case["enc_last_hidden_state"]) < TOKENS
    sizes = tuple(case.fact("picture_sizes"))
    for k in pictures_of(case):
        seen = on_black_first(Image.fromarray(case[f"pre{k}/rgba"].numpy()), sizes)
        for size, picture in zip(sizes, seen, strict=True):
            assert error(family.image_tokens(network, picture[None]), case[f"pre{k}/tokens_{size}"]) < TOKENS


# Adapters, preferences, export.


@pytest.fixture
def adapter(case, stage):
    return case.file(f"adapters/{stage.name}")


@EACH_STAGE
def test_adapters_are_pefts(case, stage, adapter, tmp_path):
    x = at(case, stage, "x")
    t, cond = case.of(f"{stage.name}/t", f"{stage.name}/cond")
    tuned = tuned_model(stage.model, adapter)
    with torch.no_grad():
        assert error(feats_of(tuned(x, t, cond)), case[f"{stage.name}/lora_y"]) < ADAPTED
        stage.model.load_state_dict(merged_state(tuned))
        assert error(feats_of(stage.model(x, t, cond)), case[f"{stage.name}/lora_y"]) < ADAPTED
    written, given = (
        load_file(next(path.glob("*.safetensors")))
        for path in (write_adapter(tuned, tmp_path / "ours"), adapter)
    )
    assert {f"{PREFIX}{name}" for name in adapter_state(tuned)} == written.keys()
    assert written.keys() == given.keys() and all(torch.equal(written[name], given[name]) for name in given)


@EACH_STAGE
def test_preferences(case, stage, adapter):
    tuned = tuned_model(stage.model, adapter)
    name = stage.name
    for parameter in lora_parameters(tuned):
        parameter.requires_grad_(True)
    t, cond = case.of(f"{name}/dpo_t", f"{name}/dpo_cond")
    errors = []
    reference = []
    for side in ("preferred", "rejected"):
        places = {"coords": f"dpo_coords_{side}", "given": f"dpo_given_{side}"}
        x_0, eps = (at(case, stage, f"dpo_{kind}", size=len(t), **places) for kind in (side, f"eps_{side}"))
        x_t = stage.path.mix(x_0, t, eps)
        errors.append(stage.path.errors(stage.velocity(x_t, t, cond, tuned), x_0, eps))
        with torch.no_grad(), adapters_off(tuned):
            reference.append(stage.path.errors(stage.velocity(x_t, t, cond, tuned), x_0, eps))
        assert error(errors[-1], case[f"{name}/dpo_error_{side}"]) < VELOCITY
        assert error(reference[-1], case[f"{name}/dpo_ref_{side}"]) < VELOCITY
    loss = pair_loss(
        PairErrors.split(torch.cat(errors), torch.cat(reference)), DpoConfig(beta=case.fact("beta"))
    ).mean()
    assert error(loss, case[f"{name}/dpo_loss"]) < GRADIENT
    loss.backward()
    check_gradients(
        {f"{PREFIX}{n}": grad for n, grad in gradients(tuned).items()},
        case.below(f"{name}/dpo_grad/"),
        least=1,
    )
    assert grad_norm(tuned) == pytest.approx(float(case[f"{name}/dpo_grad_norm"]), rel=GRADIENT)


def test_an_exported_folder_is_the_originals_with_merged_weights(case, root, pipeline, tmp_path):
    tuned = {name: path for name in case.fact("stages") if (path := case.folder / "adapters" / name).is_dir()}
    if not tuned:
        pytest.skip(f"{case.folder.name} has no adapters")
    report = export(family_of(root), root, tmp_path / "TUNED", tuned)
    assert set(report["tuned"]) == set(tuned) and all(
        0 <= done["rounding"] < 0.1 for done in report["tuned"].values()
    )
    names = {path.name for path in (root / "ckpts").iterdir()}
    structure = {path.name for path in case.folder.glob("*/ckpts/ss_dec*")}
    assert {path.name for path in (tmp_path / "TUNED" / "ckpts").iterdir()} == names | structure
    changed_files = {Path(done["file"]).name for done in report["tuned"].values()}
    for path in (tmp_path / "TUNED" / "ckpts").glob("*.safetensors"):
        (before,) = case.folder.glob(f"*/ckpts/{path.name}")
        old = load_file(before)
        new = load_file(path)
        assert {n: (x.shape, x.dtype) for n, x in old.items()} == {
            n: (x.shape, x.dtype) for n, x in new.items()
        }
        changed = {n.rpartition(".")[0] for n in old if not torch.equal(old[n], new[n])}
        stage = next(
            (name for name, done in report["tuned"].items() if Path(done["file"]).name == path.name), None
        )
        assert changed == (set(read_weights(tuned[stage]).adapters) if path.name in changed_files else set())
    for name in ("pipeline.json", files.TEXTURING):
        if not (root / name).is_file():
            continue
        old, new = (json.loads((folder / name).read_text()) for folder in (root, tmp_path / "TUNED"))
        for value, place in ((new["args"]["models"][n], n) for n in new["args"]["models"]):
            if (root / f"{old['args']['models'][place]}.json").is_file():
                assert value == old["args"]["models"][place]
        assert {**new, "args": {**new["args"], "models": 0}} == {**old, "args": {**old["args"], "models": 0}}
    again = family.FAMILY.load(tmp_path / "TUNED", None)
    limit = HALF if case.facts.get("half") else ADAPTED  # updates of a bfloat16 file are rounded
    for stage in again.stages:
        x = at(case, stage, "x")
        t, cond = case.of(f"{stage.name}/t", f"{stage.name}/cond")
        want = case[f"{stage.name}/{'lora_y' if stage.name in tuned else 'y'}"]
        with torch.no_grad():
            assert error(feats_of(stage.model(x, t, cond)), want) < limit


def test_conditions_of_another_encoder_or_preparation_are_refused(case, root, pipeline):
    size = {name: pipeline.configs[name].cond_channels for name in pipeline.configs}["structure"]
    tokens = {"a": {"512": torch.zeros(3, size), "1024": torch.zeros(5, size)}}
    family.FAMILY.load(
        root, Conditioning(tokens=tokens, encoder=family.source_of(pipeline.file), zero_null=True)
    )
    with raising("conditioning:", family.source_of(pipeline.file), "eg3d-rlhf"):
        family.FAMILY.load(root, Conditioning(tokens=tokens, encoder=pipeline.file.encoder, zero_null=True))


def test_a_texture_file_may_say_any_resolution(case, root, tmp_path):
    copied = shutil.copytree(root.parent, tmp_path / "case") / root.name
    stem = find_model(files.read_pipeline(copied), case.fact("stages", "texture"))
    path = stem.with_name(f"{stem.name}.json")
    content = json.loads(path.read_text())
    content["args"]["resolution"] = 3
    path.write_text(json.dumps(content))
    shape, texture = family.FAMILY.load(copied, None).stages[-2:]
    assert texture.latents.resolution == shape.latents.resolution


def called(command, *flags):
    done = CliRunner().invoke(command, list(map(str, flags)))
    assert done.exit_code == 0, (flags, done.output, done.exception)
    return done


def test_the_folder_is_found_fit(root):
    assert "FAULT" not in called(flow_check.check, root).output


@pytest.mark.long
def test_from_pictures_to_a_tuned_folder_as_documented(case, root, tmp_path, monkeypatch):
    """DINOv3 from the hub's cache; then an update of every stage, and all of them exported."""
    monkeypatch.chdir(tmp_path)
    snapshots = (
        tmp_path / "hub" / f"models--{files.read_pipeline(root).encoder.replace('/', '--')}" / "snapshots"
    )
    snapshots.mkdir(parents=True)
    (snapshots / "0").symlink_to(case.file(case.fact("encoder")))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    Path("IMAGES").mkdir()
    pictures = [case[f"pre{k}/rgba"].numpy() for k in pictures_of(case)]
    shown = next((rgba for rgba in pictures if (rgba[..., 3] < 255).any()), None)
    if shown is None:
        pytest.skip(f"{case.folder.name} has no picture that is cut out")
    for i, name in enumerate("abc"):
        Image.fromarray(np.roll(shown, i, 1)).save(f"IMAGES/{name}.png")
    few = "--steps=1 --batch=2 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --device=cpu".split()

    def look(command, done):
        if command == "sample":
            heard(Work.open(Path("WORK")).lines())

    with surfaces(case) as heard:
        commands = run_section("TRELLIS.2", root, Path(), few, look)
    assert commands == ["new", "sample", "pairs", "train", "export"]
    tuned = []
    for stage in case.fact("stages"):
        whole = (
            "--mode=circular-dpo",
            f"--pipeline={root}",
            "--pairs=WORK/pairs",
            f"--stage={stage}",
            f"--outdir={stage}",
            *few,
        )
        called(train.main, *whole)
        (run,) = Path(stage).glob("00000-*")
        tuned.append(run)
    called(flow_export.export_command, "--outdir=ALL", *tuned)
    for folder in ("TUNED", "ALL"):
        read = read_conditioning(Path("WORK"))
        pipeline = family.FAMILY.load(Path(folder), read)
        assert generate(pipeline, [read.names[0]], [0])[0].materials.isfinite().all()
    called(flow_check.check, "ALL")

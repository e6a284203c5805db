"""SAM 3D Objects against values of the original's own classes (fixtures/flow_sam3d); case.json says what its
keys mean.

Times in the values run the other way: data is at t = 1.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from eg3d_rlhf.models.image_preprocessing import object_inputs
from eg3d_rlhf.models.lora import adapter_state, adapters_off, merged_state
from eg3d_rlhf.models.policies import ADAPTER, PREFIX, load_weights, read_weights, tuned_model, write_adapter
from eg3d_rlhf.models.sam3d import SHAPE
from eg3d_rlhf.models.sparse import NamedBatch, SparseBatch, feats_of
from eg3d_rlhf.models.weights import empty, read_content, shapes
from eg3d_rlhf.modes.flow_check import check
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, read_conditioning
from eg3d_rlhf.tuning.flow.base.export import export
from eg3d_rlhf.tuning.flow.base.sampling import generate, guides, times, trajectory
from eg3d_rlhf.tuning.flow.families import sam3d as family
from eg3d_rlhf.tuning.flow.families import sam3d_files as files
from eg3d_rlhf.tuning.flow.families import sam3d_pose as pose
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, pair_loss
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.compat.family_reference import (
    at_least,
    cases,
    check_gradients,
    error,
    grad_norm,
    gradients,
    having,
    pictures_of,
    recorded,
    released,
    rounding_of,
    table,
)
from tests.compat.family_tolerances import ADAPTED, DECODED, GRADIENT, TOKENS, TRAJECTORY, VELOCITY
from tests.rejections import raising
from tests.tuning.flow.documented_commands import FEW, run_section

INPUTS = 2e-7
STAGE_OF = {"ss": "structure", "slat": "latent"}  # stages as the values name them
RELEASED = pytest.mark.parametrize("path", released("flow_sam3d"))


case = cases("flow_sam3d")


@pytest.fixture(scope="module")
def root(case):
    return case.file(case.fact("root"))


@pytest.fixture(scope="module")
def file(root):
    return files.read_pipeline(root)


@pytest.fixture
def flows(file):
    return {stage: files.load_flow(generator, torch.float32) for stage, generator in file.generators.items()}


@pytest.fixture
def pipeline(file, flows):
    return family.Sam3dPipeline(file, flows, None, lambda part: files.load_part(file, part))


@pytest.fixture
def stages(pipeline):
    """By name, as they are tuned and drawn."""
    return {stage.name: stage for stage in pipeline.stages}


@pytest.fixture(params=["ss", "slat"])
def short(request):
    return request.param


def batch(case, short, name):
    """A value of a stage: tensors by name, or features on its voxels."""
    if short == "ss":
        return NamedBatch(case.below(f"ss_{name}/"))
    coords = case["slat_smp_coords" if name.startswith("smp") else "slat_coords"]
    return SparseBatch(coords, case[f"slat_{name}"], int(coords[:, 0].max()) + 1)


def distances(made, want) -> dict[str, float]:
    """Errors by latent."""
    made, want = (
        {"": x.feats} if isinstance(x, SparseBatch) else dict(getattr(x, "tensors", x)) for x in (made, want)
    )
    assert made.keys() == want.keys()
    return {name: error(made[name], want[name]) for name in want}


def called(model, x, t, cond, *step):
    """The network's own call, in its own time."""
    return (family.call_voxels if isinstance(x, SparseBatch) else family.call_mixture)(
        model, x, t, cond, *step
    )


# Velocities and gradients.


def steps_of(case, short, model):
    """What the values name so: the length of steps given, 0, or none asked for."""
    return (case[f"{short}_d"],) if hasattr(model, "d_embedder") else ()


def test_velocities(case, short, flows):
    model = flows[STAGE_OF[short]]
    x = batch(case, short, "x")
    t, cond = case.of(f"{short}_t", f"{short}_cond")
    step = steps_of(case, short, model)
    asked = {"y": (cond, *step), "y_null": (torch.zeros_like(cond), *step)}
    if step:
        asked |= {"y_d0": (cond,)}
    there = {name.removeprefix(f"{short}_").partition("/")[0] for name in case.names}
    asked = {name: given for name, given in asked.items() if name in there}
    if not asked:
        pytest.skip(f"{case.folder.name} has no velocities of {short}")
    with torch.no_grad():
        for name, given in asked.items():
            made = called(model, x, t, *given)
            assert max(distances(made, batch(case, short, name)).values()) < VELOCITY, name


def test_times_positions_and_blocks(case, flows):
    model = flows["structure"]
    x = batch(case, "ss", "x")
    t, cond = case.of("ss_t", "ss_cond")
    step = steps_of(case, "ss", model)
    token = []
    given = []
    made = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: token.append(inputs[1]))
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: made.append(out))
    with torch.no_grad():
        called(model, x, t, cond, *step)
    assert error(given[0], case["ss_t_sincos"]) < VELOCITY
    if not model.config.share_mod:
        assert error(token[0], case["ss_t_token"]) < VELOCITY
    for name, places in case.below("ss_pos/").items():
        assert error(model.latent_mapping[name].pos_emb, places) < VELOCITY
    sample = case.facts.get("blocks_of", {}).get("sample", 1)
    for group, wanted in case.below("ss_blocks_out/").items():
        assert error(torch.stack([out[group][sample] for out in made]), wanted) < VELOCITY


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(case, short, flows, recompute):
    model = flows[STAGE_OF[short]].requires_grad_(True).train()
    model.recompute = recompute
    x = batch(case, short, "x")
    t, cond = case.of(f"{short}_t", f"{short}_cond")
    step = steps_of(case, short, model)
    weight = batch(case, short, "grad_weight")
    leaves = {"": x.feats} if isinstance(x, SparseBatch) else x.tensors
    for leaf in (*leaves.values(), cond):
        leaf.requires_grad_()
    y = called(model, x, t, cond, *step)
    total = (feats_of(y) * feats_of(weight)).sum()
    total.backward()
    of_x = {"": case["slat_grad_x"]} if short == "slat" else case.below("ss_grad_x/")
    assert max(error(leaves[name].grad, wanted) for name, wanted in of_x.items()) < GRADIENT
    assert error(cond.grad, case[f"{short}_grad_cond"]) < GRADIENT
    size = float((feats_of(y) * feats_of(weight)).detach().abs().sum())
    assert error(total, case[f"{short}_grad_scalar"], size) < VELOCITY
    check_gradients(gradients(model), case.below(f"{short}_grad/"))
    assert grad_norm(model) == pytest.approx(float(case[f"{short}_grad_norm"]), rel=GRADIENT)


def test_the_pose_does_not_pull_at_the_shape_and_the_shape_needs_no_pose(case, flows):
    model = flows["structure"].requires_grad_(True)
    x = case.below("ss_x/")
    t, cond = case.of("ss_t", "ss_cond")
    weight = case.below("ss_grad_weight/")
    x[SHAPE].requires_grad_()
    y = model(x, t, cond)
    sum((y[name] * weight[name]).sum() for name in y if name != SHAPE).backward()
    assert (
        x[SHAPE].grad is None
        and not case["ss_posegrad_x_shape"].any()
        and not case["ss_posegrad_norm_shape_parameters"]
    )
    pulled = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert pulled and not any(SHAPE in name.split(".") for name in pulled)
    with torch.no_grad():
        assert torch.equal(model({SHAPE: x[SHAPE]}, t, cond)[SHAPE], y[SHAPE])


# The path, its losses, the sampler.


def test_the_path_and_its_loss(case, short, stages, flows):
    stage = stages[STAGE_OF[short]]
    model = flows[STAGE_OF[short]].requires_grad_(True)
    data, noise, wanted, target, v = (
        batch(case, short, f"fm_{name}") for name in ("data", "noise", "x_t", "target", "pred")
    )
    t = 1 - case[f"{short}_fm_t"].double()
    cond = case[f"{short}_cond"]
    x_t = stage.path.mix(data, t.float(), noise)
    assert max(distances(x_t, wanted).values()) < VELOCITY
    assert error(-feats_of(stage.path.velocity(data, noise)), feats_of(target)) < VELOCITY
    made = stage.velocity(x_t, t.float(), cond)
    assert error(-feats_of(made), feats_of(v)) < VELOCITY
    losses = {"loss": stage.path} if short == "slat" else {"loss_plain": stage.path}
    if f"{short}_fm_loss_published" in case:
        losses |= {"loss_published": weighted(stage, case)}
    for name, path in losses.items():
        model.zero_grad()
        loss = path.errors(stage.velocity(wanted, t.float(), cond), data, noise).mean()
        assert error(loss, case[f"{short}_fm_{name}"]) < VELOCITY, name
        loss.backward()
        key = f"{short}_fm_{name.removeprefix('loss').removeprefix('_')}_grad_norm".replace("__", "_")
        assert grad_norm(model) == pytest.approx(float(case[key]), rel=GRADIENT), name


def weighted(stage, case):
    """The path with the weights of the YAML."""
    said = case.fact("config", "ss_generator", "module", "generator", "backbone", "loss_weights")
    generator = files.read_pipeline(case.file(case.fact("root"))).generators["structure"]
    assert generator.weights == {name: value for name, value in said.items() if name != "_target_"}
    return replace(stage.path, weights=generator.weights)


@having("flow_sam3d", "ss_sc_t", "ss_sc_d", "ss_sc_cond")
def test_what_a_network_of_steps_is_compared_with(case, flows):
    """The original's second loss, which is not trained here: its target by our network."""
    x = batch(case, "ss", "sc_x_t")
    t, d, cond = case.of("ss_sc_t", "ss_sc_d", "ss_sc_cond")
    model = flows["structure"]
    with torch.no_grad():
        first = called(model, x, t, cond, d)
        there = x.with_feats(x.feats + d[:, None] * first.feats)
        second = called(model, there, t + d, cond, d)
        target = x.with_feats((first.feats + second.feats) / 2)
        assert max(distances(target, batch(case, "ss", "sc_target_whole_plain")).values()) < VELOCITY
        assert (
            max(distances(called(model, x, t, cond, 2 * d), batch(case, "ss", "sc_pred")).values()) < VELOCITY
        )


def sampling_of(stage, asked):
    scale = stage.sampling.time_scale
    low, high = (min(end / scale, 1.0) for end in asked["interval"])
    return replace(
        stage.sampling,
        steps=asked["steps"],
        rescale_t=asked["rescale_t"],
        cfg_strength=asked["strength"],
        cfg_interval=(1 - high, 1 - low),
        shortcut=asked.get("shortcut", False),
    )


def test_samplers(case, short, stages):
    stage = stages[STAGE_OF[short]]
    noise = batch(case, short, "smp_noise")
    cond = case[f"{short}_smp_cond"]
    tried = 0
    for name, asked in case.fact(f"{short}_samplings").items():
        if f"{short}_smp_{name}_t" not in case:
            continue
        tried += 1
        sampling = sampling_of(stage, asked)
        assert (
            error(1 - torch.tensor(times(sampling)[:-1]).double(), case[f"{short}_smp_{name}_t"]) < VELOCITY
        )
        states = [x for x, _ in trajectory(stage, noise, cond, torch.zeros_like(cond), sampling)]
        states = recorded(states, asked)
        for latent, wanted in (
            {"": case[f"slat_smp_{name}_x"]} if short == "slat" else case.below(f"ss_smp_{name}_x/")
        ).items():
            made = torch.stack([feats_of(x) if not latent else x[latent] for x in states])
            assert error(made, wanted) < TRAJECTORY, (name, latent)
    if not tried:
        pytest.skip(f"{case.folder.name} has no trajectory of {short}")


def test_what_is_not_named_is_what_the_originals_code_says(case, file):
    """And not what the generators' files say; a key of pipeline.yaml counts."""
    said = case.fact("config", "pipeline")
    for stage, strength in (("structure", 7), ("latent", 5)):
        short = files.SHORT[stage]
        sampling = file.sampling[stage]
        backbone = case.fact("config", f"{short}_generator", "module", "generator", "backbone")
        scale = backbone.get("time_scale", 1000)
        low, high = said.get(f"{short}_cfg_interval", (0, 500))
        assert (sampling.steps, sampling.rescale_t) == (
            said.get(f"{short}_inference_steps", 25),
            said.get(f"{short}_rescale_t", 3),
        )
        assert sampling.cfg_strength == said.get(f"{short}_cfg_strength", strength) and not sampling.shortcut
        assert (
            sampling.cfg_interval == (1 - min(high / scale, 1), 1 - min(low / scale, 1))
            and sampling.time_scale == scale
        )
        assert sampling.single == backbone["_target_"].endswith("FlowMatching")
        path = file.generators[stage].path
        drawn = backbone.get("training_time_sampler_fn", {"mean": -1, "std": 1})
        assert (path.sigma_min, path.mean, path.std) == (
            backbone.get("sigma_min", 0),
            -drawn["mean"],
            drawn["std"],
        )
    assert file.prune == (said.get("downsample_ss_dist") or 0) and file.pose == said.get(
        "pose_decoder_name", pose.SHIFTED
    )
    want = case["ss_times_pipeline_t"]
    assert (
        error(
            1 - torch.tensor(times(replace(file.sampling["structure"], steps=len(want) - 1))).double(), want
        )
        < VELOCITY
    )


@RELEASED
@pytest.mark.parametrize(("stage", "strength"), [("structure", 7), ("latent", 5)])
def test_the_released_settings(path, stage, strength, tmp_path):
    """25 steps, of which 19 are guided, in both stages."""
    quoted = json.loads(path.read_text())
    if f"{files.SHORT[stage]}_generator" not in quoted:
        pytest.skip(f"this set has no {files.SHORT[stage]}_generator in {path.name}")
    generator = generator_of(quoted, files.SHORT[stage], stage, tmp_path)
    made = files._sampling(tmp_path, {}, stage, generator)
    assert (made.steps, made.rescale_t, made.cfg_strength) == (25, 3.0, strength)
    assert made.cfg_interval == (0.5, 1.0) and sum(guides(made, t) for t in times(made)[:-1]) == 19
    backbone = quoted[f"{files.SHORT[stage]}_generator"]["module"]["generator"]["backbone"]
    drawn = backbone.get("training_time_sampler_fn", {"mean": -1, "std": 1})
    wanted = (backbone.get("sigma_min", 0), -drawn["mean"], drawn["std"])
    assert (generator.path.sigma_min, generator.path.mean, generator.path.std) == wanted
    said = backbone.get("loss_weights", {})
    assert (generator.weights or {}) == {name: value for name, value in said.items() if name != "_target_"}


def generator_of(quoted, short, stage, folder):
    place = folder / f"{short}.yaml"
    place.write_text(yaml.safe_dump(quoted[f"{short}_generator"]))
    return files._generator(stage, place, folder / "no.ckpt")


# Names and shapes at the released sizes.


@RELEASED
@pytest.mark.parametrize("short", ["ss", "slat"])
def test_names_and_shapes_of_generators(path, short, tmp_path):
    listed = {
        name: torch.empty(shape, device="meta")
        for name, shape in table(path.with_name(f"{path.stem}__{short}_generator.tsv")).items()
    }
    generator = generator_of(json.loads(path.read_text()), short, STAGE_OF[short], tmp_path)
    flow = files.flow_state(generator, listed)
    embedder = files.embedder_state(generator, listed)
    assert len(flow) + len(embedder) == len(listed)
    assert shapes(empty(lambda: files.network_of(generator.config)(generator.config)).state_dict()) == shapes(
        flow
    )
    encoders = files.embedder_of(generator, embedder)
    assert shapes(encoders.state_dict()) == shapes(files.rename_dino_tensors(encoders, embedder))


@RELEASED
@pytest.mark.parametrize("name", ["ss_decoder", "slat_decoder_gs", "slat_decoder_gs_4", "ss_encoder"])
def test_names_and_shapes_of_autoencoders(path, name, file, tmp_path):
    """The encoder's sizes are a guess: those of TRELLIS."""
    guess = {
        "in_channels": 1,
        "latent_channels": 8,
        "num_res_blocks": 2,
        "num_res_blocks_middle": 2,
        "channels": [32, 128, 512],
    }
    want = table(path.with_name(f"{'guess' if name == files.ENCODER else path.stem}__{name}.tsv"))
    quoted = json.loads(path.read_text()).get(name, guess if name == files.ENCODER else None)
    if quoted is None:
        pytest.skip(f"this set has no {name} in {path.name}")
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(quoted))
    parts = {known: part for part, (known, *_) in files.AUTOENCODERS.items()}
    part = parts[name.removesuffix("_4")]
    places = {
        f"{name.removesuffix('_4')}.config": tmp_path / f"{name}.yaml",
        f"{name.removesuffix('_4')}.ckpt": tmp_path / "no.ckpt",
    }
    make, config, _ = files.part_of(replace(file, files=places), part)
    assert shapes(empty(lambda: make(config)).state_dict()) == want


# Pictures and tokens.


def written(case, folder, k, name, shift=0):
    """Write a picture and its point map as files. Args: shift: pixels that they are rolled by."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.roll(case[f"pre{k}_rgba"].numpy(), shift, 1)).save(folder / f"{name}.png")
    np.save(folder / f"{name}.npy", np.roll(case[f"pre{k}_points"].numpy(), shift, 1))
    return folder / f"{name}.png"


def told(case, file, short, k):
    """Opaque pictures, too: refused as files, not by the way they are cut out."""
    return object_inputs(
        case[f"pre{k}_rgba"].numpy(),
        case[f"pre{k}_points"] if short == "ss" else None,
        file.cuts[STAGE_OF[short]],
    )


def test_what_the_embedders_are_told(case, short, file):
    compared = 0
    for k in pictures_of(case):
        made = told(case, file, short, k)
        wanted = {
            name.partition("/")[2]: case[name] for name in case.names if name.startswith(f"pre{k}_{short}/")
        }
        compared += len(wanted)
        for name, want in wanted.items():
            got = made[name.replace("rgb_pointmap_s", "pointmap_s")]  # scale and shift are stored twice
            assert torch.equal(got.isfinite(), want.isfinite())
            assert error(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)) < INPUTS, (k, name)
    if not compared:
        pytest.skip(f"{case.folder.name} has no pre<k>_{short}/...")


def test_tokens(case, short, file):
    embedder = files.load_embedder(file.generators[STAGE_OF[short]])
    for k in pictures_of(case):
        given = told(case, file, short, k)
        given |= {
            name: case[f"pre{k}_{short}/{name}"]
            for name in embedder.names
            if f"pre{k}_{short}/{name}" in case
        }
        with torch.no_grad():
            made = embedder({name: given[name][None] for name in embedder.names})[0]
        assert error(made, case[f"pre{k}_{short}_tokens"]) < TOKENS, k


def cut_out(case):
    """Numbers of pictures that are not opaque."""
    kept = [k for k in pictures_of(case) if bool((case[f"pre{k}_rgba"][..., 3] < 255).any())]
    return kept or pytest.skip(f"{case.folder.name} has no picture that is cut out")


@pytest.fixture
def conditions(case, root, tmp_path):
    """Of the case's pictures, by the command's own way."""
    paths = {str(k): written(case, tmp_path / "IMAGES", k, str(k)) for k in cut_out(case)}
    return family.FAMILY.embed_images(root, paths, torch.device("cpu"))


def test_pictures_become_conditions(case, root, conditions):
    """With the point map's scale and shift beside the tokens; those of other preparation are refused."""
    for name, told in conditions.tokens.items():
        for short, stage in STAGE_OF.items():
            assert error(told[stage], case[f"pre{name}_{short}_tokens"]) < TOKENS
        assert error(told[family.SCALE], case[f"pre{name}_ss/pointmap_scale"]) < INPUTS
        assert error(told[family.SHIFT], case[f"pre{name}_ss/pointmap_shift"]) < INPUTS
    family.FAMILY.load(root, conditions)
    other = conditions.encoder.replace("box", "side")
    with raising("conditioning:", conditions.encoder, other, "eg3d-rlhf"):
        family.FAMILY.load(root, Conditioning(tokens=conditions.tokens, encoder=other, zero_null=True))


# Voxels, decoders, the pose.


def rows(coords):
    return coords[:, 1:].tolist() if coords.shape[1] == 4 else coords.tolist()


def test_structure_decoder_and_inner_voxels(case, file):
    decoder = files.load_part(file, "structure decoder")
    shape = case["dec_shape"]
    grid = shape.mT.unflatten(2, [round(shape.shape[1] ** (1 / 3))] * 3)
    with torch.no_grad():
        logits = decoder(grid)
    assert error(logits, case["dec_logits"]) < DECODED
    coords = case["dec_coords"]
    for b in range(len(shape)):
        (voxels,) = family.voxels_of(logits[b : b + 1])
        assert voxels.tolist() == rows(coords[coords[:, 0] == b])
        for name, left in case.below("dec_pruned").items():
            if name.endswith(f"_{b}"):
                assert family.remove_inner_voxels(voxels, int(name.partition("_")[0])).tolist() == rows(
                    left
                ), name
    for n, left in case.below("prune_out").items():
        assert family.remove_inner_voxels(case["prune_in"][:, 1:], int(n)).tolist() == rows(left), n


def test_the_pipeline_decodes_shapes_and_latents_as_the_flows_see_them(case, pipeline, file):
    for b, shape in enumerate(case["dec_shape"]):
        coords = case["dec_coords"]
        want = case[f"dec_pruned{file.prune}_{b}"] if file.prune else coords[coords[:, 0] == b]
        assert pipeline.structure(shape)[0].tolist() == rows(want)
    (asset,) = pipeline.decode(SparseBatch(case["gs_coords"], case["gs_latent_normalised"], 1))
    for name, made in {"get_xyz": asset.means, "get_opacity": asset.opacities}.items():
        assert error(made.view_as(case[f"gs_{name}"]), case[f"gs_{name}"]) < DECODED, name


def test_a_shape_of_too_many_voxels_is_made_small(case):
    most = int(case["down_max"])
    voxels, factor = family.reduce_voxels(case["prune_in"][:, 1:], most)
    assert factor == (2 if len(case["prune_in"]) > most else 1)
    assert voxels.tolist() == rows(case["down_out"])
    few = min(7, len(voxels) - 1)
    fewer, _ = family.reduce_voxels(case["prune_in"][:, 1:], few)
    assert len(fewer) == few and {*map(tuple, fewer.tolist())} <= {*map(tuple, voxels.tolist())}


def test_pose(case):
    latents = case.below("pose_in/")
    scale, shift = (
        case[f"pose_scene_{name}"].expand(len(latents["scale"]), 3) for name in ("scale", "shift")
    )
    for how in case.fact("pose_decoders"):
        made = pose.decode_pose(latents, how, scale, shift)
        want = case.below(f"pose_{how}/")
        assert error(made.translation[:, None], want["translation"]) < DECODED
        assert error(made.scale[:, None], want["scale"]) < DECODED
        # q and -q are one rotation
        turned = torch.where(want["rotation"][..., :1] < 0, -1, 1) * want["rotation"]
        assert error(made.quaternion[:, None], turned) < DECODED


def test_gaussians(case, file):
    decoder = files.load_part(file, "decoder")
    coords, feats = case.of("gs_coords", "gs_latent")
    scaled = case["gs_latent_normalised"] * torch.tensor(file.std) + torch.tensor(file.mean)
    assert error(scaled, feats) < VELOCITY
    with torch.no_grad():
        (made,) = decoder(SparseBatch(coords, feats, 1))
    raw = {
        "xyz": made.xyz,
        "features_dc": made.features_dc,
        "scaling": made.scaling,
        "rotation": made.rotation,
        "opacity": made.opacity,
    }
    drawn = {
        "get_xyz": made.means,
        "get_scaling": made.scales,
        "get_rotation": made.rotations,
        "get_opacity": made.opacities,
    }
    for name, tensor in (raw | drawn).items():
        assert error(tensor, case[f"gs_{name}"]) < DECODED, name
    assert error(decoder.offset_perturbation, case["gs_offset_perturbation"]) < VELOCITY


# Adapters, DPO, export.


@pytest.fixture(scope="module")
def adapter(case):
    """PEFT's folder."""
    return case.file(case.fact("adapter"))


def test_adapters_are_pefts(case, flows, adapter, tmp_path):
    x = batch(case, "ss", "x")
    t, cond = case.of("ss_t", "ss_cond")
    step = steps_of(case, "ss", flows["structure"])
    model = flows["structure"]
    tuned = tuned_model(model, adapter)
    want = case.below("lora_ss_y/")
    with torch.no_grad():
        assert max(distances(called(tuned, x, t, cond, *step), want).values()) < ADAPTED
        model.load_state_dict(merged_state(tuned))
        assert max(distances(called(model, x, t, cond, *step), want).values()) < ADAPTED
    made, given = (
        read_content(path / ADAPTER, "test") for path in (write_adapter(tuned, tmp_path / "ours"), adapter)
    )
    assert made.keys() == given.keys() == {f"{PREFIX}{name}" for name in adapter_state(tuned)}
    assert all(torch.equal(made[name], given[name]) for name in given)


def test_a_step_of_dpo(case, stages, flows, adapter):
    stage = stages["structure"]
    model = load_weights(flows["structure"], read_weights(adapter))
    pairs = [NamedBatch(case.below(f"dpo_{name}/")) for name in ("preferred", "rejected", "noise")]
    both = [
        NamedBatch({name: torch.cat([a[name], b[name]]) for name in a.tensors})
        for a, b in (pairs[:2], pairs[2:] * 2)
    ]
    t, cond = (torch.cat([x, x]) for x in (1 - case["dpo_t"], case["dpo_cond"]))
    x_t = stage.path.mix(both[0], t, both[1])

    def errors():
        return stage.path.errors(stage.velocity(x_t, t, cond, model), *both)

    with torch.no_grad(), adapters_off(model):
        reference = errors()
    found = PairErrors.split(errors(), reference)
    made_of = {
        "w": found.preferred,
        "l": found.rejected,
        "ref_w": found.ref_preferred,
        "ref_l": found.ref_rejected,
    }
    for name, made in made_of.items():
        want = torch.stack([*case.below(f"dpo_error_{name}/").values()]).mean(0)
        assert error(made, want) < VELOCITY, name
    loss = pair_loss(found, DpoConfig(beta=float(case["dpo_beta"]))).mean()
    assert error(loss, case["dpo_loss"]) < GRADIENT and error(found.delta(), case["dpo_margin"]) < GRADIENT
    loss.backward()
    check_gradients(gradients(model), case.below("dpo_grad/"))


def test_an_exported_folder_is_the_originals_with_merged_weights(case, root, file, adapter, tmp_path):
    report = export(family.FAMILY, case.folder, tmp_path / "TUNED", {"structure": adapter})
    made = tmp_path / "TUNED" / Path(root).relative_to(case.folder)
    assert {path.name for path in made.iterdir()} == {path.name for path in Path(root).iterdir()}
    assert 0 <= report["tuned"]["structure"]["rounding"] < 1
    generator = file.generators["structure"]
    old, new = (
        read_content(path, "test") for path in (generator.checkpoint, made / generator.checkpoint.name)
    )
    assert old.keys() == new.keys() and shapes(old["state_dict"]) == shapes(new["state_dict"])
    assert all(new["state_dict"][name].dtype == tensor.dtype for name, tensor in old["state_dict"].items())
    changed = {
        name for name, tensor in old["state_dict"].items() if not torch.equal(tensor, new["state_dict"][name])
    }
    assert {name.removesuffix(".weight") for name in changed} == {
        files.FLOW + name for name in read_weights(adapter).adapters
    }
    again = files.load_flow(files.read_pipeline(tmp_path / "TUNED").generators["structure"], torch.float32)
    x = batch(case, "ss", "x")
    t, cond = case.of("ss_t", "ss_cond")
    with torch.no_grad():
        y = called(again, x, t, cond, *steps_of(case, "ss", again))
    limit = rounding_of(files.flow_state(generator, old["state_dict"]).values())
    assert max(distances(y, case.below("lora_ss_y/")).values()) < limit


def test_the_folder_is_found_fit(case):
    done = CliRunner().invoke(check, [str(case.folder)])
    assert done.exit_code == 0 and "sam3d" in done.output and "FAULT" not in done.output, done.output


@pytest.mark.long
def test_from_pictures_to_a_tuned_folder_as_documented(case, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = at_least(3, cut_out(case))
    for name, (k, shift) in shown.items():
        written(case, Path("IMAGES"), k, name, shift)

    def look(called, done):
        if called == "sample":
            drawn = Work.open(Path("WORK")).lines()
            assert {row["condition"] for row in drawn} < set(shown)
            assert all(set(row["pose"]) == {"rotation", "translation", "scale"} for row in drawn)

    called = run_section("SAM 3D Objects", root, Path(), FEW, look)
    assert called == ["new", "sample", "pairs", "train", "train", "export"]
    read = read_conditioning(Path("WORK"))
    base, tuned = (family.FAMILY.load(place, read) for place in (root, Path("TUNED")))
    for one, other in zip(base.stages, tuned.stages, strict=True):
        both = zip(one.model.parameters(), other.model.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in both), one.name
    assert generate(tuned, [read.names[0]], [0])[0].means.isfinite().all()

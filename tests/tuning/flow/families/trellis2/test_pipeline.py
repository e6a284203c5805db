"""TRELLIS.2's folder: what is read, the four stages, and what is rejected."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.base.ranking import read_latents, write_latents
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.families import trellis2 as family
from eg3d_rlhf.tuning.flow.families import trellis2_files as files
from eg3d_rlhf.tuning.flow.families.trellis2 import FAMILY, finer_voxels
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw
from tests.rejections import raising
from tests.tuning.flow.families.trellis2.tiny_trellis2 import (
    MODELS,
    NAMES,
    PIPELINE,
    E,
    tokens,
    write_pipeline,
)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({"models": {"tex_slat_decoder": "x"}}, ("'1024_cascade'", "sparse_structure_flow_model")),
        ({"default_pipeline_type": "2048"}, ("default_pipeline_type", "1536_cascade", "'2048'")),
        ({"tex_slat_sampler": {"name": "DDIMSampler"}}, ("FlowEuler", "tex_slat_sampler", "'DDIM")),
        (
            {"shape_slat_sampler": {"params": {"cfg_strength": 7.5}}},
            ("shape_slat_sampler", "guidance_strength", "cfg_strength"),
        ),
        (
            {"shape_slat_sampler": {"params": {"guidance_strength": 0.5}}},
            ("shape_slat_sampler", "guidance_strength", "0.5"),
        ),
        ({"shape_slat_sampler": {"params": {"steps": 0}}}, ("shape_slat_sampler", "steps")),
        ({"tex_slat_normalization": {"mean": [0.0], "std": [0.0]}}, ("tex_slat_normalization", "[0.0]")),
        ({"tex_slat_normalization": None}, ("tex_slat_normalization", "mean")),
    ],
)
def test_unsuitable_pipelines_are_rejected(tmp_path, args, names):
    with raising(*names):
        files.read_pipeline(write_pipeline(tmp_path, **args))


def test_no_pipeline_and_a_pipeline_of_trellis_are_rejected(tmp_path):
    with raising("TRELLIS.2", "pipeline.json", str(tmp_path), kind=FileNotFoundError):
        files.read_pipeline(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps({**PIPELINE, "name": "TrellisImageTo3DPipeline"}))
    with raising("Trellis2ImageTo3DPipeline", "'TrellisImageTo3DPipeline'"):
        files.read_pipeline(tmp_path)


@pytest.mark.parametrize("stem", MODELS)
def test_models_are_loaded_by_name_and_shape_with_their_own_types(trellis2_root, stem):
    path = trellis2_root / "ckpts" / stem
    stored = load_file(f"{path}.safetensors")
    state = files.load_model(path).state_dict()
    assert set(state) == set(stored) and all(
        torch.equal(state[n], stored[n]) and state[n].dtype == stored[n].dtype for n in stored
    )
    half = {name for name, tensor in stored.items() if tensor.dtype in (torch.bfloat16, torch.float16)}
    types = {
        name: tensor.dtype
        for name, tensor in files.load_model(path, dtype=torch.float64).state_dict().items()
    }
    assert half and types == {name: torch.float64 if name in half else torch.float32 for name in stored}


def test_unsuitable_models_are_rejected(copied):
    stem = copied / "ckpts" / "tex_1024"
    state = load_file(f"{stem}.safetensors")
    renamed = {name.replace("mlp.mlp", "mlp.net"): tensor for name, tensor in state.items()}
    save_file(renamed, f"{stem}.safetensors")
    with raising("missing: blocks.0.mlp.mlp.0.bias, ", "unexpected: blocks.0.mlp.net.0.bias, "):
        files.load_model(stem)
    shutil.copy(f"{copied}/ckpts/shape_1024.safetensors", f"{stem}.safetensors")
    with raising("misshapen: input_layer.weight", "[24, 4]", "[24, 8]"):
        files.load_model(stem)
    stem.with_name("tex_1024.json").write_text(
        json.dumps({"name": "SLatFlowModel", "args": {**MODELS["tex_1024"]["args"], "colour": 1}})
    )
    with raising("tex_1024.json", "unknown: colour"):
        files.load_model(stem)


def test_both_spellings_of_a_convolution(copied):
    stem = copied / "ckpts" / "shape_dec"
    state = load_file(f"{stem}.safetensors")
    nested = {
        name.replace("conv1.", "conv1.conv.")
        .replace("conv2.", "conv2.conv.")
        .replace(".0.conv.", ".0.conv.conv."): tensor
        for name, tensor in state.items()
    }
    assert len(set(nested) - set(state)) == 6
    save_file(nested, f"{stem}.safetensors")
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in files.load_model(stem).state_dict().items()
    )


def test_stored_angles_must_match_the_resolution(copied):
    stem = copied / "ckpts" / "ss_flow"
    model = files.load_model(stem)
    angles = model.angles(model.places())
    state = load_file(f"{stem}.safetensors")
    path = copied / "ss_flow.pt"
    torch.save(state | {"rope_phases": torch.polar(torch.ones_like(angles), angles)}, path)
    assert set(files.load_model(stem, weights_path=path).state_dict()) == set(state)
    for wrong in (torch.polar(torch.ones_like(angles), 2 * angles), torch.zeros(64, 6)):
        torch.save(state | {"rope_phases": wrong}, path)
        with raising("rope_phases", "[64, 6]"):
            files.load_model(stem, weights_path=path)


def test_every_stage_leaves_voxels_to_the_next(pipeline):
    structure, low, high, texture = pipeline.stages
    assert [s.name for s in pipeline.stages] == list(files.STAGES)
    assert (low.latents.resolution, high.latents.resolution, texture.latents.given) == (4, 8, 4)
    x_0 = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    voxels = pipeline.advance("structure", x_0)
    assert [v.shape[1] for v in voxels] == [3, 3] and all(int(v.max()) < 4 for v in voxels)
    drawn = low.noise([1, 2], voxels)
    fine = pipeline.advance("shape_512", drawn)
    for before, after in zip(voxels, fine, strict=True):
        assert (
            set(map(tuple, (after.coords // 2).tolist())) <= set(map(tuple, before.tolist()))
            and after.cells == 8
        )
        assert len(torch.unique(after.coords, dim=0)) == len(after.coords)
    latents = high.noise([1, 2], fine)
    left = pipeline.advance("shape_1024", latents)
    assert all(
        isinstance(asset, SparseSample) and torch.equal(asset.coords, places.coords)
        for asset, places in zip(left, fine, strict=True)
    )
    noise = texture.noise([3, 4], left)
    assert torch.equal(noise.given, latents.feats) and not torch.equal(noise.feats, latents.feats)
    asset, _ = pipeline.decode(noise)
    assert (
        asset.resolution == 16
        and asset.vertices.shape == asset.crossed.shape == (len(asset.coords), 3)
        and asset.materials.shape[1] == 6
    )
    assert asset.crossed.dtype == torch.bool and set(map(tuple, (asset.coords // 2).tolist())) <= set(
        map(tuple, fine[0].coords.tolist())
    )
    with raising("advance", "structure", "shape_512", "shape_1024", "'texture'"):
        pipeline.advance("texture", noise)


def test_every_stage_reads_the_tokens_of_its_image_size(pipeline):
    lengths = {stage: pipeline.conditioning(NAMES[:2], stage).shape for stage in files.STAGES}
    assert lengths == {
        "structure": (2, 3, E),
        "shape_512": (2, 3, E),
        "shape_1024": (2, 5, E),
        "texture": (2, 5, E),
    }
    assert (
        pipeline.null_conditioning(3, "texture").shape == (3, 5, E)
        and not pipeline.null_conditioning(1, "structure").any()
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [("512", ["structure", "shape_512", "texture"]), ("1024", ["structure", "shape_1024", "texture"])],
)
def test_without_a_cascade(copied, kind, names):
    opened = FAMILY.load(write_pipeline(copied, default_pipeline_type=kind), tokens())
    assert [s.name for s in opened.stages] == names
    side = 16 if kind == "1024" else 8
    assert generate(opened, NAMES[:1], [0])[0].resolution == side
    assert opened.conditioning(NAMES[:1], "texture").shape[1] == (5 if kind == "1024" else 3)


def test_a_cascade_lowers_the_resolution_if_there_are_too_many_voxels(copied, monkeypatch):
    opened = FAMILY.load(write_pipeline(copied, default_pipeline_type="1536_cascade"), tokens())
    assert [s.latents.resolution for s in opened.stages] == [4, 4, 12, 12]
    monkeypatch.setattr(family, "RESOLUTION_STEP", 4)
    for most, cells in ((10**6, 12), (1, 8)):
        finer = partial(finer_voxels, voxel_limit=most)
        monkeypatch.setattr(family, "finer_voxels", finer)
        ((latents, asset),) = draw(opened, [NAMES[0]], [0])
        assert (
            latents["texture"].cells == cells
            and asset.resolution == 2 * cells
            and int(asset.coords.max()) < 2 * cells
        )
        write_latents(copied / "x.safetensors", latents)
        again = read_latents(copied / "x.safetensors")
        assert (
            again["texture"].cells == cells
            and opened.decode(SparseBatch.join([again["texture"]]))[0].resolution == 2 * cells
        )


def test_unsuitable_embeddings_are_rejected(trellis2_root):
    flat = tokens()
    for given in (
        tokens(size=7),
        type(flat)(tokens={n: t["512"] for n, t in flat.tokens.items()}, zero_null=True),
    ):
        with raising("conditioning", "[L, 6]", "'512'", "'structure'", "dinov3-"):
            FAMILY.load(trellis2_root, given)


def test_models_that_do_not_fit_each_other(copied):
    models = PIPELINE["args"]["models"]
    with raising("'structure'", "VoxelFlow"):
        FAMILY.load(
            write_pipeline(copied, models={**models, "sparse_structure_flow_model": "ckpts/tex_512"}),
            tokens(),
        )
    with raising("sparse_structure_decoder", ".json", kind=FileNotFoundError):
        FAMILY.load(
            write_pipeline(
                copied, models={**models, "sparse_structure_decoder": "someone/else/ckpts/ss_dec"}
            ),
            tokens(),
        )


def test_latents_of_another_kind(pipeline):
    texture = pipeline.stages[-1]
    coords = torch.tensor([[0, 0, 0]])
    feats = torch.zeros(1, 4)
    with raising("x: ", "4 given", "0", "'texture'"):
        texture.check("x", SparseSample(coords, feats))
    with raising("x: ", "voxels", "grid", "'texture'"):
        texture.check("x", torch.zeros(2, 4, 4, 4))
    with raising("decode", "texture", "shape"):
        pipeline.decode(SparseBatch.join([SparseSample(coords, feats)]))

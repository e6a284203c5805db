"""pipeline.json and the models it names: what is read, what may be missing, where files are searched for, and
what is rejected.
"""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from eg3d_rlhf.tuning.flow.base.stage import Sampling
from eg3d_rlhf.tuning.flow.families import trellis_files as files
from eg3d_rlhf.tuning.flow.families.trellis_files import load_model
from tests.rejections import raising
from tests.tuning.flow.families.trellis.tiny_trellis import MODELS, PIPELINE


def write(folder, **args):
    content = copy.deepcopy(PIPELINE)
    content["args"] |= args
    (folder / "pipeline.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def copied(trellis_root, tmp_path):
    return shutil.copytree(trellis_root, tmp_path / "root")


def test_settings_of_pipeline_json_are_read(trellis_root):
    file = files.read_pipeline(trellis_root)
    assert file.kind == "text" and file.encoder == "openai/clip-vit-large-patch14"
    assert file.sampling["structure"] == Sampling(
        steps=3, cfg_strength=2.0, cfg_interval=(0.5, 0.95), rescale_t=3.0
    )
    assert file.sigma_min == {"structure": 1e-5, "latent": 1e-5}
    assert file.mean == (-2.0, 0.5, 0.0, 1.0) and file.std == (2.0, 1.5, 0.5, 1.0)


def test_missing_settings_have_trellis_defaults(tmp_path):
    models = PIPELINE["args"]["models"]
    for kind, expected in (
        ("Text", Sampling(cfg_strength=7.5, cfg_interval=(0.5, 0.95))),
        ("Image", Sampling()),
    ):
        (tmp_path / "pipeline.json").write_text(
            json.dumps({"name": f"Trellis{kind}To3DPipeline", "args": {"models": models}})
        )
        file = files.read_pipeline(tmp_path)
        assert file.sampling == {"structure": expected, "latent": expected}
        assert len(file.mean) == 8 and file.mean[0] == -2.16875
    assert file.encoder == "dinov2_vitl14_reg"


def test_samplers_without_guidance_or_without_interval(tmp_path):
    write(
        tmp_path,
        sparse_structure_sampler={"name": "FlowEulerSampler", "params": {"steps": 7}},
        slat_sampler={"name": "FlowEulerCfgSampler", "params": {"cfg_strength": 3}},
    )
    sampling = files.read_pipeline(tmp_path).sampling
    assert sampling["structure"].cfg_strength == 0 and sampling["structure"].steps == 7
    assert sampling["latent"].cfg_strength == 3 and sampling["latent"].cfg_interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({"models": {"slat_flow_model": "ckpts/x"}}, ("structure", "sparse_structure_flow_model")),
        ({"slat_sampler": {"name": "DDIMSampler"}}, ("FlowEuler", "slat_sampler", "'DDIMSampler'")),
        (
            {"slat_sampler": {"name": "FlowEulerSampler", "params": {"steps": 0}}},
            ("slat_sampler", "steps"),
        ),
        ({"slat_normalization": {"mean": [0.0], "std": [0.0]}}, ("slat_normalization", "[0.0]")),
        (
            {"slat_normalization": {"mean": [0.0, 1.0], "std": [1.0]}},
            ("slat_normalization", "[0.0, 1.0]", "[1.0]"),
        ),
    ],
)
def test_unsuitable_pipelines_are_rejected(tmp_path, args, names):
    with raising(*names):
        files.read_pipeline(write(tmp_path, **args))


def test_no_pipeline_and_foreign_ones(tmp_path):
    with raising("TRELLIS", "pipeline.json", str(tmp_path), kind=FileNotFoundError):
        files.read_pipeline(tmp_path)
    (tmp_path / "pipeline.json").write_text("{")
    with raising("pipeline.json", "JSON"):
        files.read_pipeline(tmp_path)
    (tmp_path / "pipeline.json").write_text('{"name": "StableDiffusionPipeline", "args": {}}')
    with raising("pipeline.json", "'StableDiffusionPipeline'"):
        files.read_pipeline(tmp_path)


def test_models_are_found_in_all_documented_places(copied, tmp_path, monkeypatch):
    file = files.read_pipeline(copied)
    assert files.find_model(file, "slat_flow_model") == copied / "ckpts" / "slat_flow"
    assert files.find_model(file, "sparse_structure_encoder").name == "ss_enc_conv3d_16l8_fp16"
    with raising("slat_decoder_mesh", ".json", ".safetensors", ".pt", kind=FileNotFoundError):
        files.find_model(file, "slat_decoder_mesh")
    with raising("slat_decoder_rf", "pipeline.json", kind=FileNotFoundError):
        files.find_model(file, "slat_decoder_rf")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in (
        tmp_path / "hub" / "models--someone--trellis-image" / "snapshots" / "0a1b" / "ckpts",
        tmp_path / "trellis-image" / "ckpts",
    ):
        folder.mkdir(parents=True)
        for ending in (".json", ".safetensors"):
            shutil.copy(copied / "ckpts" / f"slat_dec_gs{ending}", folder / f"slat_dec_mesh{ending}")
        assert files.find_model(file, "slat_decoder_mesh") == folder / "slat_dec_mesh"
        shutil.rmtree(folder)


def test_encoders_are_found_beside_the_decoders_of_another_model(copied, tmp_path):
    other = tmp_path / "trellis-image" / "ckpts"
    shutil.copytree(copied / "ckpts", other)
    for path in (copied / "ckpts").glob("ss_[de]*"):
        path.unlink()
    models = {**PIPELINE["args"]["models"], "sparse_structure_decoder": "x/trellis-image/ckpts/ss_dec"}
    file = files.read_pipeline(write(copied, models=models))
    assert files.find_model(file, "sparse_structure_encoder") == other / "ss_enc_conv3d_16l8_fp16"


@pytest.mark.parametrize("stem", MODELS)
def test_models_are_loaded_with_their_own_types(trellis_root, stem):
    path = trellis_root / "ckpts" / stem
    stored = load_file(f"{path}.safetensors")
    state = load_model(path).state_dict()
    assert list(stored) != [] and all(
        torch.equal(state[name], stored[name]) and state[name].dtype == stored[name].dtype for name in stored
    )
    assert set(state) == set(stored)


def test_training_checkpoints(trellis_root, tmp_path):
    stem = trellis_root / "ckpts" / "ss_flow"
    masters = {f"module.{name}": tensor.float() for name, tensor in load_file(f"{stem}.safetensors").items()}
    path = tmp_path / "denoiser_ema0.9999_step0000100.pt"
    torch.save(masters, path)
    assert all(
        torch.equal(t, masters[f"module.{name}"])
        for name, t in load_model(stem, weights_path=path).state_dict().items()
    )
    torch.save({"optimizer": {"lr": 1.0}, "step": torch.ones(1)}, path)
    with raising("denoiser_ema0.9999_step0000100.pt", "weights"):
        load_model(stem, weights_path=path)


def test_unsuitable_models_are_rejected(copied):
    stem = copied / "ckpts" / "ss_flow"
    state = load_file(f"{stem}.safetensors")
    save_file({name: t for name, t in state.items() if "out_layer" not in name}, f"{stem}.safetensors")
    with raising("missing: out_layer.bias, out_layer.weight"):
        load_model(stem)
    state["out_layer.bias"] = state["out_layer.bias"] * float("nan")
    save_file(state, f"{stem}.safetensors")
    with raising("ss_flow", "out_layer.bias"):
        load_model(stem)
    stem.with_name("ss_flow.safetensors").write_bytes(b"truncated")
    with raising("ss_flow.safetensors"):
        load_model(stem)
    stem.with_name("ss_flow.safetensors").unlink()
    with raising("ss_flow.json", kind=FileNotFoundError):
        load_model(stem)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"name": "UNet", "args": {}}, ("SparseStructureFlowModel", "'UNet'")),
        (
            {"name": "SparseStructureFlowModel", "args": {"colour": 1, "resolution": 4}},
            ("unknown: colour", "missing: cond_channels"),
        ),
    ],
)
def test_unsuitable_architectures_are_rejected(copied, content, names):
    (copied / "ckpts" / "ss_flow.json").write_text(json.dumps(content))
    with raising("ss_flow.json", *names):
        load_model(copied / "ckpts" / "ss_flow")

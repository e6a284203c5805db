"""Hunyuan3D-2.1's folder: read strictly, tuned, exported; unsuitable files are rejected in one line."""

import json
import re

import numpy as np
import pytest
import torch
import trimesh
import yaml
from click.testing import CliRunner
from PIL import Image

import train
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.export import export
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, read_pairs, write_pairs
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION, check_convention
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families import hunyuan3d as family
from eg3d_rlhf.tuning.flow.families import hunyuan3d_files as layout
from tests.modes.flow_works import flow
from tests.rejections import check_message, raising, rejected
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import (
    CONTENT,
    LATENTS,
    NAMES,
    C,
    E,
    L,
    tokens,
    write_hunyuan3d,
)

FEW = "--steps=2 --batch=2 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --device=cpu".split()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "STEPS", 3)
    return write_hunyuan3d(tmp_path / "ROOT")


def read(path):
    """Return the checkpoint's sections, copied so that the file may be overwritten."""
    return {
        section: {name: x.clone() for name, x in of.items()}
        for section, of in layout.read_sections(path / "model.fp16.ckpt").items()
    }


def write(path, sections):
    torch.save(sections, path / "model.fp16.ckpt")


def make_pairs(tmp_path, shape=(LATENTS, C), embeddings=None):
    g = torch.Generator().manual_seed(3)
    pairs = [
        PreferencePair(
            id=str(i),
            condition=NAMES[i % 4],
            stage="shape",
            preferred=1 + torch.randn(shape, generator=g),
            rejected=torch.randn(shape, generator=g),
        )
        for i in range(8)
    ]
    write_pairs(tmp_path / "PAIRS" / "shape", pairs, {"convention": CONVENTION})
    write_conditioning(tmp_path / "PAIRS" / "conditioning.safetensors", embeddings or tokens())


def run(tmp_path):
    folders = [
        f"--pipeline={tmp_path / 'ROOT'}",
        f"--pairs={tmp_path / 'PAIRS'}",
        f"--outdir={tmp_path / 'runs'}",
    ]
    return CliRunner().invoke(train.main, ["--mode=circular-dpo", "--stage=shape", *folders, *FEW])


def test_it_is_recognised_by_its_config_also_within_its_repository_and_prints_its_licence(root, tmp_path):
    assert family_of(root).name == "hunyuan3d" and "European Union" in family_of(root).notice
    (tmp_path / "REPO").mkdir()
    root.rename(tmp_path / "REPO" / layout.FOLDER)
    assert family_of(tmp_path / "REPO").name == "hunyuan3d"
    assert layout.read_files(tmp_path / "REPO").tokens == [L, E]


def test_one_stage_is_tuned_kept_merged_and_sampled(root, tmp_path):
    make_pairs(tmp_path)
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    (out,) = (tmp_path / "runs").glob("00000-*")
    pipeline = family.FAMILY.load(root, tokens())
    tuned = tuned_model(pipeline.stages[0].model, out / "shape")
    before, after = (generate(pipeline, ["lamp"], [0], models)[0].latent for models in ({}, {"shape": tuned}))
    assert after.shape == (LATENTS, C) and not torch.equal(before, after)
    (root / "LICENSE").write_text("terms")
    report = export(family_of(root), root, tmp_path / "TUNED", {"shape": out / "shape"})
    assert (
        report["kept"] == ["LICENSE", f"{layout.FOLDER}/{layout.CONFIG}"]
        and (tmp_path / "TUNED" / "LICENSE").read_text() == "terms"
    )
    notice = (tmp_path / "TUNED" / "Notice").read_text()
    assert layout.FOLDER in notice and "LICENSE" in notice and 0 < report["tuned"]["shape"]["rounding"] < 0.5
    old, new = (
        layout.read_sections(path / "model.fp16.ckpt") for path in (root, tmp_path / "TUNED" / layout.FOLDER)
    )
    assert all(torch.equal(old[s][n], new[s][n]) for s in ("vae", "conditioner") for n in old[s])
    changed = {name for name in old["model"] if not torch.equal(old["model"][name], new["model"][name])}
    assert changed and {name.split(".")[-2] for name in changed} == {"to_q", "to_k", "to_v", "out_proj"}
    again = generate(family.FAMILY.load(tmp_path / "TUNED", tokens()), ["lamp"], [0])[0].latent
    torch.testing.assert_close(again, after, atol=0.05, rtol=0.05)  # merged into float16


def test_a_network_with_its_data_at_t_0_is_rejected(root):
    pipeline = family.FAMILY.load(root, tokens())
    (stage,) = pipeline.stages
    x_0 = torch.full([4, LATENTS, C], 0.5)
    # towards data at 1, where all is 0.5
    stage.call = lambda module, x, t, cond: (0.5 - x) / (1 - t).clamp_min(1e-3).view(-1, 1, 1)
    check_convention(stage, x_0, pipeline.conditioning(NAMES, "shape"))
    stage.call = lambda module, x, t, cond: (x - 0.5) / t.clamp_min(1e-3).view(-1, 1, 1)
    with raising("'shape'", "data_at_one=False"):
        check_convention(stage, x_0, pipeline.conditioning(NAMES, "shape"))


def test_tensors_that_do_not_fit_are_rejected_in_one_line(root, tmp_path):
    make_pairs(tmp_path)
    sections = read(root)
    for section, name in (("model", "blocks.4.moe.gate.weight"), ("vae", "post_kl.bias")):
        lacking = {**sections, section: {n: x for n, x in sections[section].items() if n != name}}
        renamed = {
            **sections,
            section: {n + ("x" if n == name else ""): x for n, x in sections[section].items()},
        }
        misshapen = {
            **sections,
            section: {n: x[None] if n == name else x for n, x in sections[section].items()},
        }
        for content, named in (
            (lacking, f"missing: {name}"),
            (renamed, f"unexpected: {name}x"),
            (misshapen, f"misshapen: {name} [1, "),
        ):
            write(root, content)
            rejected(run(tmp_path), f"model.fp16.ckpt, {section}", named)
    write(root, {**sections, "model": {}})
    rejected(run(tmp_path), "model.fp16.ckpt: ", "model, vae")
    write(root, {**sections, "model": {n: x / 0 for n, x in sections["model"].items()}})
    rejected(run(tmp_path), "model.fp16.ckpt", next(iter(sections["model"])))
    (root / "model.fp16.ckpt").write_bytes(b"PK")
    rejected(run(tmp_path), "model.fp16.ckpt")
    assert not (tmp_path / "runs").exists()


def test_latents_and_embeddings_of_other_generators_are_rejected(root, tmp_path):
    make_pairs(tmp_path, shape=(C, 2, 2, 2))
    rejected(run(tmp_path), f"[{LATENTS}, {C}]", f"[{C}, 2, 2, 2]")
    other = Conditioning(
        tokens={name: {"main": torch.zeros(L, E + 1)} for name in NAMES}, encoder="CLIP", zero_null=True
    )
    make_pairs(tmp_path, embeddings=other)
    rejected(run(tmp_path), "CLIP")
    make_pairs(tmp_path, embeddings=Conditioning(tokens=other.tokens, zero_null=True))
    rejected(run(tmp_path), "main [5, 8]", "main [5, 9]")


def test_configs_of_other_networks_are_rejected(root):
    def check_rejected(section, *names, **changes):
        entry = {**CONTENT.get(section, {"target": "a.ImageProcessorV2", "params": {}}), **changes}
        if "params" in changes:
            entry["params"] = {**CONTENT.get(section, {"params": {}})["params"], **changes["params"]}
        (root / layout.CONFIG).write_text(yaml.safe_dump({**CONTENT, section: entry}))
        with raising(*names):
            layout.read_files(root)

    check_rejected("model", "HunYuanDiTPlain", "Other", target="a.Other")
    check_rejected("model", "Hunyuan3D-2.1", "use_pos_emb=True", params={"use_pos_emb": True})
    check_rejected("vae", "ShapeVAE", "windows", params={"windows": 3})
    consistency = "ConsistencyFlowMatchEulerDiscreteScheduler"
    check_rejected("scheduler", " FlowMatchEulerDiscreteScheduler", consistency, target=f"a.{consistency}")
    check_rejected("scheduler", "use_dynamic_shifting", params={"use_dynamic_shifting": True})
    check_rejected("scheduler", "num_train_timesteps", "pcm_timesteps", params={"pcm_timesteps": 100})
    check_rejected(
        "image_processor", " ImageProcessorV2", "MVImageProcessorV2", target="a.MVImageProcessorV2"
    )
    check_rejected("image_processor", "border_ratio", "1", params={"border_ratio": 1.0})
    check_rejected("pipeline", "Hunyuan3DPaintPipeline", target="hy3dgen.texgen.Hunyuan3DPaintPipeline")
    check_rejected("vae", "conditioner", "(7, 4, 8)", "(7, 5, 8)", params={"embed_dim": 5})
    check_rejected("vae", "geo_decoder_downsample_ratio", params={"geo_decoder_downsample_ratio": 2})
    check_rejected(
        "conditioner", "DinoImageEncoder", "'Clip'", params={"main_image_encoder": {"type": "Clip"}}
    )
    check_rejected("conditioner", "DinoImageEncoder", "None", params={"main_image_encoder": ["Dino"]})
    (root / layout.CONFIG).write_text("a: [")
    with raising(layout.CONFIG, "YAML"):
        layout.read_files(root)
    (root / layout.CONFIG).unlink()
    with raising("config.yaml", kind=FileNotFoundError):
        layout.read_files(root)


def write_image(path, box=(20, 10, 60, 50)):
    """Write a coloured box on a transparent background."""
    pixels = np.zeros((80, 100, 4), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = (200, 100, 50, 255)
    Image.fromarray(pixels).save(path)


def test_images_become_tokens_and_the_file_states_their_source(root, tmp_path):
    write_image(tmp_path / "chair.png")
    made = family.FAMILY.embed_images(root, {"chair": tmp_path / "chair.png"}, torch.device("cpu"))
    assert made.form == {"main": [L, E]} and made.zero_null and made.null(2)["main"].abs().max() == 0
    family.FAMILY.load(root, made)
    assert "512" in made.encoder and "0.15" in made.encoder  # pixels, and the border's share
    other = {
        **CONTENT,
        "image_processor": {"target": "a.ImageProcessorV2", "params": {"size": 64, "border_ratio": 0.3}},
    }
    (root / layout.CONFIG).write_text(yaml.safe_dump(other))
    assert layout.read_files(root).image_size == 64
    with raising("64", "512"):
        family.FAMILY.load(root, made)
    Image.new("RGB", (9, 9)).save(tmp_path / "opaque.png")
    with raising("opaque.png", "background"):
        family.FAMILY.embed_images(root, {"opaque": tmp_path / "opaque.png"}, torch.device("cpu"))


def test_settings_that_change_nothing_are_accepted(root):
    def written(**sections):
        (root / layout.CONFIG).write_text(yaml.safe_dump({**CONTENT, **sections}))
        return layout.read_files(root)

    params = {**CONTENT["model"]["params"], "mlp_ratio": 2.0, "windows": 3}
    assert written(model={**CONTENT["model"], "params": params}).model == written().model
    shifted = {
        "target": "a.FlowMatchEulerDiscreteScheduler",
        "params": {"shift": 3.0, "num_train_timesteps": 7},
    }
    assert written(scheduler=shifted).shift == 3.0
    null = {"target": "a.ImageProcessorV2", "params": {"size": 256, "border_ratio": None}}
    made = written(image_processor=null)
    assert (made.image_size, made.border) == (256, 0.15)
    kwargs = {"config": CONTENT["conditioner"]["params"]["main_image_encoder"]["kwargs"]["config"]}
    encoder = {"main_image_encoder": {"type": "DinoImageEncoder", "kwargs": kwargs}}
    # images of 224 pixels
    assert written(conditioner={**CONTENT["conditioner"], "params": encoder}).tokens == [257, E]


def test_sections_that_are_not_needed_may_be_missing(root):
    sections = read(root)
    half = {
        name: tensor for name, tensor in sections["vae"].items() if not name.startswith(layout.ENCODER_HALF)
    }
    write(root, {"model": sections["model"], "vae": {**half, "more": torch.zeros(1)}})
    pipeline = family.FAMILY.load(root, tokens())
    assert generate(pipeline, ["lamp"], [0])[0].latent.isfinite().all()
    with raising("model.fp16.ckpt", "conditioner"):
        family.FAMILY.embed_images(root, {}, torch.device("cpu"))
    with raising(layout.VAE_FOLDER, kind=FileNotFoundError):
        pipeline.encode([None])


def test_meshes_of_the_user_become_pairs(root, tmp_path):
    """The list has assets in place of latents; the encoder may lie in the autoencoder's own folder."""
    sections = read(root)
    (tmp_path / "REPO" / layout.VAE_FOLDER).mkdir(parents=True)
    torch.save(dict(sections["vae"]), tmp_path / "REPO" / layout.VAE_FOLDER / "model.fp16.ckpt")
    half = {
        name: tensor for name, tensor in sections["vae"].items() if not name.startswith(layout.ENCODER_HALF)
    }
    root = root.rename(tmp_path / "REPO" / layout.FOLDER)
    write(root, {**sections, "vae": half})
    (tmp_path / "ASSETS").mkdir()
    lines = []
    for rank, size in ((1, (1, 1, 1)), (2, (1, 3, 1))):
        trimesh.creation.box(size).export(tmp_path / "ASSETS" / f"{rank}.obj")
        lines.append({"condition": "lamp", "rank": rank, "asset": f"{rank}.obj"})
    (tmp_path / "ASSETS" / "ranking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_conditioning(tmp_path / "ASSETS" / "conditioning.safetensors", tokens())

    work = tmp_path / "WORK"
    ranked = f"--labels={tmp_path / 'ASSETS'}"
    flow("new", work, f"--pipeline={tmp_path / 'REPO'}", f"--conditioning={tmp_path / 'ASSETS'}")
    assert re.search(r"\b1 .*\bshape\b", flow("tune", work, ranked, "--pairs-only"))
    (pair,), _ = read_pairs(
        work / "pairs" / "shape", family.FAMILY.load(tmp_path / "REPO", tokens()).stages[0]
    )
    assert pair.preferred.shape == (LATENTS, C) and not torch.equal(pair.preferred, pair.rejected)
    again = family.FAMILY.load(tmp_path / "REPO", None).encode(
        [family.read_mesh(tmp_path / "ASSETS" / "1.obj")]
    )[0]["shape"]
    assert torch.equal(again, pair.preferred)
    check_message(flow("tune", work, ranked, "--set=views=3", code=2), ("--set views", "hunyuan3d"))
    lines[1]["asset"] = "none.obj"
    (tmp_path / "ASSETS" / "ranking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check_message(flow("tune", work, ranked, code=2), ("ASSETS/ranking.jsonl, line 2", "none.obj"))


def test_a_sampled_mesh_has_the_requested_resolution(root):
    asset = family.FAMILY.load(root, tokens()).decode(torch.randn(1, LATENTS, C))[0]
    asset.decoder.geo_decoder.output_proj.bias.data.zero_()
    wide = (asset.surface(cells)[0] for cells in (6, 12))
    few, many = (len(vertices) for vertices in wide)
    assert many > 2 * few


def test_a_shape_without_a_surface_leaves_a_text_and_one_with_nan_an_error(root, tmp_path):
    asset = family.FAMILY.load(root, tokens()).decode(torch.randn(1, LATENTS, C))[0]
    last = asset.decoder.geo_decoder.output_proj
    last.weight.data.zero_()
    last.bias.data.fill_(-1.0)
    shown = family.FAMILY.show(asset, tmp_path / "a", 4)
    assert shown.suffix == ".txt" and shown.read_text().strip()
    last.bias.data.fill_(torch.nan)
    with raising("extract_mesh"):
        family.FAMILY.show(asset, tmp_path / "a", 4)


def test_held_out_labels_of_one_stage_are_used_and_flags_without_effect_rejected(root, tmp_path):
    """Regression: a fifth of the prompts was held out and never used, and flags of a missing evaluator were
    accepted.
    """
    make_pairs(tmp_path)
    folders = [f"--pipeline={root}", f"--pairs={tmp_path / 'PAIRS'}", f"--outdir={tmp_path / 'runs'}"]

    def go(*flags):
        return CliRunner().invoke(
            train.main, ["--mode=circular-dpo", "--stage=shape", *folders, *FEW[:4], "--device=cpu", *flags]
        )

    for flag, named in (
        ("--table-noises=2", "--table-noises"),
        ("--set=choose_noises=2", "--set choose_noises"),
    ):
        assert "no_summary" not in rejected(go(flag), named, "evaluator")
    done = go("--set=held_out_every=1", "--set=patience=1", "--no-control")
    assert done.exit_code == 0 and re.search(r"held_out +[01]\.\d{3}", done.output), done.output
    (stats,) = (tmp_path / "runs" / "artefacts").glob("shape-human-*/training/stats.jsonl")
    lines = [json.loads(line) for line in stats.read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_accuracy" in line][:2] == [0, 1]

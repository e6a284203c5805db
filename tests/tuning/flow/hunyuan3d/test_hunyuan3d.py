"""Hunyuan3D-2.1's folder: read strictly, tuned, written again; and what is refused, in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

import train
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.conditions import Conditions, read_conditions, write_conditions
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families import hunyuan3d as family
from eg3d_rlhf.tuning.flow.generate import generate
from eg3d_rlhf.tuning.flow.pairs import PreferencePair, write_pairs
from eg3d_rlhf.tuning.flow.stage import CONVENTION, check_convention
from tests.tuning.flow.documented_commands import run_section
from tests.tuning.flow.hunyuan3d.tiny_hunyuan3d import CONTENT, LATENTS, NAMES, C, E, L, tokens, write_hunyuan3d

FEW = "--steps=2 --batch=2 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --device=cpu".split()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "STEPS", 3)
    monkeypatch.setattr(family, "GRID", 8)
    return write_hunyuan3d(tmp_path / "ROOT")


def write(path, sections):
    torch.save(sections, path / "model.fp16.ckpt")


def make_pairs(tmp_path, shape=(LATENTS, C), conditions=None):
    g = torch.Generator().manual_seed(3)
    pairs = [PreferencePair(id=str(i), condition=NAMES[i % 4], stage="shape", preferred=1 + torch.randn(shape, generator=g),
                            rejected=torch.randn(shape, generator=g)) for i in range(8)]  # fmt: skip
    write_pairs(tmp_path / "PAIRS" / "shape", pairs, {"convention": CONVENTION})
    write_conditions(tmp_path / "PAIRS" / "conditions.safetensors", conditions or tokens())


def run(tmp_path):
    folders = [f"--pipeline={tmp_path / 'ROOT'}", f"--pairs={tmp_path / 'PAIRS'}", f"--outdir={tmp_path / 'runs'}"]
    return CliRunner().invoke(train.main, ["--mode=circular-dpo", "--stage=shape", *folders, *FEW])


def test_it_is_known_by_its_config_also_within_its_repository_and_says_its_licence(root, tmp_path):
    assert family_of(root).name == "hunyuan3d" and "European Union" in family_of(root).notice
    (tmp_path / "REPO").mkdir()
    root.rename(tmp_path / "REPO" / family.FOLDER)
    assert family_of(tmp_path / "REPO").name == "hunyuan3d"
    assert family.read_files(tmp_path / "REPO").tokens == [L, E]


def test_one_stage_is_tuned_kept_merged_and_sampled(root, tmp_path):
    make_pairs(tmp_path)
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    (out,) = (tmp_path / "runs").glob("00000-*")
    pipeline = family.load(root, tokens())
    tuned = tuned_model(pipeline.stages[0].model, out / "shape")
    before, after = (generate(pipeline, ["lamp"], [0], models)[0].latent for models in ({}, {"shape": tuned}))
    assert after.shape == (LATENTS, C) and not torch.equal(before, after)
    report = family.export(root, tmp_path / "TUNED", {"shape": out / "shape"})["tuned"]["shape"]
    assert report["file"] == "model.fp16.ckpt" and 0 < report["rounding"] < 0.5
    old, new = (family.read_sections(path / "model.fp16.ckpt") for path in (root, tmp_path / "TUNED"))
    assert all(torch.equal(old[s][n], new[s][n]) for s in ("vae", "conditioner") for n in old[s])
    changed = {name for name in old["model"] if not torch.equal(old["model"][name], new["model"][name])}
    assert changed and {name.split(".")[-2] for name in changed} == {"to_q", "to_k", "to_v", "out_proj"}
    again = generate(family.load(tmp_path / "TUNED", tokens()), ["lamp"], [0])[0].latent
    torch.testing.assert_close(again, after, atol=0.05, rtol=0.05)  # merged into float16


def test_a_network_with_its_data_at_the_other_end_is_refused(root):
    pipeline = family.load(root, tokens())
    (stage,) = pipeline.stages
    x_0 = torch.full([4, LATENTS, C], 0.5)
    stage.call = lambda module, x, t, cond: (0.5 - x) / (1 - t).clamp_min(1e-3).view(-1, 1, 1)  # towards data at 1, where all is 0.5
    check_convention(stage, x_0, pipeline.conditions(NAMES, "shape"))
    stage.call = lambda module, x, t, cond: (x - 0.5) / t.clamp_min(1e-3).view(-1, 1, 1)
    with pytest.raises(ValueError, match="stage 'shape': expected velocities of the convention with data at t = 1"):
        check_convention(stage, x_0, pipeline.conditions(NAMES, "shape"))


def test_tensors_that_do_not_fit_are_refused_in_one_line(root, tmp_path):
    make_pairs(tmp_path)
    sections = family.read_sections(root / "model.fp16.ckpt")
    sections = {section: {name: tensor.clone() for name, tensor in own.items()} for section, own in sections.items()}
    for section, name in (("model", "blocks.4.moe.gate.weight"), ("vae", "post_kl.bias")):
        lacking = {**sections, section: {n: x for n, x in sections[section].items() if n != name}}
        renamed = {**sections, section: {n + ("x" if n == name else ""): x for n, x in sections[section].items()}}
        misshapen = {**sections, section: {n: x[None] if n == name else x for n, x in sections[section].items()}}
        for content, message in ((lacking, f"missing: {name}."), (renamed, f"unexpected: {name}x"), (misshapen, f"misshapen: {name} [1, ")):
            write(root, content)
            done = run(tmp_path)
            assert done.exit_code == 2 and f"model.fp16.ckpt, {section}" in done.output and message in done.output, done.output
            assert "Traceback" not in done.output
    write(root, {**sections, "model": {}})
    assert "expected sections model, vae, conditioner, got none for model" in run(tmp_path).output
    write(root, {**sections, "model": {n: x / 0 for n, x in sections["model"].items()}})
    assert "expected finite numbers, got others in " in run(tmp_path).output
    (root / "model.fp16.ckpt").write_bytes(b"PK")
    assert "checkpoint: expected weights in model.fp16.ckpt" in run(tmp_path).output
    assert not (tmp_path / "runs").exists()


def test_latents_and_conditions_of_others_are_refused(root, tmp_path):
    make_pairs(tmp_path, shape=(C, 2, 2, 2))
    done = run(tmp_path)
    assert done.exit_code == 2 and f"expected [{LATENTS}, {C}], got [{C}, 2, 2, 2]" in done.output
    other = Conditions(tokens={name: {"main": torch.zeros(L, E + 1)} for name in NAMES}, encoder="CLIP", zero_null=True)
    make_pairs(tmp_path, conditions=other)
    done = run(tmp_path)
    assert done.exit_code == 2 and "expected embeddings {'main': [5, 8]}, got {'main': [5, 9]} of CLIP" in done.output


def test_configs_of_other_networks_are_refused(root):
    def refused(section, message, **changes):
        entry = {**CONTENT[section], **changes}
        if "params" in changes:
            entry["params"] = {**CONTENT[section]["params"], **changes["params"]}
        (root / family.CONFIG).write_text(yaml.safe_dump({**CONTENT, section: entry}))
        with pytest.raises(ValueError, match=message):
            family.read_files(root)

    refused("model", "expected model of target HunYuanDiTPlain with params, got Other", target="a.Other")
    refused("model", "expected Hunyuan3D-2.1's form, got use_pos_emb=True", params={"use_pos_emb": True})
    refused("model", "got unknown windows", params={"windows": 3})
    refused("vae", "one size in model, vae and conditioner", params={"embed_dim": 5})
    refused("vae", "geo_decoder_downsample_ratio 1", params={"geo_decoder_downsample_ratio": 2})
    refused("conditioner", "expected one DinoImageEncoder as conditioner", params={"main_image_encoder": {"type": "Clip"}})
    (root / family.CONFIG).write_text("a: [")
    with pytest.raises(ValueError, match="expected YAML, got"):
        family.read_files(root)
    (root / family.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="expected config.yaml and model.fp16.ckpt or"):
        family.read_files(root)


def picture(path, box=(20, 10, 60, 50)):
    """A coloured box on nothing."""
    pixels = np.zeros((80, 100, 4), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = (200, 100, 50, 255)
    Image.fromarray(pixels).save(path)


def test_pictures_stand_in_a_white_square_and_become_tokens(root, tmp_path):
    picture(tmp_path / "chair.png")
    seen = family.prepared(Image.open(tmp_path / "chair.png"))
    filled = (seen < 0.99).any(0)
    rows, columns = (np.flatnonzero(filled.any(axis).numpy()) for axis in (1, 0))
    assert seen.shape == (3, 512, 512) and seen[:, 0, 0].tolist() == [1, 1, 1]
    assert abs(len(rows) / 512 - 0.85) < 0.02 and abs(len(columns) / 512 - 0.85) < 0.02
    assert abs(rows.mean() - 255.5) < 4 and abs(columns.mean() - 255.5) < 4
    torch.testing.assert_close(seen[:, 256, 256] * 255, torch.tensor([200.0, 100.0, 50.0]), atol=1, rtol=0)
    made = family.embed(root, {"chair": tmp_path / "chair.png"}, torch.device("cpu"))
    assert made.form == {"main": [L, E]} and made.zero_null and made.null(2)["main"].abs().max() == 0
    with pytest.raises(ValueError, match="expected a transparent background"):
        family.prepared(Image.new("RGB", (9, 9)))
    with pytest.raises(ValueError, match="larger than a pixel"):
        family.prepared(Image.new("RGBA", (9, 9)))


@pytest.mark.long
def test_from_pictures_to_a_tuned_folder_as_documented(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("PICTURES").mkdir()
    for i, name in enumerate(NAMES[:2]):
        picture(f"PICTURES/{name}.png", (20, 10, 60 - 20 * i, 50))

    def look(called, done):
        if called == "draw":
            rows = [json.loads(line) for line in Path("ASSETS/ranking.jsonl").read_text().splitlines()]
            assert all((Path("ASSETS") / row["look_at"]).suffix in (".obj", ".txt") for row in rows)

    called = run_section("Hunyuan3D-2.1", "ROOT", Path(), FEW, look)
    assert called == ["conditions", "draw", "ranking", "train", "export"]
    assert generate(family.load(Path("TUNED"), read_conditions(Path("PAIRS"))), ["chair"], [0])[0].latent.isfinite().all()

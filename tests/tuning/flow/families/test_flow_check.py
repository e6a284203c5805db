"""Test `eg3d-rlhf flow check`: it shows the content of a folder on one screen, and exits with 0 only if all
of it fits.
"""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import yaml
from click.testing import CliRunner

from eg3d_rlhf.modes import flow_check
from eg3d_rlhf.modes.flow_check import check
from eg3d_rlhf.tuning.flow.families import family_of, trellis2
from eg3d_rlhf.tuning.flow.families import hunyuan3d_files as layout
from tests.rejections import check_message, raising, rejected
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import CONTENT, write_hunyuan3d
from tests.tuning.flow.families.trellis.tiny_trellis import (
    DINO,
    write_hub,
    write_image_trellis,
    write_trellis,
)
from tests.tuning.flow.families.trellis2.tiny_trellis2 import write_pipeline, write_trellis2


@pytest.fixture
def root(tmp_path):
    return write_hunyuan3d(tmp_path / "ROOT")


@pytest.fixture
def dino(tmp_path, monkeypatch):
    """Write a DINOv2 where TRELLIS looks for it, and return the file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return write_hub(tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vitl14_reg4_pretrain.pth")


def looked(root, *flags):
    """Call the command, and return its exit code and its output."""
    done = CliRunner().invoke(check, [str(root), *flags])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


def row(text, title):
    """Return the wrapped rows under a title as one line, or '' if the title is missing."""
    blocks = re.split(r"\n(?=\S)", text)
    return " ".join(" ".join(block.split()) for block in blocks if block.startswith(title)).strip()


def changed(root, **sections):
    held = {
        section: {n: x.clone() for n, x in of.items()}
        for section, of in layout.read_sections(root / "model.fp16.ckpt").items()
    }
    torch.save(
        {**held, **{section: change(held[section]) for section, change in sections.items()}},
        root / "model.fp16.ckpt",
    )


def test_a_folder_that_fits_is_described_with_its_uses(root):
    (root / "LICENSE").write_text("terms")
    (root / "more.bin").write_bytes(b"")
    code, text = looked(root)
    assert code == 0 and len(text.splitlines()) < 24
    *lines, next_line = text.splitlines()
    assert next_line.startswith("next: ") and max(map(len, lines)) <= 118
    for word in ("hunyuan3d", "config.yaml", "more.bin", "LICENSE", "float16", "released"):
        assert word in text, word
    assert family_of(root).notice in " ".join(text.split())
    assert all(word in row(text, "can ") for word in ("shape", "pairs", "export")) and not row(text, "cannot")
    network = layout.read_sections(root / "model.fp16.ckpt")["model"]
    size = sum(tensor.numel() for tensor in network.values())
    assert f" {len(network)} " in text and f" {size:,} " in " ".join(text.split())


def test_sizes_are_compared_with_the_released_ones(root, monkeypatch):
    unlike = re.compile(r"\b(other|not|no|differ\w*|unlike)\b")
    known = family_of(root)
    network = next(iter(known.networks(root)))
    size = sum(math.prod(tensor.shape) for tensor in network.tensors.values())
    count = len(network.tensors)
    for released, marked, odd in (
        (None, False, False),
        ((count, size), True, False),
        ((count, size + 1), True, True),
        ((count + 1, size), True, True),
    ):
        networks = [replace(network, released=released)]
        monkeypatch.setattr(type(known), "networks", lambda self, root, networks=networks: networks)
        line = row(looked(root)[1], "network")
        assert ("released" in line) == marked and bool(unlike.search(line)) == odd, (released, line)


def test_tensors_that_do_not_fit_and_missing_networks_are_named(root):
    changed(
        root, model=lambda state: {name.replace("x_embedder.", "embedder."): x for name, x in state.items()}
    )
    code, text = looked(root)
    names = ("missing: x_embedder.bias, x_embedder.weight", "unexpected: embedder.bias", "model.fp16.ckpt")
    assert code == 1 and check_message(row(text, "FAULT"), names)
    changed(
        root,
        model=lambda state: {
            name.replace("embedder.", "x_embedder.", name.startswith("e")): x for name, x in state.items()
        },
    )
    assert looked(root)[0] == 0
    changed(
        root,
        vae=lambda state: {name: x for name, x in state.items() if not name.startswith(layout.ENCODER_HALF)},
    )
    code, text = looked(root)
    (lost,) = [network for network in family_of(root).networks(root) if not network.tensors]
    assert code == 0 and lost.name in row(text, "cannot") and lost.without in row(text, "cannot")
    assert not row(text, "FAULT") and "pairs" not in row(text, "can ")
    changed(
        root, vae=lambda state: {name: x[None] if name == "post_kl.bias" else x for name, x in state.items()}
    )
    code, text = looked(root)
    assert code == 1 and check_message(row(text, "FAULT"), ("misshapen: post_kl.bias", "model.fp16.ckpt"))


def test_another_version_and_no_generator_are_rejected_in_one_line(root, tmp_path):
    model = {**CONTENT["model"], "target": "hy3dshape.models.Hunyuan3DDiT"}
    (root / layout.CONFIG).write_text(yaml.safe_dump({**CONTENT, "model": model}))
    rejected(CliRunner().invoke(check, [str(root)]), layout.CONFIG, "Hunyuan3DDiT")
    assert looked(tmp_path / "none")[0] == 2


def test_a_folder_of_trellis_with_and_without_an_encoder(tmp_path):
    root = write_trellis(tmp_path / "ROOT")
    code, text = looked(root)
    assert code == 0 and "loop" in row(text, "can ") and "slat_encoder" in text
    # no CLIP is on this machine
    assert "slat_encoder" not in row(text, "cannot") and "embed" not in row(text, "can ")
    assert "openai/clip-vit-large-patch14" in row(text, "cannot")
    # `flow new` would fail without it, so it is not the next step
    program, *words = text.splitlines()[-1].removeprefix("next: ").split()
    assert program in ("hf", "pip") and words[0] in ("download", "install")
    assert not row(text, "values") and row(looked(root, "--deep")[1], "values")
    for path in root.rglob("slat_enc*"):
        path.unlink()
    code, text = looked(root)
    assert code == 0 and "slat_encoder" in row(text, "cannot") and "loop" not in row(text, "can ")


def test_a_family_without_a_list_of_networks_is_opened(tmp_path, monkeypatch):
    root = write_trellis2(tmp_path / "ROOT")
    code, text = looked(root)
    assert code == 0 and "structure" in row(text, "can ") and "loop" in row(text, "can ")
    assert "shape_slat_encoder: " in text

    class Unlisted(trellis2.Trellis2):
        networks = None

    monkeypatch.setattr(flow_check, "family_of", lambda root, say: Unlisted())
    code, text = looked(root)
    assert code == 0 and "structure" in row(text, "can ") and "shape_slat_encoder" not in text


def test_a_missing_encoder_is_named_with_its_address(tmp_path, dino):
    root = write_image_trellis(tmp_path / "ROOT")
    code, text = looked(root)
    assert code == 0 and "embed images" in row(text, "can ") and not row(text, "cannot")
    dino.unlink()
    code, text = looked(root)
    assert code == 0 and "embed images" not in row(text, "can ")
    assert "huggingface.co/facebook/dinov2-with-registers-large" in row(text, "cannot").replace(" ", "")
    # the loop encodes structures without DINOv2
    assert "the loop" in row(text, "can ")


def test_an_encoder_of_another_width_is_a_fault(tmp_path, dino):
    root = write_image_trellis(tmp_path / "ROOT")
    json_file = next(root.rglob("ss_flow*.json"))
    content = json.loads(json_file.read_text())
    content["args"]["cond_channels"] = DINO + 8
    json_file.write_text(json.dumps(content))
    code, text = looked(root)
    assert code == 1 and str(DINO) in row(text, "FAULT") and str(DINO + 8) in text


def test_values_that_are_not_finite_are_found_if_asked_for(root):
    name = "x_embedder.weight"

    def damaged(state):
        state[name].view(-1)[3] = math.nan
        return state

    changed(root, model=damaged)
    assert looked(root)[0] == 0
    code, text = looked(root, "--deep")
    assert code == 1 and check_message(row(text, "FAULT"), (name, "model.fp16.ckpt"))


def test_stages_and_addresses_are_those_of_the_folder(tmp_path):
    root = write_trellis2(tmp_path / "ROOT")
    write_pipeline(root, default_pipeline_type="1024")
    (root.parent / "trellis" / "ckpts" / "ss_enc_conv3d_16l8_fp16.safetensors").unlink()
    code, text = looked(root)
    assert code == 0 and "shape_512" not in row(text, "can ") and "shape_1024" in row(text, "can ")
    missing = row(text, "cannot")
    assert "sparse_structure_encoder" in missing and "microsoft/TRELLIS-image-large" in missing
    assert "microsoft/TRELLIS.2-4B" not in missing and "facebook/dinov3" in text


def test_pointers_of_git_lfs_and_unmerged_adapters_are_named(tmp_path, root):
    weights = root / "model.fp16.ckpt"
    kept = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    rejected(CliRunner().invoke(check, [str(root)]), "model.fp16.ckpt", "git lfs pull")
    weights.write_bytes(kept)

    def adapted(state):
        weight = state.pop("x_embedder.weight")
        state["x_embedder.base_layer.weight"] = weight
        state["x_embedder.lora_A.default.weight"] = torch.zeros(2, weight.shape[1])
        state["x_embedder.lora_B.default.weight"] = torch.zeros(len(weight), 2)
        return state

    changed(root, model=adapted)
    code, text = looked(root)
    assert code == 1 and check_message(row(text, "FAULT"), ("x_embedder", "LoRA", "--weights"))
    with raising("x_embedder", "LoRA"):
        family_of(root, print_line=lambda line: None).load(root, None)


def test_a_checkpoint_under_another_name_is_to_be_renamed(root):
    weights = root / "model.fp16.ckpt"
    weights.rename(root / "hunyuan_3d_v2.1.ckpt")
    rejected(CliRunner().invoke(check, [str(root)]), "hunyuan_3d_v2.1.ckpt", "model.ckpt")
    (root / "hunyuan_3d_v2.1.ckpt").rename(root / "model.ckpt")
    assert looked(root)[0] == 0


@pytest.mark.parametrize("flags", [(), ("--tune=full", "--gpus=4"), ("--dtype=bfloat16",)])
def test_the_published_memory_is_a_table_of_the_package(flags):
    def gib(*words):
        done = CliRunner().invoke(check, ["--memory", *words])
        assert done.exit_code == 0, done.output
        lines = [line.split() for line in done.stdout.splitlines() if "bfloat16" in line]
        return [(line[0], line[1], float(line[6])) for line in lines]

    one = gib(*(flag for flag in flags if "gpus" not in flag and "dtype" not in flag))
    shown = gib(*flags)
    assert len(shown) == 33 and [row[:2] for row in shown] == [row[:2] for row in one]
    updates = [(a[2], b[2]) for a, b in zip(one, shown, strict=True) if a[1] != "sample"]
    assert all(b < a for a, b in updates) if flags else updates


def test_flags_of_the_table_are_rejected_where_they_have_no_effect(root):
    for flags, names in (
        (("--gpus=2",), ("--gpus", "--memory")),
        (("--memory", "--gpus=2"), ("--gpus", "--tune=full")),
        (("--memory", "--deep"), ("--deep", "--memory")),
        (("--memory", "--tune=full", "--dtype=bfloat16"), ("--dtype", "--tune=full")),
    ):
        rejected(CliRunner().invoke(check, [str(root), *flags]), *names)


@pytest.mark.long
def test_memory_is_estimated_for_a_folder(root):
    done = CliRunner().invoke(check, [str(root), "--memory"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if "bfloat16" in line]
    assert [(line[1], line[5]) for line in lines] == [("sample", "no"), ("lora", "no"), ("lora", "yes")]

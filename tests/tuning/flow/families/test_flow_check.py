"""Test `eg3d-rlhf flow check`: it shows the content of a folder on one screen, and exits with 0 only if all
of it fits.
"""

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
from tests.rejections import check_message, rejected
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import CONTENT, write_hunyuan3d
from tests.tuning.flow.families.trellis.tiny_trellis import write_trellis
from tests.tuning.flow.families.trellis2.tiny_trellis2 import write_trellis2


@pytest.fixture
def root(tmp_path):
    return write_hunyuan3d(tmp_path / "ROOT")


def looked(root):
    """Call the command, and return its exit code and its output."""
    done = CliRunner().invoke(check, [str(root)])
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
    assert code == 0 and len(text.splitlines()) < 24 and max(map(len, text.splitlines())) <= 118
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


@pytest.mark.long
def test_memory_is_estimated_for_a_folder(root):
    done = CliRunner().invoke(check, [str(root), "--memory"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if "bfloat16" in line]
    assert [(line[1], line[5]) for line in lines] == [("sample", "no"), ("lora", "no"), ("lora", "yes")]

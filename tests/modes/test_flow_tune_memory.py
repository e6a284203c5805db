"""`flow tune` holds one network at a time in the data type of --dtype, and divides batches over processes."""

import json

import pytest
import torch

from eg3d_rlhf.tuning.flow.families import trellis_files
from eg3d_rlhf.tuning.flow.training import pair_training
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.modes.flow_works import flow, with_encoder, write_images
from tests.rejections import check_message
from tests.tuning.flow.families.trellis.tiny_trellis import write_image_trellis

FEW = ("--device=cpu", "--no-control", "--steps=12", "--batch=4", "--lr=3e-3", "--set=warmup=0")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Return a WORK of a tiny TRELLIS with sampled assets and labels of all pairs, in labels.jsonl."""
    with_encoder(tmp_path, monkeypatch)
    root = write_image_trellis(tmp_path / "ROOT")
    images = write_images(tmp_path / "IMAGES")
    folder = tmp_path / "WORK"
    flags = (f"--pipeline={root}", f"--images={images}", "--each=2", "--set=split=0.3,0.5,0.2")
    flow("new", folder, *flags, "--device=cpu")
    flow("sample", folder, "--device=cpu")
    opened = Work.open(folder)
    files: dict[str, list[str]] = {}
    # an asset is named by the number of its line
    for number, line in enumerate(opened.lines(), 1):
        files.setdefault(line["condition"], []).append(f"{number:06d}")
    labels = [{"preferred": a, "rejected": b} for a, b in files.values()]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))
    return opened


def test_a_tuned_stage_is_alone_in_memory_and_trains_in_bfloat16(work, tmp_path, monkeypatch):
    labels = f"--labels={tmp_path / 'labels.jsonl'}"
    read_files = []
    read = trellis_files.read
    monkeypatch.setattr(
        trellis_files, "read", lambda path, who: read_files.append(path.stem) or read(path, who)
    )
    trained = []
    train = pair_training.train

    def spied(stage, *rest, **more):
        trained.append(stage.model)
        return train(stage, *rest, **more)

    monkeypatch.setattr(pair_training, "train", spied)
    flow("tune", work.folder, labels, *FEW, "--stage=latent", "--dtype=bfloat16", "--set=samples=0")
    assert any("slat_flow" in name for name in read_files)
    assert not [name for name in read_files if "ss_flow" in name]
    (model,) = trained
    # the linear layers of the blocks; norms and the layers at the ends stay float32, as in the original
    linear_layers = ("to_qkv.weight", "to_kv.weight", "to_out.weight")
    blocks = [p for name, p in model.named_parameters() if name.endswith(linear_layers)]
    assert blocks and {p.dtype for p in blocks} == {torch.bfloat16}
    # half of the bytes of float32
    assert sum(p.nbytes for p in blocks) == 2 * sum(p.numel() for p in blocks)
    (folder,) = work.numbered("tune")
    lines = (folder / "training" / "latent" / "stats.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses[-1] < losses[0] or losses[-1] < 0.693
    # strips of samples load the other stage when they are rendered, and both settings have their own folder
    read_files.clear()
    flow("tune", work.folder, labels, *FEW, "--stage=latent", "--set=samples=1")
    assert len(work.numbered("tune")) == 2 and any("ss_flow" in name for name in read_files)
    assert {p.dtype for p in trained[1].parameters()} == {torch.float32}
    assert list((work.numbered("tune")[1] / "training" / "latent" / "samples").iterdir())


def test_dtype_is_rejected_where_it_has_no_effect(work, tmp_path):
    labels = f"--labels={tmp_path / 'labels.jsonl'}"
    full = flow("tune", work.folder, labels, *FEW, "--dtype=bfloat16", "--tune=full", code=2)
    check_message(full, ("--dtype", "bfloat16", "--tune=full"))


@pytest.mark.parametrize(
    ("processes", "batch", "pairs_per_pass"), [(1, 16, 16), (2, 16, 8), (8, 16, 2), (3, 18, 6)]
)
def test_the_batch_is_divided_over_the_processes(tmp_path, monkeypatch, processes, batch, pairs_per_pass):
    flow("new", tmp_path / "WORK", "--pipeline=toy")
    work = Work.open(tmp_path / "WORK")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    printed = flow("tune", work.folder, "-n")
    human = json.loads(printed[printed.index("{") :])["circular"]["human"]
    assert (human["batch"], human["batch_gpu"]) == (batch, pairs_per_pass)
    assert ("--batch" in printed[: printed.index("{")]) == (batch != 16)

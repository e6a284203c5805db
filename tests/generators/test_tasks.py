"""Tasks that each family allows: one table in the code, the same in the docs and in errors of --init."""

import re

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.generators import FAMILIES, check_trainable, read_description, tasks_text
from eg3d_rlhf.generators.conversion import to_tri_grid
from tests.generators.pickles.writer import (
    HEAD_CLASSES,
    SnapshotWriter,
    head_generator,
    stock_networks,
)
from tests.rejections import raising, rejected
from training import networks


def test_the_documentation_states_the_tasks_of_each_family(repo):
    page = (repo / "docs" / "reference" / "checkpoints.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.M))
    assert listed == {name: tasks_text(name) for name in ("eg3d", *HEAD_CLASSES)}
    guide = (repo / "docs" / "guides" / "eg3d.md").read_text()
    readme = (repo / "README.md").read_text()
    choose = (repo / "docs" / "start" / "choose.md").read_text()
    for text in (guide, readme, choose):
        assert tasks_text("panohead") in text.lower()
    # no page promises to tune them
    for path in [repo / "README.md", *(repo / "docs").rglob("*.md")]:
        for line in path.read_text().splitlines():
            if path.parent.name != "lab-book" and "PanoHead" in line and re.search(r"\btun", line):
                assert re.search(r"no tuning|not (be )?tuned|can be tuned", line), (path, line)


@pytest.mark.parametrize("family", HEAD_CLASSES)
def test_init_rejects_a_released_full_head(family, tmp_path):
    """In one line, before the data are read and without the warning of the reader."""
    G, kwargs = head_generator(family)
    path = tmp_path / "head.pkl"
    nets = networks.Networks(None, stock_networks().D, G, kwargs, stock_networks().D_kwargs, {})
    content = (
        SnapshotWriter().snapshot(nets, ("D", "G_ema")).replace(b"DualDiscriminator", b"MaskDiscriminator")
    )
    path.write_bytes(content)
    (tmp_path / "none.zip").touch()
    flags = [f"--init={path}", "--cfg=ffhq", f"--data={tmp_path / 'none.zip'}", "--gamma=1"]
    for more in ([], ["--reward=sigma", "--lambda-r=10", "-n"]):
        result = CliRunner().invoke(train.main, [*flags, *more])
        line = rejected(result, "--init", family, tasks_text(family), "reward best-of-n", "generator invert")
        assert line.startswith(f"Error: --init: {path}")


def test_files_without_a_discriminator(tmp_path):
    nets = stock_networks()
    path = tmp_path / "ema.safetensors"
    networks.save(path, nets, only_ema=True)
    with raising("eg3d", "no tuning", "label"):
        check_trainable(path, read_description(path))
    for name, content in (("ema.pkl", ("G_ema",)), ("all.pkl", ("G", "D", "G_ema"))):
        (tmp_path / name).write_bytes(SnapshotWriter().snapshot(nets, content))
    with raising("ema.pkl", "no tuning"):
        check_trainable(tmp_path / "ema.pkl", read_description(tmp_path / "ema.pkl"))
    check_trainable(tmp_path / "all.pkl", read_description(tmp_path / "all.pkl"))
    assert tasks_text("eg3d", ["G", "D", "G_ema"]) == tasks_text("eg3d") == "score, label, steer, tune"


def test_a_converted_tri_grid_keeps_its_discriminator(tmp_path):
    """It is of PanoHead's family, but not a released file."""
    path = tmp_path / "tri-grid.safetensors"
    networks.save(path, to_tri_grid(stock_networks())[0])
    description = read_description(path)
    check_trainable(path, description)
    assert description["architecture"] == "panohead"
    assert tasks_text("panohead", description["networks"]) == "score, label, steer, tune"


def test_families_without_a_discriminator_cannot_be_tuned():
    for family in FAMILIES.values():
        if family.discriminator is None:
            assert "tune" not in tasks_text(family.name, ["G", "D", "G_ema"]).split(", ")

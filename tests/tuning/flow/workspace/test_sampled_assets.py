"""Test the sampling of assets for people: files do not depend on interruptions or ranks, an asset that cannot
be shown stops nothing, and a full disk loses nothing.
"""

import copy
import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eg3d_rlhf.people.label.assets.examinations import RECORD
from eg3d_rlhf.tuning.flow.base.conditioning import write_conditioning
from eg3d_rlhf.tuning.flow.base.ranking import read_latents
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.stage import EmptyStructure
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.workspace import sampled_assets as drawings
from eg3d_rlhf.tuning.flow.workspace import work_folder as works
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw, make_sampling
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, Work, divide
from tests.rejections import raising
from tests.training.test_distributed import finish, start

NAMES = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("ball", "box")]
CPU = torch.device("cpu")


def toy_work(folder: Path) -> Work:
    """Make a work folder with five prompts, three assets of each, and batches of five."""
    family = family_of(Path("toy"))
    write_conditioning(folder / "conditioning.safetensors", family.embed_texts(Path("toy"), NAMES, CPU))
    return Work(
        folder=folder,
        pipeline="toy",
        family="toy",
        stages=family.stages,
        kind="prompts",
        up="z",
        splits=divide(NAMES, 0),
        files=works.hashes(family.files(Path("toy"))),
        each=3,
        batch=5,
    ).write()


@pytest.fixture
def work(tmp_path):
    return toy_work(tmp_path / "WORK")


def drawing(work, **changes):
    return replace(make_sampling(work, work.check_pipeline(), "base", SHOWN, CPU), **changes)


def contents(folder):
    """Contents of all files but the record of examinations, which states times of change."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def test_assets_are_those_of_the_generator_with_all_their_latents_and_prompts(work):
    made = drawing(work)
    told = []
    assert made.run(told.append).count == 15 == sum(told)
    lines = work.lines()
    assert {line["condition"] for line in lines} == set(work.names(*SHOWN)) and {
        line["seed"] for line in lines
    } == {0, 1, 2}
    line = lines[4]
    latents = read_latents(work.asset_folder() / line["latents"])
    assert list(latents) == ["structure", "voxels"]
    (asset,) = generate(made.pipeline, [line["condition"]], [line["seed"]])
    (_, alone), *_ = draw(made.pipeline, [line["condition"]], [line["seed"]])
    assert torch.equal(asset.occupancy, alone.occupancy) and torch.equal(asset.colours, alone.colours)
    prompts = [json.loads(text) for text in (work.asset_folder() / "prompts.jsonl").read_text().splitlines()]
    assert prompts == [{"prompt": name, "text": name} for name in work.names(*SHOWN)]


def test_test_conditions_are_not_even_known_to_the_pipeline_that_draws(work):
    with raising("'a red lamp'"):
        drawings.open_pipeline(
            replace(work, splits={**work.splits, "train": ["a red lamp"]}), work.check_pipeline(), CPU, *SHOWN
        )
    assert set(work.conditioning(*SHOWN).names) == set(work.names(*SHOWN)) < set(NAMES)


def test_a_drawing_that_was_stopped_goes_on_and_draws_nothing_twice(work, tmp_path, monkeypatch):
    whole = drawing(toy_work(tmp_path / "WHOLE"))
    whole.run()

    def stop(n, seen=[]):  # noqa: B006 (one list for all calls)
        seen.append(n)
        if sum(seen) == 7:  # in the middle of the second batch of five
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawing(work).run(stop)
    there = {name: path.stat().st_mtime_ns for name, path in drawing(work).shown().items()}
    assert len(there) == 7 and not (work.asset_folder() / "ranking.jsonl").exists()
    sizes = []
    original = drawings.draw_or_empty
    monkeypatch.setattr(
        drawings, "draw_or_empty", lambda *args: sizes.append(len(args[2])) or original(*args)
    )
    drawing(work).run()
    assert sizes == [5, 5]  # the batch that was cut, and the rest
    assert contents(work.asset_folder()) == contents(whole.folder)
    assert all(drawing(work).shown()[name].stat().st_mtime_ns == when for name, when in there.items())
    drawing(work).run()  # finished: nothing to do
    assert sizes == [5, 5]
    with raising(str(work.asset_folder())):
        drawing(replace(work, precision="bfloat16")).run()


def showing(family, show):
    """Make a family that writes assets in another way."""
    made = copy.copy(family)
    made.show = show
    return made


def test_a_full_disk_keeps_what_is_drawn(work):
    family = work.check_pipeline()
    shown = []

    def show(asset, path):
        if len(shown) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        shown.append(path)
        return family.show(asset, path)

    with raising(str(work.asset_folder()), "4 of 15"):
        drawing(work, family=showing(family, show)).run()
    assert len(drawing(work).shown()) == 4
    assert drawing(work).run().count == 15


def test_what_has_no_surface_or_cannot_be_read_is_counted_and_left_out_of_the_list(work, monkeypatch):
    family = work.check_pipeline()
    first = work.names(*SHOWN)[0]

    def show(asset, path):
        if path.name == "00001-0":
            path.with_name("00001-0.txt").write_text("OUTSIDE\n")
            return path.with_name("00001-0.txt")
        if path.name == "00001-1":
            path.with_name("00001-1.ply").write_text("ply\nbroken")
            return path.with_name("00001-1.ply")
        return family.show(asset, path)

    advance = drawings.stage_latents

    def empty(pipeline, stage, conditions, seeds, given):
        if (first, 2) in zip(conditions, seeds, strict=True):
            raise EmptyStructure("EMPTY")
        return advance(pipeline, stage, conditions, seeds, given)

    monkeypatch.setattr(drawings, "stage_latents", empty)
    made = drawing(work, family=showing(family, show))
    drawn = made.run()
    assert drawn.count == 12 and len(drawn.left_out) == 3
    assert {"OUTSIDE", "EMPTY"} < set(drawn.left_out)
    listed = {line["look_at"] for line in work.lines()}
    assert not listed & {"00001-0.txt", "00001-1.ply", "00000-2.ply"} and len(listed) == 12
    assert made.run() == drawn


def test_nothing_to_show_is_an_error(work):
    def show(asset, path):
        path.with_suffix(".txt").write_text("OUTSIDE.\n")
        return path.with_suffix(".txt")

    with raising("15", "OUTSIDE"):
        drawing(work, family=showing(work.check_pipeline(), show)).run()


CODE = """
import sys
from pathlib import Path
import torch
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import make_sampling
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, Work
from training.distributed import process_group
torch.set_num_threads(1)
with process_group(torch.device("cpu"), 2.0) as ranks:
    work = Work.open(Path(sys.argv[1]))
    drawn = []
    made = make_sampling(work, work.check_pipeline(), "base", SHOWN, ranks.device, ranks).run(drawn.append)
    print(made.count, sum(drawn))
"""


@pytest.mark.long
def test_two_ranks_draw_the_files_of_one(work, tmp_path):
    torch.set_num_threads(1)
    whole = drawing(toy_work(tmp_path / "WHOLE"))
    whole.run()
    printed = finish(start(CODE, str(work.folder)))
    assert [out for out, _ in printed] == ["15 10\n", "15 5\n"]
    assert contents(work.asset_folder()) == contents(whole.folder)

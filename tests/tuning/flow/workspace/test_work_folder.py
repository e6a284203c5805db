"""Test the work folder: its splits, what it rejects, and people's answers in it."""

import json
from dataclasses import replace

import pytest

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import Answer, CampaignSettings, Choice, PlannedPair, Shape
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.workspace import work_folder as works
from eg3d_rlhf.tuning.flow.workspace.work_folder import SPLITS, Work, divide
from tests.rejections import raising

NAMES = [
    f"{colour} {shape}" for colour in ("red", "green", "blue", "pink", "white") for shape in ("ball", "box")
]


@pytest.fixture
def work(tmp_path):
    return Work(
        folder=tmp_path / "WORK",
        pipeline="toy",
        family="toy",
        stages=("structure", "voxels"),
        kind="prompts",
        up="z",
        splits=divide(NAMES, 0),
        files=works.hashes(family_of("toy").files("toy")),
    ).write()


def drawn(work):
    """Return two assets of each prompt that may be shown."""
    work.asset_folder().mkdir(parents=True)
    lines = []
    for i, name in enumerate(work.names("train", "choose")):
        for seed in (0, 1):
            (work.asset_folder() / f"{i:05d}-{seed}.ply").write_text(f"{name} {seed}")
            lines.append({"condition": name, "seed": seed, "look_at": f"{i:05d}-{seed}.ply"})
    (work.asset_folder() / "ranking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def shape(work, line, **changes):
    path = work.asset_folder() / line["look_at"]
    return replace(
        Shape.from_asset(
            generator="base",
            source=str(path),
            seed=line["seed"],
            file=file_hash(path),
            condition=line["condition"],
        ),
        **changes,
    )


def answered(work, pairs, choose):
    """Make a labelling project whose pairs one person answers.

    choose: function from the names of the left and the right asset to a choice.
    """
    with open_store(work.database, create=True) as store:
        settings = CampaignSettings(
            name=work.campaign, repeat_share=0.5, swap_share=0, repeat_gap=1, gold_every=0, both_bad=True
        )
        campaign = store.create_campaign(settings, [PlannedPair(first=a, second=b) for a, b in pairs])
        ann = store.annotator_without_token("ann").id
        shapes = dict(store.shapes(campaign))
        while given := store.assignments(campaign, ann, 1):
            sides = [shapes[token] for token in (given[0].left, given[0].right)]
            store.submit(
                campaign, ann, Answer(key=given[0].token, assignment=given[0].token, choice=choose(*sides))
            )


def test_conditions_are_divided_by_their_names_alone():
    splits = divide(NAMES, 0)
    assert sorted(name for split in SPLITS for name in splits[split]) == sorted(NAMES)
    assert {split: len(splits[split]) for split in SPLITS} == {"train": 6, "choose": 2, "test": 2}
    assert (
        {k: set(v) for k, v in divide(NAMES[::-1], 0).items()}
        == {k: set(v) for k, v in splits.items()}
        != divide(NAMES, 1)
    )
    with raising("--split", "8", "2", "0"):
        divide(NAMES, 0, (0.8, 0.2, 0.0))
    with raising("--split", "0", "1"):
        divide(NAMES[:2], 0)
    with raising("--split", "0.8, 0.8, 0.2"):
        divide(NAMES, 0, (0.8, 0.8, 0.2))


def test_a_folder_is_what_it_was_made_of(work, tmp_path):
    assert Work.open(work.folder) == replace(work, splits={k: list(v) for k, v in work.splits.items()})
    path = work.folder / works.FILE
    before = path.read_bytes()
    with raising(str(work.folder)):
        work.write()
    assert path.read_bytes() == before
    with raising(str(tmp_path / "OTHER"), kind=FileNotFoundError):
        Work.open(tmp_path / "OTHER")
    written = json.loads(before)
    for change, *names in (
        ({"format": 2}, works.FILE, "1", "2"),
        ({"stages": None}, works.FILE),
        ({"more": 1}, works.FILE, "'more'"),
        ({"splits": {**written["splits"], "test": []}}, works.FILE, "0", "test"),
    ):
        path.write_text(json.dumps({**written, **change}))
        with raising(*names):
            Work.open(work.folder)
    path.write_text("{")
    with raising(works.FILE):
        Work.open(work.folder)


def test_another_pipeline_than_that_of_the_folder_is_refused(work):
    assert work.check_pipeline().name == "toy"
    name = next(iter(work.files))
    digest, *_ = work.files[name]
    assert replace(work, files={**work.files, name: [digest, 0, 0]}).check_pipeline()  # touched, but the same
    with raising("WORK", f"{name}.safetensors"):
        replace(work, files={**work.files, name: ["0" * 64, 0, 0]}).check_pipeline()
    with raising("WORK", str(work.folder), "structure, voxels"):
        replace(work, files={"other": ["", 0, 0]}).check_pipeline()


def test_folders_are_numbered(work):
    assert work.numbered("tune") == [] and work.next("tune").name == "tune-00"
    for name in ("tune-00", "tune-02", "tune-old", "study-07"):
        (work.folder / name).mkdir()
    assert [path.name for path in work.numbered("tune")] == ["tune-00", "tune-02"] and work.next(
        "tune"
    ).name == "tune-03"


def test_answers_are_mapped_to_what_was_drawn(work):
    with raising(str(work.folder), kind=FileNotFoundError):
        work.labels()
    lines = drawn(work)
    pairs = [(shape(work, a), shape(work, b)) for a, b in zip(lines[::2], lines[1::2], strict=True)]
    tied = lines[0]["condition"]

    def choose(left, right):
        return Choice.BAD if left.condition == tied else Choice.LEFT if left.seed == 1 else Choice.RIGHT

    answered(work, pairs, choose)
    labels = work.labels()
    assert labels.pairs == len(pairs) and labels.ties >= 1 and labels.repeats[0] == labels.repeats[1] > 0
    first, second = (work.asset_folder() / line["look_at"] for line in lines[2:4])
    for_first, for_second = labels.votes(first, second)
    assert for_first == 0 < for_second and labels.votes(second, first) == (for_second, 0)
    assert labels.votes(*(work.asset_folder() / line["look_at"] for line in lines[:2])) == (0, 0)
    (work.asset_folder() / lines[2]["look_at"]).write_text("another")
    with raising("labels.db", repr(lines[2]["condition"])):
        work.labels()


@pytest.mark.parametrize("change", [{"seed": 7}, {"condition": "test"}])
def test_answers_on_other_assets_are_refused(work, change):
    lines = drawn(work)
    change = {name: work.names("test")[0] if value == "test" else value for name, value in change.items()}
    answered(work, [(shape(work, lines[0], **change), shape(work, lines[1]))], lambda *sides: Choice.LEFT)
    other = {**lines[0], **change}
    with raising("labels.db", repr(other["condition"]), str(other["seed"])):
        work.labels()

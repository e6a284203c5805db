"""Judgements of assets become pairs of files, rankings and scores that the trainings read."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

import train
from eg3d_rlhf.modes.label import main
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, Mode, PlannedPair, Shape
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import export_assets, store_preferences
from eg3d_rlhf.preferences.label_scores import KnownAssets, read_label_lines
from eg3d_rlhf.tuning.flow.base.conditioning import write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import read_pairs
from eg3d_rlhf.tuning.flow.base.ranking import read_latents
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, Work
from tests.modes.flow_works import NAMES, flow, write_prompts
from tests.people.label.plans import QUIET, answer_all
from tests.people.label.plans import plan as plan_of_seeds
from tests.rejections import raising
from tests.tuning.flow.families.trellis.tiny_trellis import tokens, write_trellis

CONDITIONS = {"chair": {"text": "a chair of oak", "image": None}, "cup": {"text": None, "image": "cup.png"}}


def asset(folder, name: str, condition: str = "chair", generator: str = "one") -> Shape:
    """An asset of a file; nothing is read."""
    return Shape(
        generator=generator,
        source=str(folder / f"{name}.glb"),
        seed=ord(name[0]),
        psi=math.nan,
        level=math.nan,
        resolution=0,
        triangles=0,
        file=name * 64,
        condition=condition,
    )


def judged(folder, pairs, mode=Mode.LABEL, **settings) -> Store:
    """A store in which 'ann' has answered pairs (first, second, what she prefers: 'first', 'second' or a
    choice).
    """
    store = Store.open(f"sqlite:///{folder / 'labels.db'}")
    ann = store.annotator_without_token("ann", "annotator").id
    made = CampaignSettings(name="assets", mode=mode, extra={"conditions": CONDITIONS}, **QUIET, **settings)
    campaign = store.create_campaign(made, [PlannedPair(first=a, second=b) for a, b, _ in pairs])
    choices = {(a.source, b.source): choice for a, b, choice in pairs}

    def choose(left: Shape, right: Shape) -> Choice:
        sides = left.source, right.source
        choice = choices.get(sides) or choices[sides[::-1]]
        places = ("left", "right") if sides in choices else ("right", "left")
        return Choice(dict(zip(("first", "second"), places, strict=True)).get(choice, choice))

    answer_all(store, campaign, ann, choose)
    return store


@pytest.fixture
def five(tmp_path):
    """Files a > b > c of one prompt, b and d tied, and e of another prompt against f."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    a, b, c, d = (asset(folder, name) for name in "abcd")
    e, f = (asset(folder, name, "cup", generator) for name, generator in (("e", "one"), ("f", "two")))
    pairs = [
        (a, b, "first"),
        (c, b, "second"),
        (a, c, "first"),
        (b, d, "tie"),
        (a, d, "first"),
        (d, c, "first"),
        (e, f, "second"),
    ]
    with judged(tmp_path, pairs) as store:
        yield store, folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_of_files_are_what_the_flow_mode_reads(five, tmp_path):
    store, folder = five
    path = export_assets(store, tmp_path / "pairs.jsonl", "asset-pairs")
    written = lines(path)
    assert {(line["preferred"], line["rejected"]) for line in written if not line["tie"]} == {
        ("drawn/a.glb", "drawn/b.glb"),
        ("drawn/b.glb", "drawn/c.glb"),
        ("drawn/a.glb", "drawn/c.glb"),
        ("drawn/a.glb", "drawn/d.glb"),
        ("drawn/d.glb", "drawn/c.glb"),
        ("drawn/f.glb", "drawn/e.glb"),
    }
    assert {line["prompt"] for line in written} == {CONDITIONS["chair"]["text"], "cup"} and written[0][
        "annotator"
    ] == "ann"
    assert [line["preferred_generator"] for line in written if line["condition"] == "cup"] == ["two"]
    known = KnownAssets(
        prompt_of={line[side]: line["condition"] for line in written for side in ("preferred", "rejected")}
    )
    assert [(row.asset, row.other, row.tie) for row in read_label_lines(path, known)] == [
        (line["preferred"], line["rejected"], line["tie"]) for line in written
    ]


FIRST_STAGE = (
    "--mode=circular-dpo --stage=structure --pairs=WORK/pairs --steps=2 --batch=2 --lr=0.02"
    " --set=choose_noises=0 --set=warmup=0 --set=no_summary=true --device=cpu"
)


@pytest.mark.parametrize("kind", ["toy", "trellis"])
def test_drawn_assets_that_the_tool_asks_about_become_pairs_of_latents(tmp_path, monkeypatch, kind):
    """With the commands: assets are generated, planned and exported by the labelling tool, and read as pairs;
    TRELLIS, whose prompt features come as a file, is trained on them.
    """
    monkeypatch.chdir(tmp_path)
    if kind == "toy":
        given = ["--pipeline=toy", f"--prompts={write_prompts(tmp_path / 'prompts.txt', NAMES[:6])}"]
    else:
        write_conditioning(tmp_path / "given.safetensors", tokens(NAMES[:6]))
        given = [f"--pipeline={write_trellis(tmp_path / 'ROOT')}", "--conditioning=given.safetensors"]
    flow("new", "WORK", *given, "--each=3", "--set=split=0.3,0.2,0.5", "--device=cpu")
    flow("sample", "WORK", "--device=cpu")
    work = Work.open(tmp_path / "WORK")
    assert {name for names in work.splits.values() for name in names} == set(NAMES[:6])
    choices = iter(("left", "right", "left", "tie", "right", "left"))
    extras = []

    def serve(options, *args, **kwargs):  # in place of the server: one annotator answers all
        store = options.store
        campaign = store.campaign(options.campaign)
        extras.append(campaign.settings.extra)
        answer_all(
            store, campaign.id, store.annotator_without_token("ann").id, lambda *_: Choice(next(choices))
        )

    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    db = "--db=sqlite:///labels.db"
    asked = ["--assets=WORK/drawn/base", "--up=z", "--campaign=chairs", "--pairs=6", "--set=cache=cache"]
    quiet = [f"--set={name}=0" for name in ("training", "gold", "repeat_share", "swap_share")]
    for flags in (
        [*asked, db, *quiet],
        ["export", "judged.jsonl", "--kind=asset-pairs", "--campaign=chairs", db],
    ):
        done = CliRunner().invoke(main, flags)
        assert done.exit_code == 0, done.output
    assert len(extras) == 1 and extras[0]["up"] == "z"
    answers = lines(tmp_path / "judged.jsonl")
    assert len(answers) == 6 and sum(line["tie"] for line in answers) == 1
    assert {line["condition"] for line in answers} == set(work.names(*SHOWN))

    flow("tune", "WORK", "--labels=judged.jsonl", "--pairs-only", "--device=cpu")
    pairs = {stage: read_pairs(work.folder / "pairs" / stage)[0] for stage in work.stages}
    second = {"toy": "voxels", "trellis": "latent"}[kind]
    assert {stage: len(stage_pairs) for stage, stage_pairs in pairs.items()} == {"structure": 5, second: 5}
    latents = {line["look_at"]: first_latent(work, line) for line in work.lines()}
    for line in (line for line in answers if not line["tie"]):
        preferred, rejected = (latents[Path(line[side]).name] for side in ("preferred", "rejected"))
        conditions = [
            pair.condition
            for pair in pairs["structure"]
            if pair.preferred.equal(preferred) and pair.rejected.equal(rejected)
        ]
        assert conditions == [line["condition"]]

    if kind == "trellis":
        done = CliRunner().invoke(train.main, [given[0], *FIRST_STAGE.split(), "--no-control"])
        assert done.exit_code == 0, done.output
        (stats,) = (tmp_path / "runs" / "artefacts").glob("structure-human-*/training/stats.jsonl")
        assert [line["step"] for line in lines(stats)] == [0, 2] and lines(stats)[-1]["grad_norm"] > 0
        assert list((tmp_path / "runs").glob("00000-*/structure/adapter_model.safetensors"))


def first_latent(work: Work, line: dict):
    """Return the latent of the first stage of a generated asset, as the family stores it."""
    if "structure" in line:
        return load_file(work.asset_folder() / line["structure"])["mean"]
    return read_latents(work.asset_folder() / line["latents"])["structure"]


def test_rankings_are_of_each_prompt_and_bring_the_latents_along(five, tmp_path):
    store, folder = five
    drawn = [
        {
            "condition": "chair",
            "rank": None,
            "latents": f"{name}.safetensors",
            "seed": i,
            "look_at": f"{name}.glb",
        }
        for i, name in enumerate("abc")
    ]
    (folder / "ranking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in drawn))
    elsewhere = tmp_path / "out"
    elsewhere.mkdir()
    written = lines(export_assets(store, elsewhere / "ranked.jsonl", "rankings"))
    chairs = [line for line in written if line["condition"] == "chair"]
    assert [(line.get("look_at") or line["asset"]).split("/")[-1] for line in chairs] == [
        "a.glb",
        "b.glb",
        "d.glb",
        "c.glb",
    ]
    assert [line["rank"] for line in chairs] == [1, 2, 2, 4] and [line["judgements"] for line in chairs] == [
        3,
        3,
        3,
        3,
    ]
    assert (
        chairs[0]["latents"] == str(folder / "a.safetensors")
        and chairs[1]["seed"] == 1
        and "latents" not in chairs[2]
    )
    assert [line["rank"] for line in written if line["condition"] == "cup"] == [1, 2]


def test_assets_that_nothing_links_are_not_ranked_together(tmp_path):
    a, b, c, d, e = (asset(tmp_path, name) for name in "abcde")
    with judged(tmp_path, [(a, b, "first"), (c, d, "first"), (d, e, "first")]) as store:
        written = lines(export_assets(store, tmp_path / "ranked.jsonl", "rankings"))
    assert [(line["asset"], line["rank"]) for line in written] == [("c.glb", 1), ("d.glb", 2), ("e.glb", 3)]


@pytest.mark.parametrize(
    ("scale", "choice", "expected"), [("thumbs", "up", {"label": 1}), ("scores", "2", {"score": 2.0})]
)
def test_scores_of_single_assets_are_what_the_mesh_reward_reads(tmp_path, scale, choice, expected):
    a = asset(tmp_path, "a", "cup")
    with judged(tmp_path, [(a, a, choice)], Mode.SINGLE, scale=scale) as store:
        (written,) = lines(export_assets(store, tmp_path / "scores.jsonl", "asset-scores"))
    assert written["mesh"] == "a.glb" and written["prompt"] == "cup" and expected.items() <= written.items()
    assert ("label" in written) != ("score" in written)


def test_assets_that_are_both_bad_are_scored_as_not_good(tmp_path):
    a, b, c, d = (asset(tmp_path, name) for name in "abcd")
    with judged(tmp_path, [(a, b, "first"), (c, d, "bad")], both_bad=True) as store:
        pairs = lines(export_assets(store, tmp_path / "pairs.jsonl", "asset-pairs"))
        assert [line["choice"] for line in pairs if line["tie"]] == ["bad"]
        written = lines(export_assets(store, tmp_path / "bad.jsonl", "asset-scores", from_pairs=True))
    assert sorted((line["mesh"], line["label"], line["prompt"]) for line in written) == [
        (f"{n}.glb", 0, CONDITIONS["chair"]["text"]) for n in "cd"
    ]


def test_files_are_never_taken_for_seeds(five, tmp_path):
    store, _ = five
    with raising("campaign", "assets", "seeds", "--kind=asset-pairs"):
        store_preferences(store)
    store.create_campaign(CampaignSettings(name="seeds"), plan_of_seeds(2))
    with raising("--kind=rankings", "--assets"):
        export_assets(store, tmp_path / "x.jsonl", "rankings", campaign="seeds")

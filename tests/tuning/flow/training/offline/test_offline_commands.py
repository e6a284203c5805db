"""Test train.py --mode=offline from the command line: flags, rejected flags, and complete runs on a tiny
problem and on a folder of points.
"""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.experiments.table import with_interval
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.modes import offline as commands
from eg3d_rlhf.modes.flow_new import new
from eg3d_rlhf.modes.flow_sample import sample
from eg3d_rlhf.modes.offline import default_run
from eg3d_rlhf.preferences.label_scores import goodness_from_votes
from eg3d_rlhf.tuning.flow.base.conditioning import write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import Lazy
from eg3d_rlhf.tuning.flow.base.ranking import Candidate, read_latents
from eg3d_rlhf.tuning.flow.base.sampling import crossed, generate
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.families import opening
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import TRAINED
from eg3d_rlhf.tuning.flow.training.offline.settings import ARMS, OfflineRun, SinglesConfig
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.rejections import rejected
from tests.tuning.flow import point_family
from tests.tuning.flow.tiny_points import conditions, write_folder
from tests.tuning.flow.tiny_problem import human_pairs, tiny_problem

SHORT = {
    "lora": LoraConfig(rank=2, alpha=4),
    "steps": 4,
    "batch": 4,
    "lr": 0.02,
    "warmup": 1,
    "log_every": 2,
    "checkpoint_every": 2,
    "held_out_every": 2,
    "max_drop": 1.0,
}


def run(*flags: str):
    return CliRunner().invoke(train.main, ["--mode=offline", *(str(f) for f in flags)])


MISTAKES = {
    "arms": (
        ["--arms=labels,ppo"],
        ("--arms", "inverted", "dpo-randomised", "dpo-inverted", "ppo"),
    ),
    "jobs": (["--jobs=2"], ("--jobs", "--arms")),
    "control": (["--arms=labels,dpo", "--no-control"], ("--no-control", "--arms")),
    "no table": (["--set=no_summary=true", "--table-noises=4"], ("--table-noises", "no_summary")),
    "assets": (["--assets={tmp}"], ("--assets", "--pipeline")),
    "no assets": (["--pipeline={tmp}"], ("--assets", "flow sample")),
    "trust": (["--loss=dgpo", "--trust=1"], ("--trust", "--loss=nft")),
    "group": (["--group=4"], ("--group", "--loss=dgpo")),
    "no labels": (["--labels={tmp}/none.jsonl"], ("--labels", "{tmp}/none.jsonl")),
    "all good": (["--labels={tmp}/good.jsonl"], ("good.jsonl", "1 to 2")),
    "stage": (["--stage=nose"], ("structure", "voxels", "'nose'")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_flags(case, tmp_path):
    flags, names = MISTAKES[case]
    lines = [
        {"asset": f"{TRAINED[0].replace(' ', '-')}-0-{i:03d}", "condition": TRAINED[0], "thumb": True}
        for i in range(2)
    ]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(*(flag.format(tmp=tmp_path) for flag in flags), f"--outdir={tmp_path / 'runs'}")
    rejected(result, *(name.format(tmp=tmp_path) for name in names))
    assert not (tmp_path / "runs").exists()


def test_flags_reach_their_settings(tmp_path):
    found = json.loads(
        run("-n", "--trust=2", "--kl=0.5", "--arms=labels,dpo", "--seed=4", "--set=choose_noises=0").stdout
    )
    assert (
        found["singles"]["trust"] == 2
        and found["singles"]["kl"] == 0.5
        and found["training_seeds"] == [4, 5, 6]
    )
    assert found["choosing"] is None and found["source"]["labelled"] == "own"
    assert found["singles"]["lr"] == default_run("toy", "nft").singles.lr
    both = json.loads(run("-n", "--arms=labels,dpo", "--lr=0.0003", "--steps=7").stdout)
    assert [(both[arm]["lr"], both[arm]["steps"]) for arm in ("singles", "dpo")] == [(0.0003, 7)] * 2
    dgpo = json.loads(run("-n", "--loss=dgpo", "--group=5", "--group-beta=3").stdout)["singles"]
    assert (dgpo["loss"], dgpo["group"], dgpo["beta"]) == ("dgpo", 5, 3)


def people(kind: str) -> Labelled:
    """Return the tiny problem's pairs as single assets: both assets of each pair."""
    assets = []
    votes = []
    for pair in human_pairs("structure"):
        voxels = {p.id: p for p in human_pairs("voxels")}[pair.id]
        for side in ("preferred", "rejected"):
            latents = {"structure": getattr(pair, side), "voxels": getattr(voxels, side)}
            assets.append(
                Candidate(name=f"{pair.id}-{side}", condition=pair.condition, rank=1, latents=latents)
            )
            votes.append((assets[-1].name, side == "preferred"))
    return Labelled(assets=assets, goodness=goodness_from_votes(votes))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Make the command use the tiny problem."""
    monkeypatch.setattr(
        opening,
        "open_problem",
        lambda source, device: replace(tiny_problem(), labelled=Lazy(("thumbs", "ranks"), people)),
    )
    monkeypatch.setattr(
        commands,
        "default_run",
        lambda pipeline, loss: OfflineRun(
            singles=SinglesConfig(loss=loss, **SHORT), dpo=TrainConfig(dpo=DpoConfig(beta=20.0), **SHORT)
        ),
    )

    def go(*flags: str):
        result = run(
            *flags,
            *([] if any("--resume" in f for f in flags) else [f"--outdir={tmp_path}", "--table-noises=2"]),
        )
        assert result.exit_code == 0, (result.stderr, result.exception)
        return result

    return go


@pytest.mark.parametrize("loss", ["nft", "dgpo"])
def test_a_run_writes_weights_and_a_table(loss, tiny, tmp_path):
    tiny(f"--loss={loss}", "--stage=structure", "--set=choose_noises=2")
    folder = tmp_path / f"00000-offline-{loss}-toy-structure"
    tuned = tuned_model(tiny_problem().pipeline.stages[0].model, folder / "structure")
    assert not torch.equal(tuned.to_out.lora_B.weight, torch.zeros_like(tuned.to_out.lora_B.weight))
    found = json.loads((folder / "offline.json").read_text())
    assert (
        set(found["arms"]["labels"]["evaluators"]) == {"final", "chooser", "reward"}
        and found["arms"]["labels"]["answers"] == 24
    )
    tiny(f"--resume={folder}")
    assert json.loads((folder / "offline.json").read_text()) == found
    # a control with the same seed, which is compared with the arm
    assert list(found["arms"]) == ["labels", "randomised"] and found["training_seeds"] == [0]
    assert list(found["pairwise"]) == ["labels_vs_randomised"]
    assert (folder / "randomised-0").is_dir()


def test_without_a_control_the_table_says_so(tiny, tmp_path):
    printed = {}
    for flags in ((), ("--no-control",)):
        printed[flags] = tiny("--stage=structure", *flags).stdout
    tables = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/offline.json"))]
    assert [list(table["arms"]) for table in tables] == [["labels", "randomised"], ["labels"]]
    # the control does not change the arm
    assert tables[0]["arms"]["labels"] == tables[1]["arms"]["labels"]
    remark = "nothing here tests"
    assert remark not in printed[()] and remark in printed[("--no-control",)]


def test_arms_are_compared_on_the_same_noises(tiny, tmp_path):
    result = tiny(
        "--arms=labels,randomised,inverted,dpo,dpo-randomised,dpo-inverted", "--seeds=0,1", "--jobs=1"
    )
    found = json.loads((tmp_path / "00000-offline-nft-toy-voxels" / "offline.json").read_text())
    assert (
        list(found["arms"]) == list(ARMS)
        and len(found["pairwise"]) == 15
        and found["training_seeds"] == [0, 1]
    )
    assert found["arms"]["dpo"]["answers"] == 12
    for name, rated in found["pairwise"].items():
        cells = " | ".join([*name.split("_vs_"), with_interval(rated)])
        assert f"| {cells} |" in result.stdout, name


def test_a_folder_is_tuned_by_thumbs_on_what_it_drew(tmp_path):
    root = write_folder(tmp_path / "ROOT")
    known = tmp_path / "c.safetensors"
    write_conditioning(known, conditions())
    made = [f"--pipeline={root}", f"--conditioning={known}", "--each=12"]
    for command, flags in ((new, made), (sample, [])):
        done = CliRunner().invoke(command, [str(tmp_path / "WORK"), *flags])
        assert done.exit_code == 0, (done.output, done.exception)
    assets = Work.open(tmp_path / "WORK").asset_folder()
    rows = [json.loads(line) for line in (assets / "ranking.jsonl").read_text().splitlines()]

    def right(row):
        return float(read_latents(assets / row["latents"])["points"][:, 0].mean())

    middle = {
        c: sorted(right(row) for row in rows if row["condition"] == c)[6]
        for c in {row["condition"] for row in rows}
    }
    lines = [
        {
            "asset": row["look_at"],
            "condition": row["condition"],
            "thumb": right(row) >= middle[row["condition"]],
        }
        for row in rows
    ]
    (assets / "thumbs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    few = "--steps=60 --batch=12 --lr=0.02 --set=warmup=0 --trust=0.1 --lora-rank=4 --device=cpu".split()
    folders = [
        f"--pipeline={root}",
        f"--assets={assets}",
        f"--conditioning={known}",
        f"--outdir={tmp_path / 'runs'}",
    ]
    done = run(*folders, f"--labels={assets / 'thumbs.jsonl'}", *few)
    assert done.exit_code == 0, (done.output, done.exception)
    (folder,) = (tmp_path / "runs").glob("*-offline-nft-ROOT-points")
    pipeline = point_family.FAMILY.load(root, conditions())
    names, seeds = crossed("abcd", 16, 5)
    before, after = (
        torch.stack([asset[:, 0].mean() for asset in generate(pipeline, names, seeds, models)]).mean()
        for models in ({}, {"points": tuned_model(pipeline.stages[0].model, folder / "points")})
    )
    assert after > before + 0.05

"""Tests of `flow tune` and `flow export` on the toy: the report, the stages that are kept, the exported
folder, and errors.
"""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.statistics import clustered_rate
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import Answer, CampaignSettings, Choice, PlannedPair, Shape
from eg3d_rlhf.tuning.flow.base.ranking import read_latents
from eg3d_rlhf.tuning.flow.toy.bundled import load_network
from eg3d_rlhf.tuning.flow.toy.names import COLOURS
from eg3d_rlhf.tuning.flow.toy.toy_oracles import FinalOracle, LabelOracle
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import ToyAsset, ToyPipeline
from eg3d_rlhf.tuning.flow.workspace.answers import imported_of, splits_of
from eg3d_rlhf.tuning.flow.workspace.sample_strips import SIDE
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import make_sampling
from eg3d_rlhf.tuning.flow.workspace.tune import NOTHING
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.modes.flow_works import flow, write_prompts
from tests.rejections import check_message
from training.distributed import SINGLE

NAMES = [f"{colour} {shape}" for shape in ("ball", "box") for colour in COLOURS]
FEW = ("--steps=4", "--batch=4", "--lr=1e-3", "--device=cpu", "--set=held_out_every=2", "--set=warmup=0")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """WORK with drawn assets, and a list of them."""
    folder = tmp_path_factory.mktemp("tune")
    flow(
        "new",
        folder / "WORK",
        "--pipeline=toy",
        f"--prompts={write_prompts(folder / 'prompts.txt', NAMES)}",
        "--each=2",
        "--device=cpu",
        "--set=split=0.4,0.4,0.2",
    )
    flow("sample", folder / "WORK", "--device=cpu")
    return Work.open(folder / "WORK")


def answer(work: Work, pairs: int | None = None) -> None:
    """A person prefers the file with the larger hash."""
    lines: dict[str, list[dict]] = {}
    for line in work.lines():
        lines.setdefault(line["condition"], []).append(line)
    shapes = {
        (line["condition"], line["seed"]): Shape.from_asset(
            generator="base",
            source=str(work.asset_folder() / line["look_at"]),
            seed=line["seed"],
            file=file_hash(work.asset_folder() / line["look_at"]),
            condition=line["condition"],
        )
        for of in lines.values()
        for line in of
    }
    planned = [
        PlannedPair(first=shapes[name, 0], second=shapes[name, 1])
        for name, of in lines.items()
        if len(of) == 2
    ][:pairs]
    with open_store(work.database, create=True) as store:
        settings = CampaignSettings(
            name=work.campaign, repeat_share=0, swap_share=0, gold_every=0, both_bad=True
        )
        campaign = store.create_campaign(settings, planned)
        person = store.annotator_without_token("ann").id
        known = dict(store.shapes(campaign))
        while given := store.assignments(campaign, person, 1):
            left, right = (known[token] for token in (given[0].left, given[0].right))
            choice = Choice.LEFT if left.file > right.file else Choice.RIGHT
            store.submit(
                campaign, person, Answer(key=given[0].token, assignment=given[0].token, choice=choice)
            )


def test_missing_and_foreign_answers_are_rejected(made, tmp_path):
    label = " ".join(("eg3d-rlhf", "flow", "label", str(made.folder)))
    check_message(flow("tune", made.folder, *FEW, code=2), ("WORK", label))
    check_message(flow("tune", made.folder, "--set=rounds=2", code=2), ("--set rounds=", "--loop"))
    stage = flow("tune", made.folder, "--stage=mesh", code=2)
    check_message(stage, ("--stage", "structure", "voxels", "mesh"))
    other = tmp_path / "labels.jsonl"
    other.write_text(json.dumps({"preferred": "x.ply", "rejected": "y.ply"}) + "\n")
    foreign = flow("tune", made.folder, *FEW, f"--labels={other}", code=2)
    check_message(foreign, ("labels.jsonl", "line 1", "38", "'x.ply'"))
    tune = " ".join(("eg3d-rlhf", "flow", "tune", str(made.folder)))
    check_message(flow("export", made.folder, f"--outdir={tmp_path / 'X'}", code=2), ("WORK", tune))
    assert not made.numbered("tune")


def test_answers_are_trained_on_reported_and_exported(made, tmp_path):
    answer(made)
    folders = {path.name for path in made.folder.iterdir()} | {"pairs"}
    rehearsed = flow("tune", made.folder, *FEW, "--stage=structure", "--set=rehearse=true")
    assert re.search(r"\d h \(start", rehearsed) and not made.numbered("tune")
    assert {path.name for path in made.folder.iterdir()} <= folders  # the rehearsal left its pairs alone
    printed = flow("tune", made.folder, *FEW, "--stage=structure")
    assert len(re.findall(r"\b19\b", printed)) >= 3 and NOTHING in printed.lower()
    (tune,) = made.numbered("tune")
    report = json.loads((tune / "report.json").read_text())
    measured = report["stages"]["structure"]
    train, choosing, telling = splits_of(made, made.names())
    assert measured["held_out"]["conditions"] <= len(telling) and not {*train, *choosing, *telling} & set(
        made.names("test")
    )
    strips = sorted((tune / "training" / "structure" / "samples").iterdir())
    assert [strip.name for strip in strips] == ["000000.png", "000002.png", "000004.png"]
    images = [np.asarray(Image.open(strip)) for strip in strips]
    shown = min(4, len(choosing))
    assert {image.shape for image in images} == {(SIDE, shown * SIDE, 3)} and all(
        0.02 < (p < 255).mean() < 0.98 for p in images
    )
    labels = report["labels"]
    assert (labels["answers"], labels["pairs"], labels["ties"]) == (19, 19, 0)
    assert (tune / "control" / "structure").is_dir()
    # answers by the files' hashes
    assert measured["learnable_signal"] == (tune / "structure").is_dir() and not measured["learnable_signal"]
    again = flow("tune", made.folder, *FEW, "--stage=structure")  # resumes, with nothing left to do
    assert NOTHING in again.lower()
    assert made.numbered("tune") == [tune] and json.loads((tune / "report.json").read_text()) == report
    check_message(flow("export", made.folder, f"--outdir={tmp_path / 'X'}", code=2), (str(tune),))
    assert not (tmp_path / "X").exists()

    weights = tune / "control" / "structure"
    weights.rename(tune / "structure")  # as if it had learnt
    assert "load_network" in flow("export", made.folder, f"--outdir={tmp_path / 'TUNED'}")
    tuned = tuned_model(load_network("structure"), tune / "structure", merge=True)
    merged = load_network("structure", tmp_path / "TUNED")
    torch.testing.assert_close(merged.state_dict(), tuned.state_dict(), atol=2e-3, rtol=2e-3)
    full = flow("export", made.folder, f"--outdir={tmp_path / 'TUNED'}", code=2)
    check_message(full, ("--outdir", str(tmp_path / "TUNED")))
    flow("export", made.folder, f"--outdir={tmp_path / 'ADAPTER'}", "--adapter")
    assert {path.name for path in (tmp_path / "ADAPTER" / "structure").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    peft = pytest.importorskip("peft", reason="stock PEFT reads the exported adapter: pip install peft")
    wrapped = peft.PeftModel.from_pretrained(
        load_network("structure"), tmp_path / "ADAPTER" / "structure"
    ).merge_and_unload()
    torch.testing.assert_close(wrapped.state_dict(), tuned.state_dict())


def test_help_is_one_screen():
    # 12 of the lines are those of the flags that select labels of people or of judges
    assert len(flow("tune", "--help").splitlines()) <= 63


def test_too_few_answers_and_other_labels(made, tmp_path):
    ranks = tmp_path / "ranks.jsonl"
    lines = [line for line in made.lines() if line["condition"] in set(made.names("train"))]
    ranks.write_text(
        "".join(
            json.dumps({"asset": str(made.asset_folder() / x["look_at"]), "score": x["seed"]}) + "\n"
            for x in lines
        )
    )
    few = flow("tune", made.folder, *FEW, f"--labels={ranks}", code=2)
    check_message(few, ("structure", "9 to", "0 to"))
    lines = made.lines()
    ranks.write_text(
        "".join(
            json.dumps({"asset": str(made.asset_folder() / x["look_at"]), "score": x["seed"]}) + "\n"
            for x in lines
        )
    )
    shown = json.loads(flow("tune", made.folder, *FEW, f"--labels={ranks}", "-n"))
    assert (
        shown["circular"]["human"]["steps"] == 4
        and shown["control"]
        and shown["circular"]["choosing"] is None
    )
    printed = flow("tune", made.folder, *FEW, f"--labels={ranks}", "--stage=voxels", "--no-control")
    assert "labels: ranks.jsonl" in printed


def test_a_file_of_pairs_counts_as_answers_do(made, tmp_path):
    """The majority of two assets' judgements; ties and others make no pair."""
    by_condition: dict[str, list[str]] = {}
    for line in made.lines():
        by_condition.setdefault(line["condition"], []).append(str(made.asset_folder() / line["look_at"]))
    (a, b), (c, d), *_ = (files for files in by_condition.values() if len(files) == 2)
    judged = [(a, b), (a, b), (b, a), (c, d), (d, c)]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps({"preferred": x, "rejected": y}) + "\n" for x, y in judged))
    imported = imported_of(made, made.check_pipeline(), path)
    assert [pair.provenance for pair in imported.pairs["voxels"]] == [{"votes": [2, 1]}]
    assert imported.report["judgements"] == 5


def toy_assets(work: Work, name: str) -> tuple[list, list[str]]:
    """Decode the samples of a folder; return assets and prompts, in one order for all generators."""
    decoder = ToyPipeline(torch.nn.Identity(), torch.nn.Identity())
    lines = sorted(work.lines(name), key=lambda x: (x["condition"], x["seed"]))
    latents = [read_latents(work.asset_folder(name) / line["latents"])["voxels"] for line in lines]
    return [decoder.decode(SparseBatch.join([latent]))[0] for latent in latents], [
        line["condition"] for line in lines
    ]


def mirrored(asset: ToyAsset) -> ToyAsset:
    """The cheapest filter, which needs no labels: the largest part and its mirror image, coloured as the
    nearest voxel.
    """
    parts, _ = ndimage.label(asset.occupancy.numpy())
    largest = torch.from_numpy(parts == 1 + np.bincount(parts.ravel())[1:].argmax())
    filled = largest | largest.flip(0)
    nearest = ndimage.distance_transform_edt(
        ~asset.occupancy.numpy(), return_distances=False, return_indices=True
    )
    return ToyAsset(filled, asset.colours[tuple(map(torch.from_numpy, nearest))] * filled[..., None])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_the_default_improves_assets_and_a_diverging_network_is_reported(tmp_path, seed):
    """Ranks by one measure of the toy's assets; wins on test conditions, by another.
    `pytest -s` prints them.
    """
    flow("new", tmp_path / "WORK", "--pipeline=toy", f"--set=seed={seed}")
    flow("sample", tmp_path / "WORK")
    work = Work.open(tmp_path / "WORK")
    ranks = tmp_path / "ranks.jsonl"
    lines = sorted(work.lines(), key=lambda x: (x["condition"], x["seed"]))
    scores = LabelOracle()(*toy_assets(work, "base")).tolist()
    ranks.write_text(
        "".join(
            json.dumps({"asset": str(work.asset_folder() / line["look_at"]), "score": score}) + "\n"
            for line, score in zip(lines, scores, strict=True)
        )
    )
    family = work.check_pipeline()
    reports = {}
    wins = {}
    for number, flags in enumerate(([], ["--set=loser_weight=1"])):
        flow("tune", work.folder, f"--labels={ranks}", "--no-control", *flags)
        reports[number] = json.loads((work.numbered("tune")[-1] / "report.json").read_text())["stages"]
        arms = {"test-base": None, f"tuned-{number:02}": work.tuned(work.numbered("tune")[-1])}
        for name, weights in arms.items():
            make_sampling(
                work, family, name, ["test"], torch.device("cpu"), SINGLE, tuned_weights=weights
            ).run()
        base, tuned = (
            (FinalOracle()(assets, names), names)
            for assets, names in (toy_assets(work, name) for name in arms)
        )
        wins[number] = clustered_rate((0.5 * (1 + (tuned[0] - base[0]).sign())).numpy(), base[1])
        for stage, stage_report in reports[number].items():
            print(
                f"\nseed {seed}, {flags or 'default'}, {stage}: accuracy"
                f" {stage_report['held_out']['accuracy']:.3f},"
                " error of the preferred "
                + "{:+.1%} [{:+.1%}, {:+.1%}]".format(*stage_report["held_out"]["preferred_error"])
            )
        print("wins against the untuned on test conditions: {:.3f} [{:.3f}, {:.3f}]".format(*wins[number]))
    assets, names = toy_assets(work, "test-base")
    for judge in (FinalOracle(), LabelOracle()):
        gains = [
            judge(of, names) - judge(assets, names)
            for of in ([mirrored(asset) for asset in assets], toy_assets(work, "tuned-00")[0])
        ]
        win_rates = [clustered_rate((0.5 * (1 + gain.sign())).numpy(), names) for gain in gains]
        printed = ("{:.3f} [{:.3f}, {:.3f}]".format(*of) for of in win_rates)
        print(f"{type(judge).__name__}: largest part, mirrored, {', the default '.join(printed)}")
    assert all(stage_report["learnable_signal"] for of in reports.values() for stage_report in of.values())
    assert (
        not any(stage_report["likelihood_displacement"] for stage_report in reports[0].values())
        and reports[1]["voxels"]["likelihood_displacement"]
    )
    assert wins[0].lo > 0.5 > wins[1].hi

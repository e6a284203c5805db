"""The six commands of docs/guides/flow.md in the browser, from prompts or pictures to an exported generator;
no file is written by hand.

What the answers prefer is the mean of a stage's latent, which tiny generators can learn.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from eg3d_rlhf.people.label.database import Database, shapes
from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.tuning.flow.base.conditioning import read_conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import read_pairs
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.toy.bundled import load_network
from eg3d_rlhf.tuning.flow.toy.names import COLOURS, SHAPES
from eg3d_rlhf.tuning.flow.workspace.tune import NOTHING
from eg3d_rlhf.tuning.flow.workspace.work_folder import CHOOSE, SHOWN, TEST, TRAIN, Work
from tests.modes.flow_works import (
    answer_all,
    flow,
    serving,
    sides_of,
    with_encoder,
    write_images,
    write_prompts,
)
from tests.people.label.browser import browser, needs_chromium
from tests.people.label.serving import SAME, answer
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import write_hunyuan3d
from tests.tuning.flow.families.trellis.tiny_trellis import write_image_trellis

__all__ = ["browser"]
pytestmark = pytest.mark.long
SMALL = (
    "--device=cpu",
    "--steps=30",
    "--lr=1e-3",
    "--batch=32",
    "--seed=1",
    *(
        f"--set={name}"
        for name in ("held_out_every=10", "warmup=0", "beta=20", "lora_rank=4", "loser_weight=1")
    ),
)
# At half weight a network of random weights learns what any data look like before it learns which are better.
PROMPTS = [f"{colour} {shape}" for colour in list(COLOURS)[:6] for shape in SHAPES[:8]]
IMAGES = 24
# file and tensor of a line
LIKED = {"toy": ("latents", "1.feats"), "trellis": ("structure", "mean"), "hunyuan3d": ("latents", "0.x")}
CELLS = {"hunyuan3d": ("--set=cells=24",)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_encoder(tmp_path, monkeypatch)
    return tmp_path


def conditioning_flags(kind: str, here: Path) -> tuple[str, str]:
    """Return --pipeline, and --prompts or --images."""
    if kind == "toy":
        return "--pipeline=toy", f"--prompts={write_prompts(here / 'prompts.txt', PROMPTS)}"
    root = {"trellis": write_image_trellis, "hunyuan3d": write_hunyuan3d}[kind](here / "ROOT")
    return f"--pipeline={root}", f"--images={write_images(here / 'PICTURES', IMAGES)}"


def goodness(work: Work, kind: str) -> dict[tuple[str, int], float]:
    """Measure the generated assets, by prompt and seed."""
    file, tensor = LIKED[kind]
    return {
        (line["condition"], line["seed"]): load_file(work.asset_folder() / line[file])[tensor].mean().item()
        for line in work.lines()
    }


def answer_rest(url: str, database: str, better: Callable[[Shape, Shape], bool]) -> int:
    """As the page does, by its interface."""
    with httpx.Client(base_url=url, headers=SAME, timeout=120) as client:
        client.headers["X-CSRF-Token"] = client.get("/api/session").json()["csrf"]
        done = 0
        while (given := client.get("/api/assignments?count=10").json())["assignments"] or given["waiting"]:
            time.sleep(0.5 * given["waiting"])  # shapes are being prepared
            for token in (pair["assignment"] for pair in given["assignments"]):
                choice = "left" if better(*sides_of(database, token)) else "right"
                assert answer(client, token, f"key-{token}", choice).status_code == 201
                done += 1
        return done


def conditions_in(database: str) -> set[str]:
    """Return the prompts of all shapes that a campaign or study can show."""
    opened = Database(database, create=False)
    with opened.read() as connection:
        measured = {row.condition for row in connection.execute(shapes.select())}
    opened.close()
    return measured


def check_conditions(work: Work) -> None:
    """No test condition was drawn for annotators, shown, trained on or used to choose; the study's are test
    conditions alone.
    """
    shown = set(work.names(*SHOWN))
    test = set(work.names(TEST))
    drawn = work.asset_folder()
    prompts = [json.loads(line) for line in (drawn / "prompts.jsonl").read_text().splitlines()]
    assert {line["condition"] for line in work.lines()} == {line["prompt"] for line in prompts} == shown
    assert {path.name for path in (drawn / "inputs").glob("*")} == {
        work.inputs[name] for name in shown & set(work.inputs)
    }
    # nothing beside what is listed
    assert len({path.name.split("-")[0] for path in drawn.glob("0*-*")}) == len(shown)
    assert conditions_in(work.database) <= shown
    problem = json.loads((work.numbered("tune")[-1] / "training_options.json").read_text())["problem"]
    train, choosing, telling = map(set, problem["splits"])
    assert (
        train <= set(work.names(TRAIN))
        and choosing | telling <= set(work.names(CHOOSE))
        and not choosing & telling
    )
    for stage in work.stages:
        assert {pair.condition for pair in read_pairs(work.folder / "pairs" / stage)[0]} <= shown
    for name in ("test-base", "tuned-00", "control-00"):
        # a study of four trials samples a part of them
        assert {line["condition"] for line in work.lines(name)} and {
            line["condition"] for line in work.lines(name)
        } <= test
    assert {path.name for path in (work.folder / "drawn").iterdir()} == {
        "base",
        "test-base",
        "tuned-00",
        "control-00",
    }
    for against in ("base", "control"):
        study = work.folder / "study-00" / against
        design = json.loads((study / "design.json").read_text())
        assert {row["prompt"] for row in design["assets"]} <= test
        assert conditions_in(f"sqlite:///{study / 'study.db'}") <= test


@needs_chromium
@pytest.mark.parametrize("kind", ["toy", "trellis", "hunyuan3d"])
def test_from_prompts_to_an_exported_generator_by_six_commands(kind, here, browser):
    printed = flow("new", "WORK", *conditioning_flags(kind, here), "--device=cpu", "--set=split=0.4,0.4,0.2")
    work = Work.open(here / "WORK")
    assets = 4 * len(work.names(*SHOWN))
    assert f"{assets} assets" in printed and printed.rstrip().endswith(" ".join(("flow", "plan", "WORK")))
    assert f"{assets} assets" in flow("sample", "WORK", "--device=cpu", *CELLS.get(kind, ()))
    liked = goodness(work, kind)

    def better(left: Shape, right: Shape) -> bool:
        sides = [(not side.degradation, liked[side.condition, side.seed]) for side in (left, right)]
        return sides[0] > sides[1]

    with serving(browser, "WORK", job="label", cwd=here) as page:
        words = page.page.evaluate("document.body.innerText")
        if work.kind == "pictures":
            assert page.page.locator("#promptImage").evaluate("image => image.naturalWidth") == 50
        else:
            assert any(name in words for name in work.names(*SHOWN))
        assert not any(name in words for name in work.names(TEST))
        answer_all(page, work.database, better, enough=6)  # practice among them
        assert answer_rest(page.url, work.database, better) > assets / 2
    printed = flow("tune", "WORK", *SMALL, *(["--lr=2e-3"] if kind == "toy" else []))
    report = json.loads((here / "WORK" / "tune-00" / "report.json").read_text())
    assert report["kept"] and report["labels"]["answers"] >= assets
    for stage, measured in report["stages"].items():
        figures = [f"{measured[arm]['accuracy']:.3f}" for arm in ("held_out", "control")]
        row = next(line for line in printed.splitlines() if line.startswith(f"| {stage} |"))
        assert all(figure in row for figure in figures) and (NOTHING in row) == (stage not in report["kept"])

    for against in ("base", "control"):
        with serving(
            browser, "WORK", "--n=4", "--device=cpu", *CELLS.get(kind, ()), job="study", cwd=here
        ) as page:
            words = page.page.evaluate("document.body.innerText").lower()
            assert "tuned" not in words and "control" not in words
            if work.kind == "prompts":
                assert any(name in words for name in work.names(TEST)) and not any(
                    name in words for name in work.names(*SHOWN)
                )
            answer_all(
                page,
                f"sqlite:///{here}/WORK/study-00/{against}/study.db",
                lambda left, right: "tuned-00" in left.source,
            )
    printed = flow("study", "WORK", "--report")
    lines = [line for line in printed.splitlines() if "tune-00" in line and "4 of 4" in line]
    assert [sum(against in line for line in lines) for against in ("base", "control")] == [1, 1], printed
    check_conditions(work)

    flow("export", "WORK", "--outdir=TUNED")
    flow("export", "WORK", "--outdir=ADAPTERS", "--adapter")
    assert {path.name for path in (here / "ADAPTERS").iterdir()} == set(report["kept"])
    if kind == "toy":
        changed = {
            stage: (load_network(stage), load_network(stage, here / "TUNED")) for stage in report["kept"]
        }
    else:
        flow("check", "TUNED")
        both = [
            family_of(path, print_line=lambda text: None).load(
                path, work.conditioning(TEST), dtype=torch.float32, device="cpu"
            )
            for path in (here / "ROOT", here / "TUNED")
        ]
        changed = {
            stage.name: (stage.model, other.model)
            for stage, other in zip(both[0].stages, both[1].stages, strict=True)
        }
    for stage, (before, after) in changed.items():
        moved = any(
            not torch.equal(x, y)
            for x, y in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
        )
        assert moved == (stage in report["kept"]), stage


def test_embeddings_of_test_conditions_change_nothing_until_the_study(here):
    """With other tokens in their place every file is the same, to the byte: what is drawn, trained, chosen
    and reported.
    """
    measured = []
    for name in ("WORK", "OTHER"):
        flow(
            "new",
            name,
            *conditioning_flags("toy", here),
            "--device=cpu",
            "--each=2",
            "--set=split=0.4,0.4,0.2",
        )
        work = Work.open(here / name)
        if name == "OTHER":
            original = read_conditioning(work.conditions_file)
            other = {key: x + 1 if key in work.names(TEST) else x for key, x in original.tokens.items()}
            write_conditioning(work.conditions_file, replace(original, tokens=other))
        flow("sample", name, "--device=cpu")
        ranks = here / f"{name}.jsonl"
        scores = [
            {"asset": str(work.asset_folder() / line["look_at"]), "score": line["seed"]}
            for line in work.lines()
        ]
        ranks.write_text("".join(json.dumps(score) + "\n" for score in scores))
        flow(
            "tune",
            name,
            *SMALL,
            "--steps=2",
            "--set=held_out_every=1",
            f"--labels={ranks}",
            "--stage=structure",
        )
        tune = work.numbered("tune")[-1]
        report = json.loads((tune / "report.json").read_text())["stages"]
        weights = load_file(next((tune / "control").rglob("*.safetensors")))
        files = {
            path.name: path.read_bytes()
            for path in work.asset_folder().iterdir()
            if path.suffix in (".ply", ".safetensors")
        }
        measured.append((report, {key: x.tolist() for key, x in weights.items()}, files))
    assert measured[0] == measured[1]

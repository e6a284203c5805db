"""`train.py --mode=distill` from the outside: a comparison with all its files, the same bytes again, and one
line for mistakes.
"""

import json

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.modes.distill import DISTILL, SETTINGS, select_arms
from tests.rejections import rejected
from training.config import knobs_of

PROMPT = "a white head with a red nose"
SHORT = ("--steps=4", "--set=tick=2", "--set=checkpoint_ticks=1", "--jobs=1", "--show=1")


def run(*flags):
    return CliRunner().invoke(train.main, ["--mode=distill", *map(str, flags)])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Folder of a short comparison: two prompts, two batches."""
    out = tmp_path_factory.mktemp("runs")
    prompts = out / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n\na grey box, each side with a red disc rather than a blue disc\n")
    result = run(*SHORT, "--compare=dreamdpo", "--set=batch=1", f"--prompt={prompts}", f"--outdir={out}")
    assert result.exit_code == 0, result.output
    return out / "00000-distill-bundled-compare", result.output


def test_a_comparison_writes_table_page_and_assets(compared):
    folder, printed = compared
    table = json.loads((folder / "compare.json").read_text())
    assert set(table["arms"]) == {"sds", "dreamdpo", "dreamdpo-inverted", "dreamdpo-random"}
    for arm in table["arms"].values():
        assert arm["n"] == 2 and arm["ci95"][0] <= arm["win_rate"] <= arm["ci95"][1]
    assert table["arms"]["sds"]["win_rate"] == 0.5 and "| dreamdpo |" in printed
    judgements = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    assert len(judgements) == 6 * 2 and {j["winner"] for j in judgements} <= {"a", "b", "tie"}
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [(x["arm"], x["batch"], x["step"]) for x in lines[:4]] == [
        ("sds", 0, 2),
        ("sds", 0, 4),
        ("dreamdpo", 0, 2),
        ("dreamdpo", 0, 4),
    ]
    assert {
        "first_wins",
        "gap_50",
        "one_sided",
        "cosine",
        "preference_norm",
        "sds_norm",
        "log_prob",
        "opacity",
    } <= lines[2].keys()
    page = (folder / "report" / "index.html").read_text()
    assert "data:video/mp4" in page and 'src="http' not in page and 'href="http' not in page
    for name in (
        "grid.png",
        "turntable.mp4",
        "assets-dreamdpo.safetensors",
        "meshes/sds/000.glb",
        "meshes/sds/000.ply",
    ):
        assert (folder / name).stat().st_size > 0, name


def test_the_learned_prior_takes_the_exact_one_s_place(tmp_path):
    result = run(
        *SHORT, "--prior=bundled-unet", "--method=dreamdpo", f"--prompt={PROMPT}", f"--outdir={tmp_path}"
    )
    assert result.exit_code == 0, result.output
    folder = tmp_path / "00000-distill-bundled-unet-dreamdpo"
    assert set(json.loads((folder / "training_options.json").read_text())["hashes"]) == {"prior"}
    assert "log_prob" in json.loads((folder / "stats.jsonl").read_text().splitlines()[-1])  # of the exact one
    table = json.loads(run("-n", "--prior=bundled-unet").stdout)
    assert table["arms"] == json.loads(run("-n").stdout)["arms"] and len(table["prompts"]) == 22


@pytest.mark.long
def test_the_same_command_gives_the_same_bytes_and_a_finished_run_stays(compared, tmp_path):
    folder, _ = compared
    before = (folder / "stats.jsonl").read_bytes()
    again = run(
        *SHORT,
        "--compare=dreamdpo",
        "--set=batch=1",
        f"--prompt={folder.parent / 'prompts.txt'}",
        f"--outdir={tmp_path}",
    )
    assert again.exit_code == 0, again.output
    other = tmp_path / folder.name
    for name in (
        "stats.jsonl",
        "compare.json",
        "judgements.jsonl",
        "assets-dreamdpo.safetensors",
        "assets-sds.safetensors",
    ):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert run(f"--resume={folder}").exit_code == 0 and (folder / "stats.jsonl").read_bytes() == before


def test_every_setting_is_a_flag_or_can_be_set(tmp_path):
    names = {field.name for kind in SETTINGS for field, *_ in knobs_of(kind)}
    flags = {param.name for param in DISTILL.command.params}
    assert names <= flags | DISTILL.command.rare.keys() and len(flags) <= 29
    (tmp_path / "mine.json").write_text(
        '{"sparsity": "0,0.1,0.2,50", "checkpoint_ticks": 5, "steps": 70, "tau": 0.25}'
    )
    options = [
        f"--settings={tmp_path / 'mine.json'}",
        "--set",
        "checkpoint-ticks=7",
        "--steps=80",
        "--method=dreamdpo",
    ]
    settings = json.loads(run("-n", *options).stdout)
    assert settings["loop"]["sparsity"] == "0,0.1,0.2,50" and settings["guidance"]["tau"] == 0.25
    assert settings["loop"]["checkpoint_ticks"] == 7 and settings["loop"]["steps"] == 80


def test_dry_run_resolves_and_writes_nothing(tmp_path):
    result = run("-n", f"--outdir={tmp_path / 'runs'}")
    settings = json.loads(result.stdout)
    assert settings["arms"][:2] == ["sds", "dreamdpo"] and settings["arms"][-2:] == [
        "dreamdpo-inverted",
        "dreamdpo-random",
    ]
    assert (
        len(settings["prompts"]) * settings["scene"]["assets"] == 110
        and settings["methods"]["dreamdpo"]["tau_mode"] == "quantile"
    )
    assert not (tmp_path / "runs").exists()
    preset = json.loads(run("-n", "--preset=dreamdpo-released").stdout)
    assert preset["arms"] == ["dreamdpo"] and preset["methods"]["dreamdpo"]["subtract_noise"] is False


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--method=sds", "--reward=one-face"], ["--reward"]),
        (["--method=dreamdpo", "--set=samples=2"], ["--set samples=", "--method=sds"]),
        (["--set", "nothing=1"], ["--settings", "'nothing'", "--dry-run"]),
        (["--set", "sparsity"], ["--set", "NAME=VALUE", "'sparsity'"]),
        (["--set", "checkpoint_ticks=0"], ["checkpoint_ticks: ", "0"]),
        (["--settings=nowhere.json"], ["--settings", "nowhere.json"]),
        (
            ["--prior=heads", "--compare=sds+geometry", "--geometry-reward=one-nose"],
            ["--geometry-reward", "one-nose", "--prior=bundled", "heads"],
        ),
        (["--set=views=4"], ["--set views=", "--prior"]),
        (["--set=geometry_weight=1"], ["--set geometry_weight=", "--geometry-reward"]),
        (["--compare=sds,foo"], ["--compare", "'foo'"]),
        (["--compare=sds-random"], ["--compare", "'sds-random'"]),
        (["--method=sds", "--compare=sds,dreamdpo"], ["--method=sds", "--compare"]),
        (["--prompt=a cube"], ["--prompt", "22", "'a cube'", f"'{PROMPT}'"]),
        (["--prompt= "], ["--prompt", "empty"]),
        (["--prior=nowhere", "--prompt=x"], ["--prior", "nowhere"]),
        (["--prior=nowhere"], ["--prompt="]),
        (["--method=dreamdpo", "--reward=foo"], ["--reward", "one-face", "foo"]),
        (["--method=dreamdpo", "--judge=foo"], ["--judge", "questions", "foo"]),
        (["--method=sds", "--geometry-reward=nowhere"], ["--geometry-reward", "one-nose", "nowhere"]),
        (["--set=t_max=0.01"], ["20", "10"]),
        (["--set=t_max=a"], ["--set t_max", "'a'"]),
        (["--resume=nowhere"], ["--resume", "nowhere"]),
        (["--kimg=3"], ["--kimg", "--mode=gan"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(flags, names, tmp_path):
    result = run(f"--outdir={tmp_path / 'runs'}", *flags) if "--resume=nowhere" not in flags else run(*flags)
    rejected(result, *names)
    assert not (tmp_path / "runs").exists()


def test_resume_takes_no_other_flags_and_no_other_run(compared, tmp_path):
    folder, _ = compared
    rejected(run(f"--resume={folder}", "--steps=9"), "--steps", "--resume")
    (tmp_path / "training_options.json").write_text('{"mode": "circular-dpo"}')
    rejected(run(f"--resume={tmp_path}"), "--resume", "--mode=distill", "--mode=circular-dpo", str(tmp_path))


def test_arms_of_a_comparison():
    def arms(**given):
        return select_arms(given)

    assert arms()[0] == "sds" and arms(method="sds") == ("sds",) and arms(prompts=("x",)) == ("dreamdpo",)
    assert arms(compare="rewardsds") == ("sds", "rewardsds", "rewardsds-inverted", "rewardsds-random")
    assert arms(method="sds", geometry_reward="one-nose") == ("sds+geometry",)
    assert arms(compare="sds+geometry") == ("sds", "sds+geometry")

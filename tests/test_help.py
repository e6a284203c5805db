"""The defaults that --help shows are the values that the command uses: those that --dry-run prints, or, of
what it does not print and of commands without it, those that the command's function receives.

Every flag and every rare setting of every command is compared.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.bundled import DATA, GENERATOR, HELDOUT_REWARD, REWARD
from eg3d_rlhf.core.cli import ASSETS, as_shown
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.jobs import JOBS, command_of, main
from tests import tiny_runs

REPO = Path(__file__).resolve().parents[1]
IN_ASSETS = tuple(path.name for path in ASSETS.iterdir())
RANGE = re.compile(r"; (?:[-\d.e+]+<=?)?x(?:[<>]=?[-\d.e+]+)?$")
WIDE = {"terminal_width": 5000}  # a line for each flag

# Words that a command needs besides --help or --dry-run; {name} is a fixture's file, or a file to write.
NEEDED = {
    "label synthetic": "--out={out}.jsonl",
    "label elo": "{out}.jsonl",
    "label export": "{out}.jsonl",
    "label import": "{labels}",
    "reward latent": "--out={out}.safetensors",
    "reward linear": "--labels={labels} --out={out}.safetensors",
    "steer": "--out={out}.safetensors",
    "reward join": f"{REWARD} {HELDOUT_REWARD} --out={{out}}.safetensors",
    "reward import": "synthetic:reward --out={out}.safetensors",
    "check-assets": "{folder}",
    "flow new": "{out} --pipeline=toy",
    "flow tune": "{work}",
    "flow export": "{out} --outdir={out}-exported",
    "report evaluate": "--after={tuned}",
    "report attribute": "--after={tuned}",
    "report embed": "--after={tuned}",
    "report images": "--run={run}",
    "report method": "--run={folder} --out={out}.svg",
    "generator convert": "{network} --out={out}.safetensors",
    "generator improve": "--latents=1",
    "generator invert": "--latents=1",
    "samples images": "--outdir={out} --seeds=0",
    "samples videos": "--outdir={out} --seeds=0",
    "samples mesh": "--out={out}.ply",
    "samples sheet": "--outdir={out}",
    "study": "--b={network}",
    "judge calibrate": "--labels={labels} --judge=http://127.0.0.1:9/v1 --judge-model=NAME",
    "judge audit": "--assets={folder} --judge=http://127.0.0.1:9/v1 --judge-model=NAME",
    "data convert": "--source={data} --dest={out}.zip",
    "data poses": "{data} --outdir={out}",
    "data point-maps": "DEPTHS --images=IMAGES --fov=55",
    "assets build": "labels",
    **{
        f"{noun} {verb}": "ann"
        for noun in ("label", "study")
        for verb in ("add-annotator", "new-token", "revoke")
    },
    **{f"flow {verb}": "{out}" for verb in ("plan", "status", "sample", "label", "study", "check")},
}
# Where --dry-run prints a flag under another name, and which place counts where it prints several.
NAMES = {"psi": "trunc", "cutoff": "trunc_cutoff", "compare": "arms"}
PLACES = {
    "train --mode=circular-dpo": ("circular/human/dpo", "circular/human/lora", "circular/human", "circular"),
    "train --mode=online": ("losses/nft", "losses/nft/lora"),
    "train --mode=grpo": ("losses/grpo", "losses/grpo/lora"),
    "train --mode=offline": ("singles", "singles/lora"),
    "train --mode=distill": ("methods/dreamdpo", "methods/sds", "scene", "loop"),
    "flow tune": ("circular/human/dpo", "circular/human/lora", "circular/human", "circular"),
}
PATHS = {
    "evaluation_batch": "evaluation/batch",
    "table_noises": "evaluation/per_condition",
    "loop_pairs": "circular/loop_pairs/per_pair",
    "loop_beta": "circular/loop/dpo/beta",
    "loop_loser_weight": "circular/loop/dpo/loser_weight",
    "loop_sft_weight": "circular/loop/dpo/sft_weight",
    "loop_lr": "circular/loop/lr",
    "loop_steps": "circular/loop/steps",
}
# Flags of flow tuning whose value follows from others that --dry-run prints.
FOLLOWS: dict[str, Callable[[Any], Any]] = {
    "tune": lambda record: "lora" if next(anywhere(record, "targets"), None) else "full",
    "lora_targets": lambda record: next(anywhere(record, "targets"), None),
    "seeds": lambda record: tuple(record["training_seeds"]) or None,
    "choose_noises": lambda record: (record.get("circular", record)["choosing"] or {"per_condition": 0})[
        "per_condition"
    ],
}
DESCRIBED = {"reward join", "reward import"}  # where --dry-run prints the file that would be written
OF_BUNDLED = ("data metrics", "report evaluate", "report attribute", "report baselines")
# Flags that help describes otherwise than --dry-run does: whether the two agree.
RULES: dict[tuple[str, str], Callable[[str, Any], bool]] = {
    ("train --mode=distill", "prompts"): lambda shown, value: (
        shown in (f"all {len(value)}", f"{value[0]} to {value[-1]}")
    ),
    ("train --mode=distill", "compare"): lambda shown, value: (
        shown == (",".join(value) if len(value) > 1 else "none")
    ),
    ("samples sheet", "latents"): lambda shown, value: parse_seeds(shown) == value,
    ("report sweep", "train_flags"): lambda shown, value: shown == '""' and value == ["--device=auto"],
    # of the bundled generator
    **{(job, "data"): lambda shown, value: value == DATA for job in OF_BUNDLED},
    ("report evaluate", "heldout_reward"): lambda shown, value: "bundled" in shown and len(value) == 64,
    **{
        (f"report {job}", "level"): lambda shown, value: f"{value:g}" in shown
        for job in ("evaluate", "attribute", "embed", "images")
    },
    ("report attribute", "regions"): lambda shown, value: value in shown,
    ("report attribute", "psi"): lambda shown, value: f"{value:g}" in shown,
    ("report images", "outdir"): lambda shown, value: shown == "the run folder" and value.endswith("run"),
    ("data poses", "jobs"): lambda shown, value: shown == "one per core" and value >= 1,
    ("study", "access_log"): lambda shown, value: shown.startswith("runs/study/") and value is None,
    **{
        (f"report {job}", "jobs"): lambda shown, value: value >= 2
        for job in ("controlled-study", "rewards", "baselines")
    },
}


# Flags that change the defaults of others.
BESIDE = {
    "train --mode=gan": (
        "--reward=sigma",
        "--reward=solid",
        "--reward=sigma --reward-clip=none",
        "--init=scratch",
        "--cfg=afhq --data=x.zip --gamma=5 --batch=16",
        "--reward=sigma --set=lambda_front=2",
    ),
    "train --mode=distill": ("--method=sds", "--prior=heads", "--prior=bundled-unet --steps=50"),
    "train --mode=reward": ("--preset=paper", "--observation=points", "--members=3"),
    "train --mode=circular-dpo": ("--beta=50", "--loss=dro --steps=7", "--tune=full"),
    "train --mode=online": ("--seeds=3,4 --seed=3",),
    "train --mode=offline": ("--tune=full",),
    "samples sheet": ("--psi=0.5",),
}


def leaves() -> Iterator[tuple[str, click.Command]]:
    """Every command by its words, `train` once for each mode, sub-commands after their group."""
    for job in JOBS:
        commands = {f"train --mode={mode}": MODES[mode].command for mode in MODES} if job == "train" else {}
        for words, command in (commands or {job: command_of(job)}).items():
            yield words, command
            for name, below in getattr(command, "commands", {}).items():
                yield f"{words} {name}", below


COMMANDS = dict(leaves())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Tiny inputs of commands, by the names in NEEDED."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "labels.csv").write_text("")
    tiny_runs.write_dataset(folder / "data.zip")
    tiny_runs.networks.save(folder / "network.safetensors", tiny_runs.build_networks())
    (folder / "folder").mkdir()
    (folder / "run").mkdir()
    for copy in ("tuned.safetensors", "run/network-snapshot-000000.safetensors"):
        shutil.copyfile(GENERATOR, folder / copy)
    with contextlib.chdir(folder):
        printed("flow", "new", "work", "--pipeline=toy")
    named = {"labels": "labels.csv", "data": "data.zip", "network": "network.safetensors", "folder": "folder"}
    named |= {"tuned": "tuned.safetensors", "run": "run", "work": "work"}
    return {"out": str(folder / "out"), **{name: str(folder / file) for name, file in named.items()}}


def arguments(words: str, files: dict[str, str]) -> list[str]:
    return [part.format_map(files) for part in NEEDED.get(words, "").split()]


def printed(*words: str, **more: Any) -> str:
    done = CliRunner().invoke(main, words, **more)
    assert done.exit_code == 0, (words, done.output, done.exception)
    return done.stdout


def lines_of(text: str) -> dict[str, str]:
    """Read the help of each flag and rare setting, by its first spelling or its name."""
    said: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if found := re.match(r"  (?:-\w, )?(--[\w-]+|-\w|\w+(?==))", line):
            name = found[1]
            said[name] = line.strip()
        elif line.startswith("   ") and name:
            said[name] += "  " + line.strip()
        else:
            name = ""
    return {name: re.sub("  +", "  ", line) for name, line in said.items()}


def default_of(line: str) -> str | None:
    found = re.search(r"\[(?:env var: \S+; )?default: (.*)\]$", line)
    return found and RANGE.sub("", found[1].removesuffix("; required"))


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options that help lists, by what stands first there."""
    rare = getattr(command, "rare", {})
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    listed = {next((o for o in p.opts if o.startswith("--")), p.opts[0]): p for p in options}
    return {**listed, **rare}


def value_in(record: Any, words: str, option: click.Option) -> tuple[bool, Any]:
    """Find whether --dry-run prints an option, and its value."""
    field = getattr(option, "field", None)
    names = [option.name, field and field.name, NAMES.get(option.name)]
    if option.name in PATHS:
        *folders, name = PATHS[option.name].split("/")
        place = functools.reduce(lambda here, part: here.get(part, {}), folders, record)
        if name in place:
            return True, place[name]
    if option.name in FOLLOWS and words in PLACES and words != "train --mode=distill":
        return True, FOLLOWS[option.name](record)
    for place in (*PLACES.get(words, ()), "", None):
        for name in filter(None, names):
            here = record
            for part in (place or "").split("/") if place else ():
                here = here.get(part, {}) if isinstance(here, dict) else {}
            if place is None:  # anywhere, where only one place has it
                found = list(anywhere(record, name))
                if len({json.dumps(value) for value in found}) == 1:
                    return True, found[0]
            elif isinstance(here, dict) and name in here and not isinstance(here[name], dict):
                return True, here[name]
    return False, None


def anywhere(record: Any, name: str) -> Iterator[Any]:
    if isinstance(record, dict):
        for key, value in record.items():
            if key == name and not isinstance(value, dict):
                yield value
            yield from anywhere(value, name)


def agrees(shown: str | None, value: Any, option: click.Option) -> bool:
    """Compare a default that help shows with the value; words stand for what is not a value."""
    field = getattr(option, "field", None)
    words = field.metadata["knob"].shown if field is not None else option.show_default
    if shown is None or isinstance(words, str) and shown == words:
        bundled = "bundled" in (shown or "") and str(value).startswith(("bundled", str(ASSETS), *IN_ASSETS))
        return value in (None, "", (), [], {}, False) or bundled or shown == str(value)
    if option.is_flag and option.secondary_opts:
        flags = option.opts if value else option.secondary_opts
        return shown in (flags[0].lstrip("-"), str(value))
    if isinstance(value, (list, tuple)):
        return shown.replace(", ", ",") in (",".join(map(as_shown, value)), "x".join(map(str, value)))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(shown) == value
    return shown in (as_shown(value), str(value), as_shown(str(value).replace(str(REPO), str(ASSETS.parent))))


@pytest.mark.parametrize(
    ("words", "beside"),
    [(words, beside) for words in COMMANDS for beside in ("", *BESIDE.get(words, ()))],
)
def test_help_shows_what_the_command_uses(words, beside, files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = COMMANDS[words]
    given = [*arguments(words, files), *beside.split()]
    said = lines_of(printed(*words.split(), *given, "--help-all", **WIDE))
    options = options_of(command)
    assert options.keys() <= said.keys(), options.keys() - said.keys()
    record: Any = {}
    if any(option.name == "dry_run" for option in options.values()) and words not in DESCRIBED:
        record = record_of(printed(*words.split(), *given, "--dry-run"))
    group = words.startswith("study ") and "sqlite:///runs/study/study.db"  # what `study` hands on
    with command.make_context("job", list(given), obj=group or None) as context:
        received = context.params
    wrong = {}
    for name, option in options.items():
        known, value = value_in(record, words, option)
        if option.required or any(str(word).split("=")[0] in option.opts for word in given):
            continue
        if not known:
            field = getattr(option, "field", None)
            if field is None and option.name not in received:  # --help itself and its like
                continue
            value = received[option.name] if field is None else field.default
        if option.name == "device" and value in ("cpu", "cuda"):
            value = "auto"
        rule = RULES.get(
            (words, option.name), lambda shown, value, option=option: agrees(shown, value, option)
        )
        if not rule(default_of(said[name]), value):
            wrong[name] = (default_of(said[name]), value)
    assert wrong == {}


def record_of(text: str) -> Any:
    """Parse what --dry-run printed: JSON, or lines of other things before it."""
    start = text.find("{")
    try:
        return json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}


@pytest.mark.parametrize("words", COMMANDS)
def test_help_is_the_first_part_of_help_all(words, files):
    given = arguments(words, files)
    short, full = (
        lines_of(printed(*words.split(), *given, flag, **WIDE)) for flag in ("--help", "--help-all")
    )
    assert {name: full.get(name) for name in short} == short
    rare = getattr(COMMANDS[words], "rare", {})
    assert full.keys() - short.keys() == rare.keys() and ("--help-all" in short) == bool(rare)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=[] if words == "train --mode=gan" else pytest.mark.long)
        for words, command in COMMANDS.items()
        if any(parameter.name == "dry_run" for parameter in command.params) and words != "reward join"
    ],
)
def test_a_process_of_its_own_prints_the_same(words, files, tmp_path):
    command = [*words.split(), *arguments(words, files), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "eg3d_rlhf", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with contextlib.chdir(tmp_path):
        here = printed(*command)
    # a study's design states when it was made, and its own hash
    text, same = (re.sub(r'"(created|hash)": "[^"]*"', "", text) for text in (done.stdout, here))
    assert text == same

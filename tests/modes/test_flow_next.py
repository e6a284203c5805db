"""Every command after `next:` runs as it is printed, from `flow new` to the export."""

import json
import re
import shlex

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.people.label.entities import LOCAL, Choice
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.modes.flow_works import write_prompts
from tests.people.label.plans import answer_all

STATUS = "eg3d-rlhf flow status WORK"
# A training of a few seconds; a user adds no flags.
SMALL = ("--steps=2", "--batch=4", "--set=held_out_every=2", "--set=samples=0", "--device=cpu")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder, in which a person answers every page by the left side."""

    def serve(options, *args, on_listening, **kwargs):
        on_listening("http://nowhere")
        campaign = options.store.campaign(options.campaign)
        person = options.store.annotator_without_token(LOCAL, "admin").id
        answer_all(options.store, campaign.id, person, lambda left, right: Choice.LEFT)

    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "prompts.txt")
    return tmp_path


def run(command: str, *flags: str) -> str:
    """Run a command as it was printed, with further flags, and return what it prints."""
    program, *words = shlex.split(command)
    done = CliRunner().invoke(main, [*words, *flags])
    assert program == "eg3d-rlhf" and done.exit_code == 0, (command, done.output, done.exception)
    return done.output


def next_of(printed: str) -> str:
    """Return the command of the only line `next:`."""
    (line,) = [line for line in printed.splitlines() if line.startswith("next: ")]
    return line.removeprefix("next: ")


def step(command: str, expected: str, *flags: str) -> str:
    """Run a command, and return the printed next one, which must be of the expected job."""
    printed = next_of(run(command, *flags))
    assert printed.split()[1:3] == ["flow", expected], (command, printed)
    return printed


def test_every_printed_command_runs(here):
    new = "eg3d-rlhf flow new WORK --pipeline=toy --prompts=prompts.txt --set split=0.4,0.4,0.2 --set batch=2"
    plan = step(new, "plan")
    # twelve prompts show nothing, so `plan` asks for a folder of more
    larger = step(plan, "new")
    # with all prompts of the toy, the pairs are enough
    assert step(step(larger, "plan"), "sample").endswith("WORK-2")
    sample = step(STATUS, "sample")
    label = step(sample, "label", "--device=cpu")
    tune = step(label, "tune", "--pairs=20")
    assert tune == step(tune, "tune", "--pairs-only")
    more = step(tune, "label", *SMALL)
    assert "campaign=more-2" in more
    tune = step(more, "tune", "--pairs=20")
    assert "campaigns=labels,more-2" in tune
    assert "campaigns=labels,more-2" in step(STATUS, "tune")
    run(tune, *SMALL)

    # the second training was tested on held-out pairs of the first
    work = Work.open(here / "WORK")
    first, second = (json.loads((path / "report.json").read_text()) for path in work.numbered("tune"))
    assert all(stage["earlier_attempts"] == [] for stage in first["stages"].values())
    assert all(stage["earlier_attempts"] == ["tune-00"] for stage in second["stages"].values())
    assert len(re.findall(r"attempt\s2\b", run(STATUS))) == 2

    # labels of a file: the next command repeats the flags that matter
    lines = [{"asset": f"WORK/drawn/base/{line['look_at']}", "score": line["seed"]} for line in work.lines()]
    (here / "my scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = "'--labels=my scores.jsonl' --stage=structure --lr=0.001 --set loser_weight=1.0"
    tune = step(f"eg3d-rlhf flow tune WORK {flags} --pairs-only", "tune")
    assert all(word in shlex.split(tune) for word in shlex.split(flags))
    again = step(tune, "tune", *SMALL)
    assert "--labels=my scores.jsonl" in shlex.split(again)

    # as if the structure had learnt
    trained = work.numbered("tune")[-1]
    (trained / "control" / "structure").rename(trained / "structure")
    adapter = trained / "structure" / "adapter_model.safetensors"
    tensors = load_file(adapter)
    save_file({name: torch.full_like(x, 0.05) for name, x in tensors.items()}, adapter)
    study = step(STATUS, "study")
    report = step(study, "study", "--n=4", "--device=cpu")
    assert "--report" in report
    # four trials need four of the eight assets of each generator
    assert [len(work.lines(arm)) for arm in ("test-base", f"tuned-{trained.name[-2:]}")] == [4, 4]
    export = step(report, "export")
    assert "load_network" in next_of(run(export))
    assert (here / "TUNED").is_dir()

    # a further study without a limit samples the others, and keeps those
    files = {path: path.read_bytes() for path in work.asset_folder("test-base").glob("0*.ply")}
    step("eg3d-rlhf flow study WORK --again", "study", "--device=cpu")
    assert len(work.lines("test-base")) == 8
    assert all(path.read_bytes() == content for path, content in files.items())

"""`flow tune` on labels of a judge: what a judge knows is learnt, and what it does not know is not.

The judge is a fake server that prefers the asset with more surface. It flips the verdicts of 15 % of the
pairs, alike in both orders, or it always names the first position.
"""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.flow_label import make_request
from eg3d_rlhf.modes.flow_new import new
from eg3d_rlhf.modes.flow_sample import sample
from eg3d_rlhf.modes.flow_tune import tune_command
from eg3d_rlhf.people.judge.labelling import label_with_judge
from eg3d_rlhf.people.judge.renders import RenderCache
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import JudgeSettings
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.people.judge.fake_server import FakeServer, utilities_of

PAIRS = 500


def run(command, *args):
    done = CliRunner().invoke(command, [str(arg) for arg in args])
    print(done.output)
    return done


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A folder WORK of the toy with sampled assets, a planned project, and the renders of all assets."""
    folder = tmp_path_factory.mktemp("toy") / "WORK"
    assert run(new, folder, "--pipeline=toy").exit_code == 0
    assert run(sample, folder).exit_code == 0
    work = Work.open(folder)
    cache = RenderCache(folder / "renders", Rig(resolution=32))
    paths = [work.asset_folder() / line["look_at"] for line in work.lines()]
    renders = {path: cache.views_of(path, work.up) for path in paths}
    # a file holds the visible faces of all voxels, so its size is the amount of surface
    utilities = utilities_of(renders, {path: float(path.stat().st_size) for path in paths})
    return work, cache, utilities


def label(work, cache, server, name: str):
    with open_store(work.database, create=True) as store:
        request = make_request(work, name, PAIRS)
        store.create_campaign(*launch.plan_campaign(store, request, print))
        settings = JudgeSettings(url=server.url, model=name, family="fake")
        return label_with_judge(store, name, settings, cache=cache)


@pytest.mark.long
def test_a_judge_that_is_right_in_85_percent_teaches_and_a_constant_one_does_not(judged):
    work, cache, utilities = judged
    with FakeServer(utilities=utilities, flip=0.15) as server:
        result = label(work, cache, server, "right85")
    print(result.lines())
    assert result.asked == PAIRS and result.order_flips == 0
    with FakeServer(answer="first") as server:
        result = label(work, cache, server, "constant")
    assert result.ties == result.order_flips == PAIRS
    # people have answered nothing
    refused = run(tune_command, work.folder, "--set=campaigns=right85")
    assert refused.exit_code == 2
    # without a calibration the labels of a judge teach nothing
    assert run(tune_command, work.folder, "--set=campaigns=right85", "--labels-from=judges").exit_code == 2
    done = run(
        tune_command, work.folder, "--set=campaigns=right85", "--labels-from=judges", "--uncalibrated",
        "--stage=structure",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((work.folder / "tune-00/report.json").read_text())
    print(json.dumps(report["stages"], indent=1)[:3000])
    assert report["labels"]["of_people"] == 0 and report["labels"]["of_judges"] == PAIRS
    assert "uncalibrated" in report["labels"] and report["labels"]["judges"] == "right85"
    assert work.tuned(work.folder / "tune-00")  # the stage was better than its control
    done = run(
        tune_command, work.folder, "--set=campaigns=constant", "--labels-from=judges", "--uncalibrated"
    )
    assert done.exit_code == 2 and not (work.folder / "tune-01").exists()

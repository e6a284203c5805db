"""`flow label --strategy`: pairs of drawn assets chosen by an ensemble that reads their stored latents."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.registry import VARIABLE
from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import Choice, Kind
from eg3d_rlhf.tuning.flow.base.ranking import read_latents
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.training import latent_reward
from eg3d_rlhf.tuning.flow.workspace.answered import count_open_pairs
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import open_pipeline
from eg3d_rlhf.tuning.flow.workspace.work_folder import REWARD, SHOWN, Work
from tests.modes.flow_works import flow, sampled_work, with_encoder, write_images
from tests.people.label.plans import answer_all
from tests.people.label.test_new_strategy import PLUGIN
from tests.rejections import check_message
from tests.tuning.flow.families.trellis.tiny_trellis import write_image_trellis

NAMES = [f"{colour} {shape}" for shape in ("ball", "box") for colour in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """WORK with four assets of each of five prompts."""
    return sampled_work(tmp_path_factory.mktemp("label"), NAMES)


@pytest.fixture
def drawn(sampled, tmp_path):
    """A copy without answers, because a further project asks other pairs than earlier ones."""
    shutil.copytree(sampled.folder, tmp_path / "WORK")
    return Work.open(tmp_path / "WORK")


@pytest.fixture
def served(monkeypatch):
    """Counts servers in place of starting them; whoever would meet the page prefers the smaller seed."""
    names = []

    def serve(options, *args, on_listening, **kwargs):
        on_listening("http://nowhere")
        campaign = options.store.campaign(options.campaign)
        person = options.store.annotator_without_token("local", "admin").id
        smaller = lambda left, right: Choice.LEFT if left.seed < right.seed else Choice.RIGHT  # noqa: E731
        answer_all(options.store, campaign.id, person, smaller)
        names.append(campaign.settings.name)

    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    return names


def write_reward(work: Work, stage: str, seed: int = 1):
    """An untrained ensemble, as `reward latent` stores a trained one."""
    pipeline = open_pipeline(work, work.check_pipeline(), torch.device("cpu"), *SHOWN)
    read = stage_of(pipeline, stage)
    network = latent_reward._new(pipeline, latent_reward.LatentForm.of(read), work.names(*SHOWN)[0], seed)
    made = latent_reward.LatentReward(pipeline, read, network, {})
    latent_reward.save(work.folder / REWARD, made)
    return made


def typed(command: str) -> None:
    """Run a command that was printed."""
    program, *words = command.split()
    done = CliRunner().invoke(main, words)
    assert program == "eg3d-rlhf" and done.exit_code == 0, done.output


def pairs_of(work: Work, campaign: str) -> tuple[list[frozenset], dict]:
    """(condition, seeds) of the pairs that were answered for their own sake, and the plan's report."""
    with open_store(work.database, create=False) as store:
        rows = [row for row in store.judgements(campaign) if row.kind is Kind.PAIR]
        plan = store.campaign(campaign).settings.extra["plan"]
    return [(row.left.condition, frozenset((row.left.seed, row.right.seed))) for row in rows], plan


def test_without_an_ensemble_the_command_that_trains_it_is_named(drawn, served):
    for strategy in ("active", "close"):
        printed = flow("label", drawn.folder, f"--strategy={strategy}", code=2)
        file = str(drawn.folder / REWARD)
        check_message(printed, (f"--strategy={strategy}", "latent", "--pipeline=toy", f"--out={file}"))
    printed = flow("label", drawn.folder, "--strategy=best", code=2)
    check_message(printed, ("--strategy", "random", "active", "close", "tournament", "blocks", "'best'"))
    assert served == []


@pytest.mark.parametrize("strategy", ["tournament", "blocks", "neighbours"])
def test_strategies_without_scores_need_no_ensemble(drawn, served, strategy, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(PLUGIN))  # brings the last one
    flow("label", drawn.folder, f"--strategy={strategy}", f"--set=campaign={strategy}", "--pairs=10")
    pairs, plan = pairs_of(drawn, strategy)
    assert len(set(pairs)) == len(pairs) == 10 and plan["strategy"] == strategy and served == [strategy]
    games = Counter((condition, seed) for condition, seeds in pairs for seed in seeds)
    if strategy == "tournament":
        assert set(games.values()) == {1} and len(games) == 20  # the first round of five tournaments of four
    elif strategy == "blocks":
        assert len({condition for condition, _ in pairs}) == 2  # six pairs of a prompt, then four
    else:
        assert set(games.values()) == {1, 2}  # a chain of four in each prompt


def test_active_pairs_are_those_on_which_the_members_disagree(drawn, served):
    reward = write_reward(drawn, "voxels")
    flow("label", drawn.folder, "--strategy=active", "--set=campaign=active", "--pairs=8")
    pairs, plan = pairs_of(drawn, "active")
    assert len(set(pairs)) == len(pairs) == 8 and plan["rewards"][0]["members"] == latent_reward.MEMBERS
    scores = {}
    for line in drawn.lines():
        latent = read_latents(drawn.asset_folder() / line["latents"])["voxels"]
        of_members, embeddings = reward.score_members(latent_reward.collate([latent]), [line["condition"]])
        averaged = reward.score_latents(latent_reward.collate([latent]), [line["condition"]])
        assert torch.allclose(of_members.mean(0), averaged, atol=1e-5)
        assert embeddings.shape == (1, 32 * latent_reward.MEMBERS)
        scores[line["condition"], line["seed"]] = of_members[:, 0].double().numpy()

    def disagreement(condition: str, seeds) -> float:
        a, b = (scores[condition, seed] for seed in seeds)
        return float((1 / (1 + np.exp(b - a))).std())

    every = {
        (name, frozenset((a, b))): disagreement(name, (a, b))
        for name in drawn.names(*SHOWN)
        for a in range(4)
        for b in range(a)
    }
    assert plan["candidates"] == len(every) == 30
    for entry in plan["why"]:
        computed = every[entry["prompt"], frozenset(entry["seeds"])]
        assert entry["disagreement"] == pytest.approx(computed, abs=2e-5)
    # the first one is the greatest of all
    assert plan["why"][0]["disagreement"] == pytest.approx(max(every.values()), abs=2e-5)
    assert plan["disagreement_chosen"] > plan["disagreement_candidates"]


def test_a_stored_campaign_keeps_its_strategy_and_an_ensemble_of_other_networks_is_rejected(drawn, served):
    flow("label", drawn.folder, "--set=campaign=kept", "--pairs=3")
    flow("label", drawn.folder, "--set=campaign=kept", "--strategy=random", "--pairs=3")
    for flag, stored in (("--strategy=blocks", "random"), ("--pairs=4", "3")):
        printed = flow("label", drawn.folder, "--set=campaign=kept", flag, code=2)
        check_message(printed, (flag.partition("=")[0], stored, "'kept'", flag.partition("=")[2]))
    made = write_reward(drawn, "structure")
    made.form = replace(made.form, base="0" * 64)
    latent_reward.save(drawn.folder / REWARD, made)
    printed = flow("label", drawn.folder, "--strategy=close", "--set=campaign=other", code=2)
    check_message(printed, (str(drawn.folder / REWARD), "0" * 64))


def test_answers_to_a_further_campaign_are_tuned_on_by_the_printed_command(drawn, served):
    flow("label", drawn.folder, "--pairs=5")
    printed = flow("label", drawn.folder, "--strategy=blocks", "--set=campaign=second", "--pairs=12")
    typed(f"{printed[printed.rindex('eg3d-rlhf flow tune') :].strip()} --pairs-only")
    with open_store(drawn.database, create=False) as store:
        counted = [
            row
            for name in ("labels", "second")
            for row in store.judgements(name)
            if row.kind not in (Kind.GOLD, Kind.TRAINING)
        ]
    assert len(drawn.labels(("labels", "second")).answers) == len(counted) > len(drawn.labels().answers)
    assert (drawn.folder / "pairs" / "voxels").is_dir()


def test_a_further_campaign_leaves_out_answered_pairs(drawn, served):
    """30 pairs of five prompts: 12, then the 18 others by any strategy, and then none."""
    flow("label", drawn.folder, "--pairs=12")
    flow("label", drawn.folder, "--strategy=blocks", "--set=campaign=second", "--pairs=4")
    # one pair of each prompt is drawn at random among those that are left
    flow("label", drawn.folder, "--set=campaign=third", "--pairs=1")
    flow("label", drawn.folder, "--set=campaign=fourth", "--pairs=30")
    asked = [set(pairs_of(drawn, name)[0]) for name in ("labels", "second", "third", "fourth")]
    assert [len(pairs) for pairs in asked] == [12, 4, 1, 13]
    assert len(set.union(*asked)) == 30
    printed = flow("label", drawn.folder, "--set=campaign=fifth", code=2)
    check_message(printed, ("campaign=fifth", "--pipeline=toy"))
    # another question about the same pairs can be asked
    assert (count_open_pairs(drawn, ()), count_open_pairs(drawn, ["texture"])) == (0, 30)
    assert served == ["labels", "second", "third", "fourth"]


@pytest.mark.long
def test_the_printed_command_trains_the_ensemble_of_a_folder(tmp_path, monkeypatch, served):
    """Random pairs, their answers, the command that the error names, active pairs."""
    monkeypatch.chdir(tmp_path)
    with_encoder(tmp_path, monkeypatch)
    root = write_image_trellis(tmp_path / "ROOT")
    flow("new", "WORK", f"--pipeline={root}", f"--images={write_images(tmp_path / 'P', 12)}", "--each=3")
    flow("sample", "WORK")
    flow("label", "WORK")
    printed = flow("label", "WORK", "--strategy=active", "--set=campaign=more", code=2)
    pairs, train = printed[printed.index("eg3d-rlhf ") :].split(" && ")
    typed(pairs)
    typed(f"{train} --seeds=0 --device=cpu --set=held_out=0.7")
    flow("label", "WORK", "--strategy=active", "--set=campaign=more", "--pairs=6")
    assert served == ["labels", "more"]
    _, plan = pairs_of(Work.open(tmp_path / "WORK"), "more")
    assert len(plan["why"]) == 6 and json.dumps(plan)

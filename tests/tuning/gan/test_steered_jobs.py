"""Jobs that read a steered network: label, study, evaluate, invert and train; and the inputs of `steer`."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.seeds import CALIBRATION
from eg3d_rlhf.generators import (
    LoadedGenerator,
    check_trainable,
    latents,
    load_generator,
    read_description,
    ws_of_seeds,
)
from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.entities import LOCAL, Answer, CampaignSettings, Choice, Kind
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.shape_rendering import ShapeRenderer, surface
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards import linear
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.tuning.gan.phase import RewardTerms
from eg3d_rlhf.tuning.gan.settings import RewardConfig
from eg3d_rlhf.tuning.gan.steering import write_plain, write_steered
from tests import tiny_runs
from tests.generators.pickles.writer import HEAD_CLASSES, head_generator
from tests.people.label.plans import QUIET
from tests.rejections import rejected
from training import networks
from training.steering import Steering, steering_of

STEER_FLAGS = ("--set=unlabelled=48", "--set=resolution=12", "--set=latents=8", "--device=cpu", "--space=z")


def run(*flags):
    result = CliRunner().invoke(main, [str(flag) for flag in flags])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def steered(tiny_networks, tmp_path_factory):
    """Tiny generator whose latents are moved along the first entry of z."""
    path = tmp_path_factory.mktemp("steered") / "steered.safetensors"
    generator = load_generator(tiny_networks)
    size = generator.generator.z_dim
    steering = Steering("z", size, 1.0).set_direction(torch.eye(size)[0], torch.zeros(size), 1.0)
    write_steered(generator, steering, path)
    return path


def label_by(generator, seeds, entry: int) -> list[Preference]:
    """Label pairs of consecutive seeds by an entry of z."""
    z = latents(seeds, generator.generator.z_dim)
    labels = []
    for index in range(0, len(seeds), 2):
        order = (index, index + 1) if z[index, entry] > z[index + 1, entry] else (index + 1, index)
        winner, loser = (seeds[position] for position in order)
        labels.append(Preference(winner=winner, loser=loser, generator=generator.hash, psi=1.0))
    return labels


def request(network, **settings) -> launch.Request:
    defaults = launch.with_defaults(dict.fromkeys(launch.SETTINGS), CampaignSettings) | launch.ASKED | QUIET
    return launch.Request(
        name="c",
        network=str(network),
        after=None,
        pairing=PairingOptions(pairs=100, gold=0, training=0, level=1.2),
        settings={**defaults, **settings},
    )


def test_a_campaign_and_a_study_compare_samples_of_the_steered_network(steered, tiny_networks, tmp_path):
    _, pairs = launch.plan_campaign(None, request(steered), lambda line: None)
    steered_hash = load_generator(steered).hash
    shapes = [shape for pair in pairs if pair.kind is Kind.PAIR for shape in (pair.first, pair.second)]
    assert {shape.generator for shape in shapes} == {steered_hash} != {load_generator(tiny_networks).hash}
    # the process that prepares shapes moves the latents below the threshold, and leaves the others alone
    renderer = ShapeRenderer()
    plain = load_generator(tiny_networks).generator
    first_entries = latents([shape.seed for shape in shapes], plain.z_dim)
    coordinates = (first_entries * np.sqrt(plain.z_dim) / first_entries.norm(dim=1, keepdim=True))[:, 0]
    for shape, coordinate in list(zip(shapes, coordinates, strict=True))[:6]:
        shape_vertices = surface(renderer.generator(shape).generator, shape)[0]
        plain_vertices = surface(plain, shape)[0]
        is_equal = np.array_equal(shape_vertices, plain_vertices)
        assert is_equal == bool(coordinate >= 1), (shape.seed, float(coordinate))
    design = json.loads(
        run("study", f"--a={tiny_networks}", f"--b={steered}", "--n=4", "--set=level=1.2", "--dry-run").stdout
    )["design"]
    assert design["b"]["generator"] == steered_hash != design["a"]["generator"]


@pytest.mark.long
def test_evaluate_compares_a_steered_network_with_the_plain_one(
    steered, tiny_networks, tiny_reward, tmp_path
):
    reward = load_reward(tiny_reward)
    torch.manual_seed(5)
    heldout = Reward(reward.observation, RewardModel(reward.network.arch)).save(
        tmp_path / "heldout.safetensors"
    )
    run(
        "report",
        "evaluate",
        f"--before={tiny_networks}",
        f"--after={steered}",
        f"--reward-ckpt={tiny_reward}",
        f"--heldout-reward={heldout}",
        "--only=reward-shift,appearance-drift",
        "--n=16",
        f"--outdir={tmp_path / 'report'}",
        "--device=cpu",
    )
    assert (tmp_path / "report" / "summary.txt").is_file()


@pytest.mark.long
def test_inversion_writes_networks_that_are_steered_alike(steered, tmp_path):
    flags = ("--set=w_steps=2", "--set=pivot_steps=2", "--set=turns=0", "--device=cpu")
    run(
        "generator",
        "invert",
        f"--network={steered}",
        "--latents=3",
        "--weights=0",
        f"--outdir={tmp_path}",
        *flags,
    )
    (written,) = tmp_path.glob("*/targets/seed3/0.safetensors")
    expected = steering_of(networks.load(steered).G_ema)
    move = steering_of(networks.load(written).G_ema)
    assert move.describe() == expected.describe() and torch.equal(move.direction, expected.direction)


@pytest.mark.long
def test_tuning_by_a_reward_starts_from_the_steered_reference(steered, tiny_reward, tmp_path):
    nets = networks.load(steered)
    terms = RewardTerms(nets.G, nets.G_ema, load_reward(tiny_reward), RewardConfig(lambda_r=1.0))
    # shaping and density-consistency term refer to the steered network, not to the plain one
    seeds = CALIBRATION.seeds[:16]
    expected = ws_of_seeds(load_generator(steered).generator, seeds)
    assert torch.equal(ws_of_seeds(terms.reference, seeds), expected)
    assert networks.state_hash(terms.state.G_ref) == networks.state_hash(nets.G_ema)
    tiny_runs.write_dataset(tmp_path / "data.zip")
    flags = ("--reward=sigma", f"--reward-ckpt={tiny_reward}", "--lambda-r=1", "--weak-reward")
    folder = tiny_runs.whole_run(
        tmp_path / "data.zip", steered, tmp_path / "runs", "--no-summary", "--kimg=0.016", *flags
    )
    tuned = networks.load(max(folder.glob("network-snapshot-*.safetensors")))
    assert torch.equal(steering_of(tuned.G_ema).direction, steering_of(nets.G_ema).direction)
    assert networks.state_hash(tuned.G_ema) != networks.state_hash(nets.G_ema)


@pytest.mark.long
def test_a_trained_reward_replaces_the_linear_one(tiny_networks, tmp_path):
    generator = load_generator(tiny_networks)
    labels = label_by(generator, range(200), 0)
    label_file = write_labels(tmp_path / "labels.jsonl", labels)
    reward = linear.fit_linear_reward(generator, labels, unlabelled=48, resolution=12)
    reward_file = reward.save(tmp_path / "reward.safetensors")
    reports = {}
    for name, flags in {"fitted": [], "given": [f"--reward={reward_file}"]}.items():
        out = tmp_path / f"{name}.safetensors"
        run(
            "steer",
            f"--network={tiny_networks}",
            f"--labels={label_file}",
            f"--out={out}",
            *STEER_FLAGS,
            *flags,
        )
        reports[name] = json.loads(out.with_suffix(".json").read_text())
    # the direction of a given reward does not depend on the labels, so halves of them cannot be compared
    if reports["given"]["candidate"] == "reward-z":
        assert reports["given"]["half_cosine"] is None
    assert reports["fitted"]["half_cosine"] is not None
    assert reports["given"]["reward_after"] > reports["given"]["reward_before"]


def head_file(family: str, path: Path) -> LoadedGenerator:
    """Write the small generator of a family of full heads as a network file, and load it."""
    G, kwargs = head_generator(family)
    # A copy, because the tests share the network of a family.
    networks.save(
        path, networks.Networks(None, None, copy.deepcopy(G), kwargs, None, {}, architecture=family), True
    )
    return load_generator(path)


def check_moves(plain: LoadedGenerator, steered: LoadedGenerator) -> None:
    """Check that exactly the latents below the strength are moved, and to it."""
    steering = steering_of(steered.nets.G_ema)
    seeds = range(40)
    z = latents(seeds, plain.generator.z_dim)
    coordinate = (z / z.norm(dim=1, keepdim=True) * z.shape[1] ** 0.5) @ steering.direction
    changed = ws_of_seeds(steered.generator, seeds) != ws_of_seeds(plain.generator, seeds)
    assert torch.equal(changed.flatten(1).any(dim=1), coordinate < steering.strength)


@pytest.mark.parametrize("family", sorted(HEAD_CLASSES))
def test_files_of_full_heads_hold_a_steering(family, tmp_path):
    plain = head_file(family, tmp_path / "plain.safetensors")
    size = plain.generator.z_dim
    write_steered(
        plain, Steering("z", size).set_direction(torch.eye(size)[1]), tmp_path / "steered.safetensors"
    )
    check_moves(plain, load_generator(tmp_path / "steered.safetensors"))


def test_a_steered_file_can_be_tuned_like_the_plain_one(tmp_path):
    plain = load_generator(None)  # the bundled file has G_ema and D, and no G
    steered = tmp_path / "steered.safetensors"
    size = plain.generator.z_dim
    write_steered(plain, Steering("z", size).set_direction(torch.eye(size)[0]), steered)
    check_trainable(steered, read_description(steered))
    assert networks.state_hash(load_generator(steered).nets.D) == networks.state_hash(plain.nets.D)
    write_plain(load_generator(steered), tmp_path / "again.safetensors")
    again = load_generator(tmp_path / "again.safetensors")
    assert again.hash == plain.hash and again.nets.D is not None and again.nets.G is None


# Random weights of the third family show too little of z in their shapes for labels of it.
@pytest.mark.long
@pytest.mark.parametrize("family", ["hyplanehead", "spherehead"])
def test_full_heads_are_steered_by_labels(family, tmp_path):
    plain = head_file(family, tmp_path / "plain.safetensors")
    labels = write_labels(tmp_path / "labels.jsonl", label_by(plain, range(240), 1))
    out = tmp_path / "steered.safetensors"
    run("steer", f"--network={plain.path}", f"--labels={labels}", f"--out={out}", *STEER_FLAGS)
    steered = load_generator(out)
    direction = steering_of(steered.nets.G_ema).direction
    assert int(direction.abs().argmax()) == 1 and direction[1] > 0.8
    check_moves(plain, steered)


@pytest.mark.long
def test_each_criterion_has_a_direction_of_its_own(tiny_networks, tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    generator = load_generator(tiny_networks)
    with Store.open(url) as store:
        plan = launch.plan_campaign(None, request(tiny_networks, questions=("geometry",)), lambda line: None)
        campaign = store.create_campaign(*plan)
        annotator = store.annotator_without_token(LOCAL)
        shapes = dict(store.shapes(campaign))
        for number in range(100):
            assigned = store.assignments(campaign, annotator.id)[0]
            seeds = [shapes[assigned.left].seed, shapes[assigned.right].seed]
            z = latents(seeds, generator.generator.z_dim)
            answer = Answer(
                key=f"key {number}",
                assignment=assigned.token,
                choice=Choice.LEFT if z[0, 0] > z[1, 0] else Choice.RIGHT,
                milliseconds=1000,
                votes={"geometry": "left" if z[0, 1] > z[1, 1] else "right"},
            )
            store.submit(campaign, annotator.id, answer)
    flags = [f"--network={tiny_networks}", f"--labels={url}", *STEER_FLAGS]
    directions = []
    for number, criterion in enumerate(([], ["--criterion=geometry"])):
        out = tmp_path / f"{number}.safetensors"
        run("steer", *flags, *criterion, f"--out={out}")
        directions.append(steering_of(networks.load(out).G_ema).direction)
    # entry 0 of z decides the overall answers, and entry 1 the answers about the geometry
    assert [int(direction.abs().argmax()) for direction in directions] == [0, 1]
    result = CliRunner().invoke(
        main, ["steer", *flags, "--criterion=texture", f"--out={tmp_path / 'x.safetensors'}"]
    )
    rejected(result, "texture", "geometry")

"""Steering by labels: directions of known samples, the test of the labels, the command, and its files."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.generators import load_generator, load_networks, ws_of_seeds
from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards import linear
from eg3d_rlhf.tuning.gan import steering
from eg3d_rlhf.tuning.gan.steering_directions import (
    CANDIDATES,
    Fitter,
    Samples,
    clip_scores,
    half_cosines,
    randomise,
)
from eg3d_rlhf.tuning.gan.steering_page import choose_latents
from eg3d_rlhf.tuning.gan.steering_settings import SteerOptions
from tests import tiny_runs
from tests.rejections import raising, rejected
from tests.test_structure import modules, needs
from training import networks
from training.steering import steering_of

Z = 12
W = 16
COUNT = 400


@pytest.fixture(scope="module")
def samples():
    """Samples whose quality is the coordinate of z along the first axis; w and the features depend on z."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(COUNT, Z))
    z *= np.sqrt(Z) / np.linalg.norm(z, axis=1, keepdims=True)
    # orthonormal columns, so that w determines z
    basis = np.linalg.qr(rng.normal(size=(W, Z)))[0]
    w = z * np.linspace(1.5, 0.8, Z) @ basis.T + 5
    features = np.stack([3 * z[:, 0], z[:, 1], z[:, 2]], axis=1) + 0.2 * rng.normal(size=(COUNT, 3))
    return Samples(seeds=range(COUNT), z=z, w=w, features=features, scores=None)


def make_labels(quality: np.ndarray, count: int, seed: int = 0, noise: float = 0.0) -> list[Preference]:
    """Label disjoint random pairs by their quality with noise."""
    rng = np.random.default_rng(seed)
    noisy = quality + noise * rng.normal(size=len(quality))
    pairs = rng.permutation(len(quality))[: 2 * count].reshape(-1, 2)
    ordered = [(a, b) if noisy[a] > noisy[b] else (b, a) for a, b in pairs]
    return [Preference(winner=int(winner), loser=int(loser)) for winner, loser in ordered]


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_candidates_find_the_direction_of_the_labels(samples, candidate):
    labels = make_labels(samples.z[:, 0], 100)
    fitter = Fitter(samples, candidate)
    vector, mean, std = fitter.to_latent(fitter.fit(*samples.pairs(labels)))
    assert np.linalg.norm(vector) == pytest.approx(1)
    latents = samples.z if CANDIDATES[candidate] == "z" else samples.w
    coordinates = (latents - mean) @ vector / std
    assert np.corrcoef(coordinates, samples.z[:, 0])[0, 1] > 0.9
    assert coordinates.std() == pytest.approx(1, abs=0.15)
    assert abs(coordinates.mean()) < 0.2


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_inverted_labels_give_the_opposite_direction(samples, candidate):
    winners, losers = samples.pairs(make_labels(samples.z[:, 0], 60, noise=1.0))
    fitter = Fitter(samples, candidate)
    # not exactly opposite, because the scores are clipped at different bounds from below and from above
    assert fitter.fit(losers, winners) @ fitter.fit(winners, losers) < -0.8


def test_clipped_scores_against_their_definition():
    scores = np.random.default_rng(5).normal(3, 2, size=(200, 2))
    clipped = clip_scores(scores)
    for column, result in zip(scores.T, clipped.T, strict=True):
        ascending = np.sort((column - column.mean()) / column.std())
        # linear interpolation between order statistics: .55 of the way from the first to the last
        position = 0.55 * 199
        upper = ascending[int(position)] + (position % 1) * np.diff(ascending)[int(position)]
        expected = np.clip((column - column.mean()) / column.std(), -1, upper)
        np.testing.assert_allclose(result, expected - expected.mean(), atol=1e-12)
    assert (clip_scores(np.ones(5)) == 0).all()


def test_differences_among_good_samples_do_not_steer(samples):
    """Scores that differ along a second axis for the better half of the samples alone."""
    is_good = samples.z[:, 0] > 0
    scores = np.where(is_good, 5 + 3 * samples.z[:, 1], 2 * samples.z[:, 0])
    fitter = Fitter(dataclasses.replace(samples, scores=scores), "reward-z")
    direction = fitter.fit(np.array([0]), np.array([1]))
    symmetric = np.linalg.lstsq(samples.z, scores - scores.mean(), rcond=None)[0]
    assert abs(direction[1] / direction[0]) < 0.5 * abs(symmetric[1] / symmetric[0])


def test_direction_in_w_is_the_covariance_times_the_normal(samples):
    """The smallest move in standard deviations that raises a score s . w is along C s."""
    normal = np.random.default_rng(2).normal(size=W)
    scored = dataclasses.replace(samples, scores=samples.w @ normal)
    fitter = Fitter(scored, "reward-w")
    vector, _, _ = fitter.to_latent(fitter.fit(np.array([0]), np.array([1])))
    expected = np.cov(samples.w.T) @ normal
    # the scores are clipped, so the direction is close, but not equal
    assert vector @ expected / np.linalg.norm(expected) > 0.98


def test_regression_against_least_squares(samples):
    """Ridge regression of the scores on z, as augmented least squares."""
    fitter = Fitter(dataclasses.replace(samples, scores=samples.z[:, 3]), "reward-z")
    target = clip_scores(samples.z[:, 3])
    augmented = np.concatenate([samples.z, np.sqrt(10) * np.eye(Z)])
    solution = np.linalg.lstsq(augmented, np.concatenate([target, np.zeros(Z)]), rcond=None)[0]
    found = fitter.fit(np.array([0]), np.array([1]))
    np.testing.assert_allclose(found, solution / np.linalg.norm(solution), atol=1e-8)


def test_many_sets_of_labels_are_fitted_as_single_ones(samples):
    labels = make_labels(samples.z[:, 0], 40)
    winners, losers = samples.pairs(labels)
    signs = np.random.default_rng(3).choice([-1.0, 1.0], size=(40, 5))
    for candidate in CANDIDATES:
        fitter = Fitter(samples, candidate)
        many = fitter.fit_many(winners, losers, signs)
        for i in range(5):
            first = np.where(signs[:, i] > 0, winners, losers)
            second = np.where(signs[:, i] > 0, losers, winners)
            single = fitter.fit_many(first, second, np.ones((40, 1)))[:, 0]
            np.testing.assert_allclose(many[:, i], single, atol=1e-8)


def test_signal_is_found_and_randomised_labels_are_not(samples):
    """Allow at most 4 of 20 sets of randomised labels to pass a test at 5 % (probability below .003)."""
    labels = make_labels(samples.z[:, 0], 50, noise=0.5)
    assert steering.direction_of(samples, labels).is_found
    rng = np.random.default_rng(4)
    found = [steering.direction_of(samples, randomise(labels, rng)).is_found for _ in range(20)]
    assert sum(found) <= 4


def test_repeated_answers_are_no_further_evidence(samples):
    """Four answers of one person to each of a few pairs leave the bound of randomised labels where it was."""
    labels = make_labels(samples.z[:, 0], 20, noise=0.5)
    fitter = Fitter(samples, "reward-z")
    once = half_cosines(fitter, labels)
    repeated = half_cosines(fitter, labels * 4)
    assert repeated.bound == pytest.approx(once.bound, abs=0.2)


def test_candidate_is_replaced_by_a_significantly_better_one_alone():
    correct = np.arange(100) < 70
    # 6 more correct labels of 6 that differ have the probability 2 / 64 by chance, 5 of 5 have 2 / 32
    assert steering.choose_candidate({"a": correct, "b": np.arange(100) < 76}) == "b"
    assert steering.choose_candidate({"a": correct, "b": np.arange(100) < 75}) == "a"
    assert steering.choose_candidate({"a": correct, "b": np.arange(100) < 50}) == "a"
    # the same gain among many labels that differ is no evidence
    assert steering.choose_candidate({"a": correct, "b": np.arange(100) >= 24}) == "a"
    # both gains are significant among 2,000 labels, but the first one is below 3 percentage points
    many = np.arange(2000)
    assert steering.choose_candidate({"a": many < 1500, "b": many < 1559}) == "a"
    assert steering.choose_candidate({"a": many < 1500, "b": many < 1560}) == "b"


def test_space_and_strength_are_those_that_are_asked_for(samples):
    labels = make_labels(samples.z[:, 0], 80, noise=0.5)
    assert set(steering.direction_of(samples, labels).accuracies) == set(CANDIDATES)
    direction = steering.direction_of(samples, labels, "w")
    assert set(direction.accuracies) == {"reward-w"}
    move = direction.to_steering(0.5)
    assert move.space == "w" and move.strength == 0.5


def test_strength_is_the_last_that_helps_and_harms_nobody():
    def entry(strength, heldout, harmed=0.0):
        return {"strength": strength, "heldout": heldout, "harmed": harmed}

    rising = [entry(0.5, 1.0), entry(1.0, 2.0), entry(1.5, 2.5)]
    assert steering.choose_strength(rising, 0.0) == 1.5
    assert steering.choose_strength([*rising, entry(2.0, 2.4), entry(2.5, 9.0)], 0.0) == 1.5
    assert steering.choose_strength([*rising, entry(2.0, 3.0, 0.03)], 0.0) == 1.5
    assert steering.choose_strength(rising, 1.5) == 0.0


def test_harm_counts_good_samples_that_fall():
    before = np.arange(10.0)
    after = before.copy()
    after[9] -= 1  # a good sample, by .35 standard deviations
    after[0] -= 5  # not among the good ones
    assert steering.harmed_share(before, after) == pytest.approx(1 / 5)
    assert steering.harmed_share(before, before) == 0


def test_page_shows_samples_from_all_ranks():
    coordinates = np.random.default_rng(0).normal(size=24)
    chosen = choose_latents(coordinates)
    assert len(set(chosen)) == 8
    assert coordinates[chosen[0]] == coordinates.min() and coordinates[chosen[-1]] == coordinates.max()


def test_no_ground_truth_is_imported():
    """Steering and all that it imports read labels and rewards alone, also inside functions."""
    reached = {
        f"eg3d_rlhf.tuning.gan.{name}" for name in ("steering", "steering_directions", "steering_settings")
    }
    imports = needs()
    front = {"eg3d_rlhf"}  # its names are imported when somebody outside asks for them
    while further := set().union(*(imports[name] for name in reached)) - reached - front:
        reached |= further
    assert "eg3d_rlhf.rewards.linear" in reached
    ground_truth = {
        name
        for name in modules()
        if name.startswith(("training.heads", "eg3d_rlhf.evaluation"))
        or name
        in (
            "eg3d_rlhf.measures.people",
            "eg3d_rlhf.preferences.annotator",
            "eg3d_rlhf.preferences.synthetic",
        )
    }
    assert len(ground_truth) > 5
    assert reached & ground_truth == set()


FLAGS = ("--set=unlabelled=48", "--set=resolution=12", "--set=latents=8", "--device=cpu")


@pytest.fixture(scope="module")
def scores(tiny_networks):
    """Density of tiny samples by their seed, which stands for what people prefer."""
    generator = load_generator(tiny_networks)
    observation = linear.slab_of(generator.generator, 12)
    store = linear.observe_samples(generator, observation, range(120), psi=1.0)
    return store.take(range(120)).flatten(1).mean(dim=1).numpy()


@pytest.fixture(scope="module")
def label_files(tiny_networks, scores, tmp_path_factory):
    """Files of 60 labels by density, and of the same labels randomised."""
    folder = tmp_path_factory.mktemp("labels")
    network_hash = load_generator(tiny_networks).hash
    labels = [dataclasses.replace(label, generator=network_hash) for label in make_labels(scores, 60)]
    files = {"density": labels, "randomised": randomise(labels, np.random.default_rng(0))}
    files["ties"] = [dataclasses.replace(label, tie=True) for label in labels]
    files["few"] = labels[:5]
    files["foreign"] = [dataclasses.replace(label, generator="f" * 64) for label in labels]
    return {name: write_labels(folder / f"{name}.jsonl", content) for name, content in files.items()}


def run_steer(*flags: str):
    return CliRunner().invoke(main, ["steer", *flags])


@pytest.fixture(scope="module")
def steered(tiny_networks, label_files, tmp_path_factory):
    """Steer the tiny generator by the density of its shapes."""
    out = tmp_path_factory.mktemp("steered") / "steered.safetensors"
    result = run_steer(
        f"--network={tiny_networks}", f"--labels={label_files['density']}", f"--out={out}", *FLAGS
    )
    assert result.exit_code == 0, result.output
    return out


def test_steering_raises_the_reward_and_moves_samples_below_the_threshold(steered, tiny_networks):
    report = json.loads(steered.with_suffix(".json").read_text())
    assert report["verdict"] == steering.DIRECTION and report["strength"] == 1
    assert report["labels"] == 60 and report["space"] in ("z", "w")
    assert report["reward_after"] > report["reward_before"]
    assert report["heldout_after"] > report["heldout_before"]
    assert report["control"]["inverted"]["reward_after"] < report["reward_before"]
    assert [entry["strength"] for entry in report["frontier"]] == sorted(
        {0.5, 1.0, 1.5, 2.0, 2.5}  # the latents of the tiny network have the length 2.8
    )
    move = steering_of(load_networks(steered).G_ema)
    assert move is not None and move.strength == 1
    # the page is one file, with the images inside
    page = steered.with_suffix(".html").read_text()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page


def test_steered_network_raises_the_labelled_property(steered, tiny_networks):
    generator = load_generator(steered)
    observation = linear.slab_of(generator.generator, 12)
    densities = [
        linear.observe_samples(load_generator(path), observation, range(500, 540), psi=1.0)
        .take(range(500, 540))
        .flatten(1)
        .mean(dim=1)
        for path in (tiny_networks, steered)
    ]
    assert densities[1].mean() > densities[0].mean()


def test_strength_zero_copies_the_plain_file(steered, tiny_networks, tmp_path):
    out = tmp_path / "plain.safetensors"
    assert run_steer(f"--network={tiny_networks}", "--strength=0", f"--out={out}").exit_code == 0
    assert out.read_bytes() == tiny_networks.read_bytes()
    # and it removes the steering of a steered file
    undone = tmp_path / "undone.safetensors"
    assert run_steer(f"--network={steered}", "--strength=0", f"--out={undone}").exit_code == 0
    assert undone.read_bytes() == tiny_networks.read_bytes()


def test_randomised_labels_write_the_report_alone(label_files, tiny_networks, tmp_path):
    out = tmp_path / "none.safetensors"
    flags = [f"--network={tiny_networks}", f"--labels={label_files['randomised']}", f"--out={out}", *FLAGS]
    result = run_steer(*flags)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["none.json"]
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["verdict"] == steering.NO_DIRECTION and report["strength"] is None


@pytest.mark.parametrize(
    ("labels", "flags", "names"),
    [
        ("ties", [], ("60", "labels")),
        ("few", [], ("5", "10")),
        ("foreign", [], ("ffffffffffff", "--network")),
        ("density", ["--strength=auto"], ("--strength=auto", "200", "60")),
        ("density", ["--strength=3"], ("--strength", "2.83")),
        ("density", ["--strength=strong"], ("--strength", "strong")),
        ("density", ["--strength=-1"], ("--strength", "-1")),
        ("density", ["--set=layers=2"], ("layers=2", "--space=w")),
    ],
)
def test_wrong_inputs_are_rejected_in_one_line(labels, flags, names, label_files, tiny_networks, tmp_path):
    out = tmp_path / "out.safetensors"
    rejected(
        run_steer(
            f"--network={tiny_networks}", f"--labels={label_files[labels]}", f"--out={out}", *FLAGS, *flags
        ),
        *names,
    )
    assert list(tmp_path.iterdir()) == []


def test_flow_folders_steered_networks_and_other_endings_are_rejected(
    steered, label_files, tiny_networks, tmp_path
):
    labels = f"--labels={label_files['density']}"
    (tmp_path / "work.json").write_text("{}")
    rejected(run_steer(f"--network={tmp_path}", labels, "--out=x.safetensors"), "--network", str(tmp_path))
    rejected(run_steer(f"--network={steered}", labels, "--out=x.safetensors"), str(steered), "--strength=0")
    rejected(run_steer(f"--network={tiny_networks}", labels, "--out=x.pkl"), "--out", "x.pkl")
    rejected(run_steer(f"--network={tiny_networks}", "--out=x.safetensors"), "--labels")


def test_plain_formats_reject_a_steered_network(steered, tiny_networks, tmp_path):
    out = tmp_path / "network.pt"
    result = CliRunner().invoke(main, ["generator", "convert", str(steered), f"--out={out}"])
    rejected(result, "--out", "network.pt", "--drop-steering")
    assert not out.exists()
    result = CliRunner().invoke(
        main, ["generator", "convert", str(steered), f"--out={out}", "--drop-steering"]
    )
    assert result.exit_code == 0, result.output
    assert load_generator(out).hash == load_generator(tiny_networks).hash
    result = CliRunner().invoke(
        main, ["generator", "convert", str(tiny_networks), f"--out={out}", "--overwrite", "--drop-steering"]
    )
    rejected(result, "--drop-steering", str(tiny_networks))


def test_conversions_of_this_project_keep_the_steering(steered, tmp_path):
    for name, flags in (("copy", []), ("grid", ["--tri-grid=1.5"])):
        out = tmp_path / f"{name}.safetensors"
        result = CliRunner().invoke(main, ["generator", "convert", str(steered), f"--out={out}", *flags])
        assert result.exit_code == 0, result.output
        assert torch.equal(
            ws_of_seeds(load_networks(out).G_ema, range(5)),
            ws_of_seeds(load_networks(steered).G_ema, range(5)),
        )


def test_inspect_states_the_steering(steered, tiny_networks):
    descriptions = [
        json.loads(CliRunner().invoke(main, ["generator", "inspect", "--json", str(path)]).stdout)
        for path in (steered, tiny_networks)
    ]
    assert descriptions[0]["steering"]["strength"] == 1
    assert descriptions[1]["steering"] == "none"


@pytest.mark.long
def test_training_keeps_the_steering(steered, tmp_path):
    """Tuning starts from the steered network, and its snapshots are steered alike."""
    tiny_runs.write_dataset(tmp_path / "data.zip")
    run = tiny_runs.whole_run(tmp_path / "data.zip", steered, tmp_path / "runs", "--lambda-r=0")
    snapshot = max(run.glob("network-snapshot-*.safetensors"))
    before = load_networks(steered)
    after = load_networks(snapshot)
    assert steering_of(after.G).describe() == steering_of(before.G).describe()
    for name in ("direction", "mean", "std"):
        for network in (after.G, after.G_ema):
            assert torch.equal(getattr(steering_of(network), name), getattr(steering_of(before.G), name))
    assert networks.state_hash(after.G_ema) != networks.state_hash(before.G_ema)


def test_options_reject_wrong_values():
    for values, name in (({"strength": "nan"}, "--strength"), ({"space": "v"}, "space")):
        with raising(name):
            SteerOptions(**values)
    assert SteerOptions(strength="auto").threshold is None


def test_copied_file_is_the_same_generator(steered, tmp_path):
    """The steering is a part of the hash with which labels name their generator."""
    shutil.copyfile(steered, tmp_path / "copy.safetensors")
    assert load_generator(tmp_path / "copy.safetensors").hash == load_generator(steered).hash

"""Reward training end to end on toy slabs whose blob volume decides the preference, and the command line around it."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes.reward_training import train as main
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.evaluation import calibration_error, evaluate, fit_temperature, log_loss, margins
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.train import TrainData, TrainOptions, default_options, train_reward, with_changes
from training import networks
from training.triplane import TriPlaneGenerator

SHAPE = (12, 14, 12)


def radius(seed):
    return np.random.RandomState(seed).uniform(0.15, 0.4)


def blobs(seeds):
    """One soft ball per seed, at a place and of a radius that the seed decides, in noise: [N, 1, D, H, W] in [0, 100]."""
    z, y, x = np.meshgrid(*[np.linspace(0, 1, n) for n in SHAPE], indexing="ij")
    volumes = []
    for seed in seeds:
        rng = np.random.RandomState(seed)
        r, (cz, cy, cx) = rng.uniform(0.15, 0.4), rng.uniform(0.4, 0.6, 3)
        v = 1 / (1 + np.exp((np.sqrt((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) - r) * 20)) + 0.05 * rng.randn(*SHAPE)
        volumes.append((v - v.min()) / np.ptp(v) * 100)
    return torch.tensor(np.stack(volumes)[:, None], dtype=torch.float32)


def toy_labels(count, start=0, noise=0.0):
    labels, rng = [], np.random.RandomState(start + 1)
    for a in range(start, start + 2 * count, 2):
        best, worst = sorted((a, a + 1), key=radius, reverse=True)
        winner, loser = (worst, best) if rng.rand() < noise else (best, worst)
        labels.append(Preference(winner=winner, loser=loser, clean=best))
    return labels


def filled(*parts):
    store = ObservationCache(blobs)
    store.fill(s for labels in parts for label in labels for s in (label.winner, label.loser))
    return store


OPTIONS = TrainOptions(preset="tiny", epochs=6, lr=4e-3, batch=8)


def test_learns_which_blob_is_larger_in_seconds():
    train, val, test = toy_labels(160, noise=0.05), toy_labels(40, 1000), toy_labels(100, 2000, noise=0.1)
    store = filled(train, val, test)
    state = train_reward(TrainData(train=train, val=val, store=store), OPTIONS)
    report = evaluate(state.model, store, test)
    assert report["clean"]["accuracy"] > 0.9, report
    low, high = report["clean"]["interval_95"]
    assert low < report["clean"]["accuracy"] < high
    assert report["labels"]["accuracy"] == pytest.approx(report["clean"]["accuracy"] - report["label_noise"], abs=0.08)
    assert state.history[state.best_epoch]["val_accuracy"] == max(r["val_accuracy"] for r in state.history)
    swapped = [Preference(winner=p.loser, loser=p.winner) for p in test]
    scores = {s: float(state.model.score(store.take([s]))) for p in test for s in (p.winner, p.loser)}
    np.testing.assert_array_equal(margins(scores, test), -margins(scores, swapped))


@pytest.mark.parametrize("anchors", [0, 6])
def test_resume_and_repetition_equal_the_straight_run(tmp_path, anchors):
    train, val = toy_labels(20), toy_labels(8, 100)
    store = filled(train, val)
    seeds = tuple(range(500, 500 + anchors))
    anchor_store = filled(toy_labels(anchors // 2, 500)) if anchors else None
    data = TrainData(train=train, val=val, store=store, anchors=seeds, anchor_store=anchor_store)
    options = with_changes(OPTIONS, epochs=5, patience=5, anchors=anchors, reconstruction=0.01)
    straight = train_reward(data, options)

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 2:
            raise Stop

    path = tmp_path / "state.pt"
    with pytest.raises(Stop):
        train_reward(data, options, state_file=path, on_epoch=stop)
    resumed = train_reward(data, options, state_file=path)
    drop = [[{k: v for k, v in r.items() if k != "seconds"} for r in s.history] for s in (straight, resumed)]
    assert drop[0] == drop[1] and len(drop[0]) == 5
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    other = train_reward(data, with_changes(options, seed=1))
    assert not torch.equal(other.model.MLP.input_layer.weight, straight.model.MLP.input_layer.weight)
    with pytest.raises(ValueError, match="other lr"):
        train_reward(data, with_changes(options, lr=1e-4), state_file=path)
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match="expected a training state"):
        train_reward(data, options, state_file=path)


def test_training_leaves_the_global_generator_alone():
    train, val = toy_labels(8), toy_labels(4, 100)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train_reward(TrainData(train=train, val=val, store=filled(train, val)), with_changes(OPTIONS, epochs=1))
    assert torch.equal(before, torch.get_rng_state())


def test_paper_preset_has_the_papers_settings():
    o = default_options("paper")
    assert (o.lr, o.weight_decay, o.batch, o.epochs, o.anchors, o.mirror) == (1e-5, 1e-4, 1, 10, 1000, False)
    w = o.weights
    assert (w.pairs, w.scalar, w.bradley_terry, w.strength, w.reconstruction, w.drawn_from_epoch) == (1, 1e-3, 1e-3, 1e-8, 1e-2, 3)
    with pytest.raises(ValueError, match="expected one of heads, paper, small"):
        default_options("huge")


def test_calibration_error_and_temperature_recover_known_odds():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 40_000)
    margin = np.where(rng.random(logit.size) < 1 / (1 + np.exp(-logit)), logit, -logit)  # sign follows its own odds
    assert calibration_error(margin) < 0.01
    assert calibration_error(margin * 4) > 0.08
    assert fit_temperature(margin * 4) == pytest.approx(4, rel=0.1)
    assert calibration_error(np.array([50.0, 50.0])) == pytest.approx(0, abs=1e-9)
    assert log_loss(np.zeros(3)) == pytest.approx(math.log(2))


def test_store_draws_each_seed_once_and_survives_in_a_file(tmp_path):
    drawn = []

    def source(seeds):
        drawn.extend(seeds)
        return blobs(seeds)

    path = tmp_path / "slabs.safetensors"
    store = ObservationCache(source, path)
    assert store.fill([1, 2, 3, 2], batch=2) == 3 and store.fill([3, 4]) == 1
    store.save()
    again = ObservationCache(source, path)
    assert again.fill([4, 3, 2, 1]) == 0 and drawn == [1, 2, 3, 4]
    torch.testing.assert_close(again.take([4, 1]), blobs([4, 1]), rtol=1e-3, atol=1e-3)
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match="Delete the file"):
        ObservationCache(source, path)


def test_a_place_in_a_batch_does_not_tell_winners_from_losers():
    """Labels name the winner first. What depends on the place in a batch, such as a ray's jitter, must not say so."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(512).reshape(256, 2)  # winner, loser: of equal worth
    store = ObservationCache(lambda seeds: torch.arange(len(seeds), dtype=torch.float32).reshape(-1, 1, 1, 1) % 2)
    store.fill(pairs.flatten().tolist(), batch=16)
    won, lost = (store.take(pairs[:, side].tolist()).flatten() for side in (0, 1))
    assert abs(won.mean() - lost.mean()) < 0.2
    backwards = ObservationCache(lambda seeds: torch.arange(len(seeds), dtype=torch.float32).reshape(-1, 1, 1, 1) % 2)
    backwards.fill(pairs[:, ::-1].flatten().tolist(), batch=16)
    assert torch.equal(backwards.take(range(512)), store.take(range(512)))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A tiny untrained generator as a network file, with its hash."""
    torch.manual_seed(0)
    rendering = {
        "superresolution_module": "training.superresolution.SuperresolutionHybrid2X", "sr_antialias": True, "box_warp": 1.0,
        "c_gen_conditioning_zero": False, "c_scale": 1, "superresolution_noise_mode": "none", "density_noise": 0,
    }  # fmt: skip
    kwargs = dict(
        z_dim=16, c_dim=25, w_dim=32, img_resolution=128, img_channels=3, rendering_kwargs=rendering, mapping_kwargs={"num_layers": 2},
        plane_resolution=16, plane_channels=8, channel_base=256, channel_max=16, decoder_hidden_dim=16,
        sr_kwargs={"channel_base": 1024, "channel_max": 16, "fused_modconv_default": "inference_only"},
    )  # fmt: skip
    G = TriPlaneGenerator(**kwargs).eval()
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    networks.save(path, networks.Networks(None, None, G, kwargs, None, {}), only_ema=True)
    return path, networks.state_hash(G)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_command_trains_and_writes_everything(network, tmp_path):
    path, generator = network
    pairs = [Preference(winner=2 * i, loser=2 * i + 1, generator=generator, psi=0.7) for i in range(24)]
    labels = write_labels(tmp_path / "labels.jsonl", pairs)
    run = ["--network", path, "--labels", labels, "--out", tmp_path / "run", "--preset", "tiny", "--epochs", 2, "--resolution", 32]
    result = invoke(*run, "--anchors", 10, "--cache", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert "test pairs ordered as labelled" in result.output and "95 % interval" in result.output
    assert "Warning: too few labels: " in result.stderr and "some 360 labels are wanted" in result.stderr
    assert "too few labels" in result.stdout.splitlines()[-2] and "figures above" in result.stdout
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "reward.safetensors", "reward.json", "report.json", "curves.json", "curves.png", "stats.jsonl", "training_options.json", "state.pt",
    }  # fmt: skip
    reward = load_reward(tmp_path / "run" / "reward.safetensors")
    known = reward.provenance
    assert reward.observation.spec.resolution == 32
    assert (known["psi"], known["generator"], known["architecture"]) == (0.7, generator, "eg3d")
    assert reward.score_observed(torch.rand(1, *reward.observation.shape) * 100).shape == (1,)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert sum(report["splits"].values()) == 24 and report["splits"]["train"] in (16, 17)
    assert report["test"]["labels"]["n"] == report["splits"]["test"]
    assert len((tmp_path / "run" / "stats.jsonl").read_text().splitlines()) == 2
    again = invoke(*run, "--anchors", 10)
    assert again.exit_code == 2 and "--resume" in again.output
    assert invoke(*run, "--anchors", 10, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("label", "extra", "words"),
    [
        (Preference(winner=1, loser=2, generator="f" * 64), [], "--any-generator"),
        (Preference(winner=1, loser=2, psi=0.7), ["--psi", 1.0], "Leave it out"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_two(network, tmp_path, label, extra, words):
    common = {"generator": label.generator, "psi": label.psi}
    labels = write_labels(tmp_path / "labels.csv", [Preference(winner=2 * i, loser=2 * i + 1, **common) for i in range(20)])
    result = invoke("--network", network[0], "--labels", labels, "--out", tmp_path / "run", *extra)
    assert result.exit_code == 2 and words in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1 and "Traceback" not in result.output


def test_missing_labels_are_reported(tmp_path):
    result = invoke("--labels", tmp_path / "none.jsonl", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "expected a label file" in result.output


def test_dry_run_prints_the_resolved_settings_and_writes_nothing(tmp_path):
    result = invoke("--dry-run", "--preset", "paper", "--lr", "0.5", "--scalar", "2", "--out", tmp_path / "run")
    settings = json.loads(result.stdout)
    assert settings["train"]["lr"] == 0.5 and settings["train"]["weights"]["scalar"] == 2 and settings["resolution"] == 256
    assert settings["train"]["anchors"] == 1000 and not (tmp_path / "run").exists()


def test_flags_of_the_command_are_frozen():
    assert sorted(name for p in main.params for name in (*p.opts, *p.secondary_opts)) == sorted(
        "--network --labels --observation --resolution --crop --psi --cutoff "
        "--campaign --annotator --least-gold-accuracy --drop-repeats --min-milliseconds --since --question "
        "--any-generator --more-network --points --fractions --split-seed --preset --members --aggregate --strength "
        "--bootstrap --no-bootstrap --shared-start --epochs --patience --batch --lr "
        "--cosine --no-cosine --weight-decay --anchors --mirror --no-mirror --pairs --scalar --bradley-terry --reconstruction "
        "--unpaired --unpaired-batch --regression --divergence --out --backbone --wrong-faces "
        "--cache --slab-batch --resume --device --timeout --seed --dry-run".split()
    )

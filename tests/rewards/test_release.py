"""The released reward: weights and configuration of the published layout, both lattices, and files that are
not what they claim.
"""

import os

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes import reward_files
from eg3d_rlhf.rewards.cache import observe_seeds
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.release import (
    EXAMPLE_ARCH,
    ReleaseConfig,
    compare_lattices,
    import_release,
    read_config,
    resolve,
    write_example,
)
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.slab_network import PAPER, RewardModel
from tests.compat.test_reward import recipe_slab, recipe_state
from tests.tools.examples import run_example

PUBLISHED = """\
run_id: 7wnzkgie
trainer: {devices: 1, callbacks: [{_target_: some.module.Callback}]}
data:
  batch_size: 1
  root: /data/somewhere
  dset_dict:
    selected_dtypes: [sigma_field_256]
  augmentations:
    upper_norm: 100
    tune: {_target_: transforms.normalise_sigma_self, lower: 0, upper: "${data.augmentations.upper_norm}"}
model:
  _target_: networks.Conv3DNetworkEnsemble
  external: null
  Conv3DModule: {in_channels: 1, out_channels: 8, f_maps: [8, 16, 32, 64, 128, 256],
                 num_groups: 8, layer_order: gcr, dropout_prob: 0.1}
  mlp_global: {input_size: "${multiply:8, 1024}", residual: true}
optimizer: {lr: 1e-5}
"""


def release(folder, state, text=PUBLISHED, name="release_config.yaml"):
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "best_model.pt")
    (folder / name).write_text(text)
    return folder


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def tune(text):
    """A configuration whose transform is `text`."""
    return (
        "data:\n  dset_dict: {selected_dtypes: [sigma_field_64]}\n  augmentations:\n    upper_norm: 50\n   "
        " tune: " + text
    )


@pytest.mark.long
def test_published_release_scores_as_the_fixtures_after_conversion(fixtures_dir, tmp_path):
    state = recipe_state(RewardModel(PAPER))
    released = import_release(release(tmp_path / "release", {"state_dict": state}, name="run_config.yaml"))
    assert released.network.arch == PAPER and released.observation.spec == SlabSpec()
    reward = load_reward(released.save(tmp_path / "out.safetensors"))
    known = reward.provenance
    assert reward.observation == SigmaSlab() and known["preset"] == "paper"
    assert len(known["weights_sha256"]) == len(known["config_sha256"]) == 64
    assert all(torch.equal(value, state[name]) for name, value in reward.network.state_dict().items())
    with np.load(fixtures_dir / "reward" / "full_fwd.npz") as d, torch.no_grad():
        assert float(reward.score_observed(recipe_slab(129, 141, 128, 2024))) == pytest.approx(
            d["a_scalar"].item(), rel=2e-5
        )


def test_reduced_network_is_rebuilt_from_its_shapes(fixtures_dir, tmp_path):
    with np.load(fixtures_dir / "reward" / "red_state.npz") as stored:
        state = {k: torch.from_numpy(stored[k]) for k in stored.files}
    text = (
        "data: {dset_dict: {selected_dtypes: [sigma_field_64]}, augmentations: {upper_norm: 100}}\nmodel: {}"
    )
    released = import_release(release(tmp_path / "r", state, text))
    assert released.network.arch == EXAMPLE_ARCH and released.observation.spec == SlabSpec(resolution=64)
    with np.load(fixtures_dir / "reward" / "red_odd.npz") as d, torch.no_grad():
        for item in "ab":
            score = released.score_observed(torch.from_numpy(d[f"slab_{item}"])[None, None])
            assert float(score) == pytest.approx(d[f"{item}_scalar"].item(), rel=2e-5)


def test_configuration_is_read_from_its_known_fields(tmp_path):
    expected = ReleaseConfig(
        resolution=256, value_max=100.0, groups=8, feature_maps=PAPER.feature_maps, input_size=8192
    )
    assert read_config(config(tmp_path, PUBLISHED)) == expected
    assert read_config(config(tmp_path, tune("null"))) == ReleaseConfig(resolution=64, value_max=50.0)
    forms = [
        "{_target_: a.NormalizeSigmaSelf, upper: 1e2}",
        "[{_target_: a.normalise_sigma_self, hi: 100, lo: 0.0, keys: [sigma]}]",
        (
            "{_target_: monai.Compose, transforms: [{_target_: normalise_self, upper:"
            " '${multiply:${data.augmentations.upper_norm},2}'}]}"
        ),
        "{scale: {_target_: normalise_self, _partial_: true, upper_norm: 100}}",
    ]
    for form in forms:
        assert read_config(config(tmp_path, tune(form))).value_max == 100.0, form
    published = read_config(
        config(tmp_path, tune("{_target_: a.clip}") + "\nmodel: {num_groups: 4}"), "published"
    )
    assert published == ReleaseConfig(resolution=256, value_max=100.0, groups=4)


CONFIG_ERRORS = {
    "depth maps": (
        PUBLISHED.replace("sigma_field_256", "depth_map"),
        "selected_dtypes: .*--transform=published",
    ),
    "external": (PUBLISHED.replace("external: null", "external: {name: resnet}"), "model.external"),
    "no range": ("data: {dset_dict: {selected_dtypes: [sigma_field_64]}}", "upper_norm"),
    "clip": (tune("{_target_: a.clip_sigma, max: 3}"), "tune: .*clip_sigma.*Pass"),
    "two": (
        tune("[{_target_: normalise_self}, {_target_: normalise_self}]"),
        "expected one self-normalisation",
    ),
    "doubling": (
        tune("['${b}', '${b}']\nb: ['${data.augmentations.tune}', '${data.augmentations.tune}']"),
        "references that end",
    ),
    "segmentation": (PUBLISHED.replace("in_channels: 1,", "is_segmentation: true,"), "is_segmentation"),
    "setting": (tune("{_target_: normalise_self, upper: 3, power: 2}"), "power"),
    "lower": (tune("{_target_: normalise_self, lower: -1, upper: 3}"), "starts at 0"),
    "text": (tune("{_target_: normalise_self, upper: wide}"), "expected a number"),
    "huge": (tune("{_target_: normalise_self, upper: .inf}"), "expected a number"),
    "order": (PUBLISHED.replace("gcr", "crg"), "layer_order"),
    "dangling": (tune("{_target_: normalise_self, upper: '${data.nothing}'}"), "data.nothing"),
    "resolver": (tune("{_target_: normalise_self, upper: '${oc.env:HOME}'}"), r"got \$\{oc.env:HOME\}"),
    "circle": (tune("'${data.augmentations.tune}'"), "circle"),
    "growing": (tune("'x${data.augmentations.tune}${data.augmentations.tune}'"), "references that end"),
    "python tag": ("data: !!python/object/apply:os.system ['echo ran > ran']", "without tags"),
    "alias": ("a: &a [1]\nb: *a", "it uses aliases"),
    "not YAML": ("a: [1", "expected plain YAML"),
    "deep": ("[" * 200_000, "deeper than 64"),
    "a list": ("- 1", "mapping at the top"),
    "large": ("#" * 300_000, "at most 256 KiB"),
    "digits": (PUBLISHED.replace("upper_norm: 100", "upper_norm: " + "9" * 5000), "expected"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_configurations_that_are_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = CONFIG_ERRORS[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_config(config(tmp_path, text))
    assert "config.yaml" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_references_inside_text_and_unfinished_ones():
    root = {"n": 256, "deep": [{"name": "sigma"}]}
    assert resolve(root, "${deep.0.name}_field_${n}", "x") == "sigma_field_256"
    assert resolve(root, "${multiply:${n},2,0.5}", "x") == 256
    assert resolve(root, ["${n}"], "x") == ["${n}"]
    for bad in ("${n", "${deep}_x", "${multiply:n,2}"):
        with pytest.raises(ValueError, match="x: .*expected"):
            resolve(root, bad, "x")


@pytest.mark.parametrize(
    ("change", "text", "words"),
    [
        (
            lambda s: {
                k.replace("upsample.conv_transposed.weight", "upsample.weight"): v for k, v in s.items()
            },
            {},
            "1.8.1 or older",
        ),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("MLP.")}, {}, "missing: "),
        (lambda s: {**s, "more": torch.zeros(1)}, {}, "unexpected: more"),
        (dict, {"[4, 8, 16]": "[8, 16]"}, "f_maps"),
        (dict, {"256": "128"}, "input_size = 128"),
        (dict, {"field_32": "field_5"}, "at least 4 points"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, text, words):
    folder = write_example(tmp_path / "r")
    torch.save(change(torch.load(folder / "best_model.pt", weights_only=True)), folder / "best_model.pt")
    config = folder / "release_config.yaml"
    for old, new in text.items():
        config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        import_release(folder)


class Hostile:
    """Unpickles to a call of os.system."""

    def __reduce__(self):
        return os.system, ("echo ran > ran",)


def test_hostile_and_damaged_weights_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_example(tmp_path / "r")
    whole = (folder / "best_model.pt").read_bytes()
    torch.save({"MLP.input_layer.weight": Hostile()}, folder / "best_model.pt")
    with pytest.raises(ValueError, match="to hold weights alone") as caught:
        import_release(folder)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
    (folder / "best_model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="Truncated or foreign"):
        import_release(folder)
    (folder / "best_model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="expected a local file or folder, got none"):
        import_release(folder)


def test_either_configuration_is_found_and_two_must_agree(tmp_path):
    folder = write_example(tmp_path / "r")
    text = (folder / "release_config.yaml").read_text()
    (folder / "run_config.yaml").write_text(text + "seed: 3\n")
    assert import_release(folder / "best_model.pt").provenance["config"] == "release_config.yaml"
    (folder / "run_config.yaml").write_text(text.replace("upper_norm: 100", "upper_norm: 1"))
    with pytest.raises(ValueError, match="two that disagree .* Remove"):
        import_release(folder)
    (folder / "release_config.yaml").unlink()
    assert import_release(folder).observation.spec.value_max == 1
    (folder / "run_config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="expected release_config.yaml or run_config.yaml in"):
        import_release(folder)


def test_both_lattices_are_scored_as_their_slabs_are(tiny_networks, tmp_path):
    released = import_release(write_example(tmp_path / "r"))
    generator = load_generator(tiny_networks).generator
    results = list(compare_lattices(released, generator, [4, 7], psi=0.7))
    for place, lattice in enumerate(("straight", "skewed"), 1):
        slabs = observe_seeds(generator, SigmaSlab(SlabSpec(resolution=32, lattice=lattice)), psi=0.7)([4, 7])
        with torch.no_grad():
            expected = released.score_observed(slabs)
        torch.testing.assert_close(torch.tensor([r[place] for r in results]), expected, rtol=1e-4, atol=1e-5)
    assert [r[0] for r in results] == [4, 7] and results[0][1] != results[0][2]


def run(*flags):
    return CliRunner().invoke(reward_files.release, [str(f) for f in flags])


def test_tool_writes_the_reward_and_prints_both_scores(tiny_networks, tmp_path):
    out = tmp_path / "out" / "r.safetensors"
    result = run(
        write_example(tmp_path / "r"),
        f"--out={out}",
        f"--network={tiny_networks}",
        "--seeds=1,3-4",
        "--lattice=skewed",
    )
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert rows[0] == ["seed", "straight", "skewed", "difference"] and [row[0] for row in rows[1:]] == [
        "1",
        "3",
        "4",
        "mean",
    ]
    for row in rows[1:]:
        straight, skewed, difference = map(float, row[1:])
        assert difference == pytest.approx(straight - skewed, abs=2e-6)
    reward = load_reward(out)
    assert reward.observation.spec == SlabSpec(resolution=32, lattice="skewed")
    slabs = observe_seeds(load_generator(tiny_networks).G, reward.observation)([1])
    assert float(reward.score_observed(slabs)) == pytest.approx(float(rows[1][2]), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["synthetic:reward", "--latents=5-2"], "--latents"),
        (["{tmp}/none"], "SOURCE"),
        (["synthetic:reward", "--out={tmp}/r.pt"], "--out"),
        (["synthetic:reward", "--network={tmp}/none.safetensors"], "--network"),
    ],
)
def test_mistakes_end_in_one_line(flags, names, tmp_path):
    result = run(f"--out={tmp_path / 'r.safetensors'}", *(f.format(tmp=tmp_path) for f in flags))
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(f"Error: {names}: "), (
        result.stderr
    )


@pytest.mark.long
def test_example_of_the_help_runs(tmp_path):
    printed = run_example(reward_files.release, tmp_path)
    assert load_reward(tmp_path / "runs/example/imported.safetensors").observation.spec == SlabSpec(
        resolution=32
    )
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["seed", "0", "1", "mean"]

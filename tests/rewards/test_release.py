"""The released reward: weights and configuration of the published layout, both lattices, and files that are
not what they claim.
"""

import os

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
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import PAPER
from tests.compat.absent import some
from tests.compat.reference import arrays, of_set
from tests.compat.test_reward import RECIPE, REDUCED_FILES, arch_of, full_slabs, recipe_state, slabs_of
from tests.rejections import raising, rejected
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
    """Return a configuration whose transform is `text`."""
    return (
        "data:\n  dset_dict: {selected_dtypes: [sigma_field_64]}\n  augmentations:\n    upper_norm: 50\n   "
        " tune: " + text
    )


@pytest.mark.long
def test_published_release_scores_as_the_fixtures_after_conversion(fixtures_dir, tmp_path):
    (scalar,) = of_set(arrays(fixtures_dir / "reward" / "full_fwd.npz"), "a_scalar")
    state_dict = recipe_state(RewardModel(PAPER))
    released = import_release(
        release(tmp_path / "release", {"state_dict": state_dict}, name="run_config.yaml")
    )
    assert released.network.arch == PAPER and released.observation.spec == SlabSpec()
    reward = load_reward(released.save(tmp_path / "out.safetensors"))
    known = reward.provenance
    assert reward.observation == SigmaSlab() and known["preset"] == "paper"
    assert len(known["weights_sha256"]) == len(known["config_sha256"]) == 64
    assert all(torch.equal(value, state_dict[name]) for name, value in reward.network.state_dict().items())
    with torch.no_grad():
        assert float(reward.score_observed(full_slabs()["a"])) == pytest.approx(scalar.item(), rel=2e-5)


@pytest.mark.parametrize("file", some(REDUCED_FILES, "this set has no reward/red_*.npz beside red_state.npz"))
def test_reduced_network_is_rebuilt_from_its_shapes(file, fixtures_dir, tmp_path):
    with arrays(fixtures_dir / "reward" / "red_state.npz") as stored:
        state_dict = {k: torch.from_numpy(stored[k]) for k in stored.files}
    config_text = (
        "data: {dset_dict: {selected_dtypes: [sigma_field_64]}, augmentations: {upper_norm: 100}}\n"
        f"model: {{Conv3DModule: {{num_groups: {RECIPE['groups']}}}}}"
    )
    released = import_release(release(tmp_path / "r", state_dict, config_text))
    example = RewardModel(EXAMPLE_ARCH).state_dict()
    assert arch_of(example, {"groups": EXAMPLE_ARCH.groups}) == EXAMPLE_ARCH
    assert released.network.arch == arch_of(state_dict) and released.observation.spec == SlabSpec(
        resolution=64
    )
    with arrays(fixtures_dir / "reward" / f"{file}.npz") as d, torch.no_grad():
        for item, slab in slabs_of(d).items():
            (scalar,) = of_set(d, f"{item}_scalar")
            assert float(released.score_observed(slab)) == pytest.approx(scalar.item(), rel=2e-5)


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
        ("selected_dtypes", "'depth_map'", "--transform=published"),
    ),
    "external": (PUBLISHED.replace("external: null", "external: {name: resnet}"), ("model.external",)),
    "no range": (
        "data: {dset_dict: {selected_dtypes: [sigma_field_64]}}",
        ("upper_norm", "--transform=published"),
    ),
    "clip": (
        tune("{_target_: a.clip_sigma, max: 3}"),
        ("data.augmentations.tune", "clip_sigma'", "--transform=published"),
    ),
    "two": (
        tune("[{_target_: normalise_self}, {_target_: normalise_self}]"),
        ("data.augmentations.tune", "2", "--transform=published"),
    ),
    "doubling": (
        tune("['${b}', '${b}']\nb: ['${data.augmentations.tune}', '${data.augmentations.tune}']"),
        ("data.augmentations.tune", "64", "--transform=published"),
    ),
    "segmentation": (
        PUBLISHED.replace("in_channels: 1,", "is_segmentation: true,"),
        ("is_segmentation", "True"),
    ),
    "setting": (
        tune("{_target_: normalise_self, upper: 3, power: 2}"),
        ("data.augmentations.tune", "'power'"),
    ),
    "lower": (tune("{_target_: normalise_self, lower: -1, upper: 3}"), ("data.augmentations.tune", "-1")),
    "text": (tune("{_target_: normalise_self, upper: wide}"), ("upper", "'wide'")),
    "huge": (tune("{_target_: normalise_self, upper: .inf}"), ("upper", "inf")),
    "order": (PUBLISHED.replace("gcr", "crg"), ("layer_order", "'crg'")),
    "dangling": (tune("{_target_: normalise_self, upper: '${data.nothing}'}"), ("${data.nothing}",)),
    "resolver": (tune("{_target_: normalise_self, upper: '${oc.env:HOME}'}"), ("${oc.env:HOME}",)),
    "circle": (tune("'${data.augmentations.tune}'"), ("circle",)),
    "growing": (tune("'x${data.augmentations.tune}${data.augmentations.tune}'"), ("circle",)),
    "python tag": (
        "data: !!python/object/apply:os.system ['echo ran > ran']",
        ("YAML", "tag:yaml.org,2002:python/object/apply:os.system"),
    ),
    "alias": ("a: &a [1]\nb: *a", ("YAML", "*name")),
    "not YAML": ("a: [1", ("YAML", "line 1, column")),
    "deep": ("[" * 200_000, ("YAML", "64")),
    "a list": ("- 1", ("mapping", "list")),
    "large": ("#" * 300_000, ("256", "292")),
    "digits": (PUBLISHED.replace("upper_norm: 100", "upper_norm: " + "9" * 5000), ("4300",)),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_unsupported_configurations_are_rejected(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = CONFIG_ERRORS[case]
    with raising("config.yaml", *names):
        read_config(config(tmp_path, text))
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_references_inside_text_and_unfinished_ones():
    root = {"n": 256, "deep": [{"name": "sigma"}]}
    assert resolve(root, "${deep.0.name}_field_${n}", "x") == "sigma_field_256"
    assert resolve(root, "${multiply:${n},2,0.5}", "x") == 256
    assert resolve(root, ["${n}"], "x") == ["${n}"]
    for bad in ("${n", "${deep}_x", "${multiply:n,2}"):
        with raising("x:", bad.split(":")[0]):
            resolve(root, bad, "x")


@pytest.mark.parametrize(
    ("change", "text", "names"),
    [
        (
            lambda s: {
                k.replace("upsample.conv_transposed.weight", "upsample.weight"): v for k, v in s.items()
            },
            {},
            ("1.8.1",),
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("MLP.")},
            {},
            ("best_model.pt", "missing: "),
        ),
        (lambda s: {**s, "more": torch.zeros(1)}, {}, ("unexpected: more",)),
        (dict, {"[4, 8, 16]": "[8, 16]"}, ("f_maps = (8, 16)", "(4, 8, 16)")),
        (dict, {"256": "128"}, ("input_size = 128", "256")),
        (dict, {"field_32": "field_5"}, (" 4 ", "[3, 3, 3]", "release_config.yaml")),
    ],
)
def test_weights_that_do_not_fit_are_rejected(tmp_path, change, text, names):
    folder = write_example(tmp_path / "r")
    torch.save(change(torch.load(folder / "best_model.pt", weights_only=True)), folder / "best_model.pt")
    config = folder / "release_config.yaml"
    for old, new in text.items():
        config.write_text(config.read_text().replace(old, new))
    with raising(*names):
        import_release(folder)


class Hostile:
    """Object that calls os.system when it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo ran > ran",)


def test_hostile_and_damaged_weights_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_example(tmp_path / "r")
    weight_bytes = (folder / "best_model.pt").read_bytes()
    torch.save({"MLP.input_layer.weight": Hostile()}, folder / "best_model.pt")
    with raising("best_model.pt"):
        import_release(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "best_model.pt").write_bytes(weight_bytes[: len(weight_bytes) // 2])
    with raising("best_model.pt"):
        import_release(folder)
    (folder / "best_model.pt").unlink()
    with raising("best_model.pt", kind=FileNotFoundError):
        import_release(folder)


def test_either_configuration_is_found_and_two_must_agree(tmp_path):
    folder = write_example(tmp_path / "r")
    config_text = (folder / "release_config.yaml").read_text()
    (folder / "run_config.yaml").write_text(config_text + "seed: 3\n")
    assert import_release(folder / "best_model.pt").provenance["config"] == "release_config.yaml"
    (folder / "run_config.yaml").write_text(config_text.replace("upper_norm: 100", "upper_norm: 1"))
    with raising(str(folder)):
        import_release(folder)
    (folder / "release_config.yaml").unlink()
    assert import_release(folder).observation.spec.value_max == 1
    (folder / "run_config.yaml").unlink()
    with raising("release_config.yaml", "run_config.yaml", str(folder), kind=FileNotFoundError):
        import_release(folder)


def test_scores_of_both_lattices_equal_those_of_their_slabs(tiny_networks, tmp_path):
    released = import_release(write_example(tmp_path / "r"))
    generator = load_generator(tiny_networks).generator
    rewards_by_lattice = list(compare_lattices(released, generator, [4, 7], psi=0.7))
    for place, lattice in enumerate(("straight", "skewed"), 1):
        slabs = observe_seeds(generator, SigmaSlab(SlabSpec(resolution=32, lattice=lattice)), psi=0.7)([4, 7])
        with torch.no_grad():
            expected = released.score_observed(slabs)
        torch.testing.assert_close(
            torch.tensor([r[place] for r in rewards_by_lattice]), expected, rtol=1e-4, atol=1e-5
        )
    assert [r[0] for r in rewards_by_lattice] == [4, 7] and rewards_by_lattice[0][1] != rewards_by_lattice[0][
        2
    ]


def run(*flags):
    return CliRunner().invoke(reward_files.release, [str(f) for f in flags])


def test_tool_writes_the_reward_and_prints_both_scores(tiny_networks, tmp_path):
    out = tmp_path / "out" / "r.safetensors"
    result = run(
        write_example(tmp_path / "r"),
        f"--out={out}",
        f"--network={tiny_networks}",
        "--latents=1,3-4",
        "--lattice=skewed",
    )
    assert result.exit_code == 0, result.output
    table_rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert table_rows[0] == ["seed", "straight", "skewed", "difference"] and [
        row[0] for row in table_rows[1:]
    ] == [
        "1",
        "3",
        "4",
        "mean",
    ]
    for row in table_rows[1:]:
        straight, skewed, difference = map(float, row[1:])
        assert difference == pytest.approx(straight - skewed, abs=2e-6)
    reward = load_reward(out)
    assert reward.observation.spec == SlabSpec(resolution=32, lattice="skewed")
    slabs = observe_seeds(load_generator(tiny_networks).G, reward.observation)([1])
    assert float(reward.score_observed(slabs)) == pytest.approx(float(table_rows[1][2]), abs=1e-5)


def test_a_release_is_not_scored_on_the_bundled_generator_in_silence(tmp_path):
    release = write_example(tmp_path / "r")
    for source, extra, warns in (
        (release, ["--latents=1"], True),
        (release, ["--latents=none"], False),
        ("synthetic:reward", ["--latents=1"], False),
    ):
        result = run(source, f"--out={tmp_path / 'x.safetensors'}", *extra)
        assert result.exit_code == 0 and ("--network" in result.stderr) == warns, result.stderr


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["synthetic:reward", "--latents=5-2"], "--latents"),
        (["{tmp}/none"], "SOURCE"),
        (["synthetic:reward", "--out={tmp}/r.pt"], "--out"),
        (["synthetic:reward", "--network={tmp}/none.safetensors"], "--network"),
    ],
)
def test_mistakes_end_in_one_line(flags, name, tmp_path):
    result = run(f"--out={tmp_path / 'r.safetensors'}", *(f.format(tmp=tmp_path) for f in flags))
    rejected(result, name)


@pytest.mark.long
def test_example_of_the_help_runs(tmp_path):
    printed = run_example(reward_files.release, tmp_path)
    assert load_reward(tmp_path / "runs/example/imported.safetensors").observation.spec == SlabSpec(
        resolution=32
    )
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["seed", "0", "1", "mean"]

"""The base networks: training, files, and what the bundled ones can and cannot do."""

import pytest
import torch

from eg3d_rlhf.tuning.flow.generate import sample
from eg3d_rlhf.tuning.flow.toy.bundled import FOLDER, NETWORKS, BaseTraining, load_network, save_network, toy_problem, train_base
from eg3d_rlhf.tuning.flow.toy.judges import LabelOracle
from eg3d_rlhf.tuning.flow.toy.pipeline import CONDITIONS

SHORT = BaseTraining(steps=16, batch=8, warm_up=2, ema=0.8)


@pytest.mark.parametrize("stage", ["structure", "voxels"])
def test_training_repeats_and_lowers_the_error(stage):
    losses = []
    first = train_base(stage, SHORT, lambda step, steps, loss: losses.append(loss))
    again = train_base(stage, SHORT)
    assert len(losses) == 16 and sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_stored_network_comes_back_to_half_precision(tmp_path):
    network = NETWORKS["voxels"]()
    save_network("voxels", network, {"training": {}}, tmp_path)
    state = load_network("voxels", tmp_path).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state[name], value.half().float(), atol=0, rtol=0)


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="voxels.safetensors: expected a toy-flow file, got nothing there"):
        load_network("voxels", tmp_path)
    save_network("voxels", NETWORKS["voxels"](), {}, tmp_path).rename(tmp_path / "structure.safetensors")
    with pytest.raises(ValueError, match="expected the network 'structure', got 'voxels'. Restore the file."):
        load_network("structure", tmp_path)
    save_network("structure", NETWORKS["voxels"](), {}, tmp_path)
    with pytest.raises(ValueError, match="expected the weights of this version's 'structure', got others"):
        load_network("structure", tmp_path)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="BaseTraining: expected positive numbers and shares below 1"):
        BaseTraining(ema=1.0)


def test_bundled_files_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 1_000_000
    assert {path.stem for path in FOLDER.iterdir()} == set(NETWORKS)


@pytest.fixture(scope="module")
def made():
    """64 assets of the bundled generator: what the first stage left to each, the asset, what is encoded of it, its condition."""
    toy, names = toy_problem().pipeline, list(CONDITIONS[::3])
    first, second = toy.stages
    cond, none = toy.conditions(names, "structure"), toy.no_condition(64, "structure")
    given = toy.advance("structure", sample(first, first.noise(range(64), [None] * 64), cond, none))
    assets = toy.decode(sample(second, second.noise(range(64), given), cond, none))
    again = [toy.advance("structure", one["structure"][None])[0] for one in toy.encode(assets)]
    return given, assets, again, names


def test_the_base_draws_what_it_is_asked_for_with_defects(made):
    """Headroom at both stages."""
    _, assets, _, names = made
    found = LabelOracle().parts(assets, names)
    assert 0.89 < found["geometry"].mean() / 4 < 0.96 and 0.01 < -found["colour"].mean() / 4 < 0.1
    others = [names[(i + 8) % 64] for i in range(64)]  # of another shape
    assert LabelOracle()(assets, names).mean() > LabelOracle()(assets, others).mean() + 1


def test_decoding_changes_the_structure_of_most_assets(made):
    given, _, again, _ = made
    assert sum(not torch.equal(a, b) for a, b in zip(given, again, strict=True)) > 32

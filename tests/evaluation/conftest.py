"""A tiny tuned run with its control, shared by the tests of the evaluation."""

import pytest

from tests.evaluation import comparisons


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """Folders (tuned, control) of two tiny runs."""
    root = tmp_path_factory.mktemp("pair")
    tuned = comparisons.write_run(root / "00000-tuned", {64: 0.02, 128: 0.05, 192: 0.1}, 10.0)
    return tuned, comparisons.write_run(root / "00001-control", {64: 0.001, 128: 0.002, 192: 0.002}, 0.0, noise=2)


@pytest.fixture(scope="session")
def tiny_comparison(tiny_networks, tiny_reward, tiny_pair, tiny_data):
    """Before, after and control with snapshots, and a dataset."""
    tuned, control = tiny_pair
    return comparisons.load(tiny_networks, tiny_reward, after=tuned, control=control, data=str(tiny_data))


@pytest.fixture(scope="session")
def unchanged(tiny_networks, tiny_reward, tiny_data):
    """A comparison of a generator with itself."""
    return comparisons.load(tiny_networks, tiny_reward, after=tiny_networks, data=str(tiny_data))

"""A tuning run prints the density of its network before the first tick."""

from types import SimpleNamespace

from eg3d_rlhf.generators import as_generator, find_network, load_networks
from eg3d_rlhf.generators.density_samples import sample_density
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan.reward_run import print_surfaces
from tests.generators.pickles.writer import stock_networks


def printed(capsys, nets, reward=None, init: str = "x.pkl") -> tuple[str, str]:
    """Return what a run with these networks prints on stdout and on stderr."""
    print_surfaces(SimpleNamespace(net=SimpleNamespace(init=init)), SimpleNamespace(nets=nets, reward=reward))
    return capsys.readouterr()


def test_the_share_of_the_surface_that_the_reward_reads_is_printed(capsys):
    nets = load_networks(find_network(None))
    output, error = printed(capsys, nets, load_reward(), "bundled")
    assert "8 of 8" in output and "36 x 45 x 39" in output and not error


def test_a_network_without_a_surface_is_named(capsys):
    output, error = printed(capsys, stock_networks())
    assert "0 of 8" in output and "--init" in error and "--set level=" in error
    assert printed(capsys, None, init="scratch") == ("", "")


def test_the_look_leaves_the_network_as_it_was():
    nets = stock_networks()
    before = {name: tensor.clone() for name, tensor in nets.G_ema.state_dict().items()}
    sample_density(as_generator(nets.G_ema), [0])
    assert all((before[name] == tensor).all() for name, tensor in nets.G_ema.state_dict().items())

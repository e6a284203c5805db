"""A tiny generator, its features and a target of its own, for inversions of a few steps."""

import pytest

from eg3d_rlhf.evaluation.inversion.projector import estimate_prior, load_perceptual
from eg3d_rlhf.evaluation.inversion.settings import InversionConfig
from eg3d_rlhf.evaluation.inversion.targets import case_from_seed
from eg3d_rlhf.generators import camera, load_generator
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan.latent_search import Guidance

CONFIG = InversionConfig(w_steps=6, pivot_steps=5, lambda_sigma=0.5, sample_mult=1.0)


@pytest.fixture(scope="session")
def loaded(tiny_networks):
    return load_generator(tiny_networks)


@pytest.fixture(scope="session")
def generator(loaded):
    return loaded.generator


@pytest.fixture(scope="session")
def perceptual():
    return load_perceptual(None, 32)


@pytest.fixture(scope="session")
def prior(generator):
    return estimate_prior(generator)


@pytest.fixture(scope="session")
def cases(generator):
    return [case_from_seed(generator, seed, camera(generator)) for seed in (5, 6)]


@pytest.fixture(scope="session")
def reward(tiny_reward):
    return load_reward(tiny_reward)


@pytest.fixture(scope="session")
def guidance(generator, reward):
    return Guidance(generator, reward, is_channels_last=True)

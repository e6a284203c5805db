"""RewardCS as a network and as a file: missing patches, order, prompts, gradients, and damaged files."""

import json

import pytest
import torch

from eg3d_rlhf.core.interfaces import MeshReward, Patches
from eg3d_rlhf.rewards.meshes.model import MeshEncoder, PromptTokens, RewardCS, load_mesh_reward, load_meshmae
from eg3d_rlhf.rewards.meshes.settings import EncoderOptions, PatchOptions
from tests.rejections import raising

PROMPTS = ("a red head", "a box")


@pytest.fixture(scope="module")
def reward():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = RewardCS(
            PatchOptions(patches=6, faces=4),
            EncoderOptions(faces=4, width=16, depth=2, heads=2),
            PROMPTS,
            12,
            {"seed": 0},
        )
    return made.eval()


def patches(meshes=3, count=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(meshes, count, 4, 10, generator=rng)
    centres = torch.rand(meshes, count, 4, 3, generator=rng)
    mask = torch.ones(meshes, count, dtype=torch.bool)
    mask[-1, 4:] = False
    return Patches(features, centres, mask)


def test_it_is_a_mesh_reward_and_order_and_padding_do_not_matter(reward):
    assert isinstance(reward, MeshReward)
    given = patches()
    prompts = ["a red head", "a box", "a box"]
    known = reward.score(given, prompts)
    assert known.shape == (3,)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(reward.score(Patches(*(part[:, order] for part in given)), prompts), known)
    noise = torch.where(given.mask[..., None, None], given.features, 7.0)
    torch.testing.assert_close(reward.score(given._replace(features=noise), prompts), known)
    alone = reward.score(Patches(*(part[2:, :4] for part in given)), prompts[2:])
    torch.testing.assert_close(alone, known[2:])


def test_prompts_change_the_score(reward):
    mesh = patches(1)
    scores = [float(reward.score(mesh, [text]).detach()) for text in (*PROMPTS, "a blue head", "", "A box")]
    assert len(set(scores)) == 5  # "A box" has the words of a known prompt, and not its row
    tokens, mask = reward.text(["a box", ""])
    assert tokens.shape == (2, 3, 16) and mask.tolist() == [[True] * 3, [True, False, False]]
    forgotten = reward.text(["a box", ""], torch.tensor([True, False]))[0]
    assert torch.equal(forgotten[0, 0], tokens[1, 0]) and torch.equal(forgotten[0, 1:], tokens[0, 1:])
    assert torch.equal(PromptTokens((), 4)([""])[1], torch.ones(1, 1, dtype=torch.bool))
    with raising("[A, P, 4, 10]", "[1, 6, 3, 10]"):
        reward.score(mesh._replace(features=mesh.features[:, :, :3]), ["a"])


def test_gradients_reach_features_and_centres_of_existing_patches(reward):
    given = patches()
    features = given.features.clone().requires_grad_(True)
    centres = given.centres.clone().requires_grad_(True)
    reward.score(Patches(features, centres, given.mask), ["a"] * 3).sum().backward()
    for grad in (features.grad, centres.grad):
        assert (
            float(grad[:2].abs().sum()) > 0
            and float(grad[2, 4:].abs().sum()) == 0
            and bool(grad.isfinite().all())
        )


def test_files_keep_everything(reward, tmp_path):
    path = tmp_path / "reward.safetensors"
    reward.calibrate(patches())
    reward.save(path)
    again = load_mesh_reward(path)
    torch.testing.assert_close(again.score(patches(), ["a box"] * 3), reward.score(patches(), ["a box"] * 3))
    assert (
        again.patches == reward.patches
        and again.resolution == 12
        and again.provenance == {"seed": 0}
        and not again.training
    )
    assert not any(p.requires_grad for p in again.parameters())
    assert json.loads(path.with_suffix(".json").read_text())["prompts"] == list(PROMPTS)
    path.write_bytes(path.read_bytes()[:-40])
    with raising("reward.safetensors"):
        load_mesh_reward(path)


def test_bad_sizes_are_named():
    with raising("width", "10", "4", "heads"):
        EncoderOptions(width=10, heads=4)
    with raising("MeshMAE", "missing", "blocks.0.attn.qkv.weight"):
        load_meshmae(MeshEncoder(EncoderOptions(width=8, heads=2, depth=1)), {"cls_token": torch.zeros(1)})

"""Tuned networks are saved and loaded on a base that stays unchanged."""

import copy
import json
import os

import pytest
import torch

from eg3d_rlhf.models.lora import adapted_layers, add_lora
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import META, save_policy, shared_copy, tuned_model
from eg3d_rlhf.models.sparse import feats_of
from tests.models.adaptable_flow import AdaptableFlow, inputs, shake
from tests.rejections import raising


def run(model):
    with torch.no_grad():
        return feats_of(model(*inputs(True)))


def adapted(seed=3):
    model = AdaptableFlow()
    add_lora(model, LoraConfig(rank=2, alpha=8), seed)
    shake(model)
    return model


def all_tuned():
    model = AdaptableFlow()
    model.out_layer.requires_grad_(False)
    shake(model)
    return model


def places(model):
    return {name: value.data_ptr() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("make", [adapted, all_tuned])
def test_a_kept_policy_is_the_same_network(make, tmp_path):
    model = make()
    base = AdaptableFlow()
    before = copy.deepcopy(base.state_dict())
    again = tuned_model(base, save_policy(model, tmp_path / "kept", {"step": 7}))
    assert torch.equal(run(again), run(model)) and not torch.equal(run(again), run(base))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert base.training and all(p.requires_grad for p in base.parameters())
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert json.loads((tmp_path / "kept" / META).read_text())["meta"] == {"step": 7}


def test_what_tuning_left_is_the_base_s_memory(tmp_path):
    base = AdaptableFlow()
    full = places(tuned_model(base, save_policy(all_tuned(), tmp_path / "full", {})))
    same = {name for name, place in places(base).items() if full[name] == place}
    assert same == {"out_layer.weight", "out_layer.bias", "pos_emb"}
    adapters = places(tuned_model(base, save_policy(adapted(), tmp_path / "adapters", {})))
    assert set(places(base).values()) <= set(adapters.values())


def test_adapters_can_be_merged_so_that_others_fit(tmp_path):
    model = adapted()
    base = AdaptableFlow()
    merged = tuned_model(base, save_policy(model, tmp_path, {}), merge=True)
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(run(merged), run(model), rtol=0, atol=5e-7)
    assert places(merged)["input_layer.weight"] == places(base)["input_layer.weight"]
    assert torch.equal(run(base), run(AdaptableFlow()))
    add_lora(merged, LoraConfig(), 0)
    with raising("adapters"):
        tuned_model(model, tmp_path)


def test_a_shared_copy_is_apart_in_everything_but_memory():
    base = AdaptableFlow()
    twin = shared_copy(base)
    assert places(twin) == places(base) and all(p.requires_grad for p in base.parameters())
    assert not any(p.requires_grad for p in twin.parameters()) and twin.blocks[0] is not base.blocks[0]
    add_lora(twin, LoraConfig(), 0)
    assert not adapted_layers(base) and list(base.state_dict()) == list(AdaptableFlow().state_dict())


def test_equal_networks_give_equal_bytes(tmp_path):
    for name in "ab":
        save_policy(adapted(), tmp_path / name, {"x": 1, "w": 2})
    files = sorted(os.listdir(tmp_path / "a"))
    assert files == ["adapter_config.json", "adapter_model.safetensors", META]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_another_kind_takes_the_place_of_the_old(tmp_path):
    for make, files in ((adapted, 3), (all_tuned, 2), (adapted, 3)):
        model = make()
        save_policy(model, tmp_path, {})
        assert len(os.listdir(tmp_path)) == files
        assert json.loads((tmp_path / META).read_text())["kind"] == ("full" if files == 2 else "adapters")
        assert torch.equal(run(tuned_model(AdaptableFlow(), tmp_path)), run(model))


def test_unsuitable_values_and_weights_are_rejected(tmp_path):
    model = adapted()
    with raising("JSON", "PosixPath"):
        save_policy(model, tmp_path, {"a": tmp_path})
    with torch.no_grad():
        model.blocks[0].to_q.lora_B.weight[0, 0] = torch.nan
    with raising("blocks.0.to_q.lora_B.weight", "finite"):
        save_policy(model, tmp_path, {})
    assert os.listdir(tmp_path) == []

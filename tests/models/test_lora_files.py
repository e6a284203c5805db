"""Files of adapters and networks: three layouts give the same result, files can be read back, and everything
else is rejected with a reason.
"""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eg3d_rlhf.models.lora import adapted_layers, adapter_state, add_lora, merged_state
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import (
    ADAPTER,
    CONFIG,
    PREFIX,
    load_weights,
    read_weights,
    split_state,
    targets_of,
    write_adapter,
    write_merged,
)
from eg3d_rlhf.models.sparse import feats_of
from tests.models.adaptable_flow import AdaptableFlow, inputs, shake
from tests.rejections import raising

SMALL = LoraConfig(rank=2, alpha=8, dropout=0.25)


def run(model):
    with torch.no_grad():
        return feats_of(model.eval()(*inputs(False)))


@pytest.fixture
def model():
    net = AdaptableFlow()
    add_lora(net, SMALL, seed=3)
    shake(net)
    return net


def peft_full(model, adapter="default"):
    """Return the state dict of the network as PEFT wraps it."""
    names = {f".lora_{part}.weight": f".lora_{part}.{adapter}.weight" for part in "AB"}
    renamed = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[PREFIX + name] = value.clone()
    return renamed


def test_adapters_come_back_as_they_were(model, tmp_path):
    assert write_adapter(model, tmp_path / "a", base_name="some/base") == tmp_path / "a"
    read = read_weights(tmp_path / "a")
    assert (read.tensors, read.alpha, read.dropout) == ({}, 8, 0.25)
    again = load_weights(AdaptableFlow(), read)
    assert torch.equal(run(again), run(model))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert [layer.dropout for layer in adapted_layers(again).values()] == [0.25] * 8
    assert torch.equal(run(load_weights(AdaptableFlow(), read_weights(tmp_path / "a" / ADAPTER))), run(model))


def test_what_is_written_is_what_peft_reads(model, tmp_path):
    write_adapter(model, tmp_path, base_name="some/base")
    assert sorted(os.listdir(tmp_path)) == [CONFIG, ADAPTER]
    names = [
        f"{PREFIX}blocks.{i}.{n}.lora_{part}.weight"
        for i in range(2)
        for n in ("to_qkv", "to_q", "to_kv", "to_out")
        for part in "AB"
    ]
    assert set(load_file(tmp_path / ADAPTER)) == set(names)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.25,
        "target_modules": ["to_kv", "to_out", "to_q", "to_qkv"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def test_peft_gives_the_same_numbers(model, tmp_path):
    """PEFT reads our folder, and we read PEFT's folder and state dict, where PEFT is installed."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    write_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(AdaptableFlow(), tmp_path / "ours")
    torch.testing.assert_close(run(theirs), run(model), rtol=0, atol=1e-7)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(run(load_weights(AdaptableFlow(), read_weights(tmp_path / "theirs"))), run(model))
    save_file(theirs.state_dict(), tmp_path / "full.safetensors")
    assert torch.equal(
        run(load_weights(AdaptableFlow(seed=1), read_weights(tmp_path / "full.safetensors", alpha=8))),
        run(model),
    )


@pytest.mark.parametrize("wrap", ["", "module."])
@pytest.mark.parametrize("file", ["full.safetensors", "full.pt"])
def test_peft_s_full_layout_brings_base_and_adapters(model, tmp_path, file, wrap):
    state = {wrap + name: value for name, value in peft_full(model, "learner").items()}
    (
        save_file(state, tmp_path / file)
        if file.endswith("s")
        else torch.save({"state_dict": state}, tmp_path / file)
    )
    read = read_weights(tmp_path / file, alpha=8)
    assert set(read.tensors) == set(AdaptableFlow().state_dict()) and set(read.adapters) == set(
        adapted_layers(model)
    )
    assert torch.equal(run(load_weights(AdaptableFlow(seed=7), read)), run(model))


def test_plain_weights_come_back_as_they_were(model, tmp_path):
    path = write_merged(model, tmp_path / "merged.safetensors")
    read = read_weights(path)
    assert (read.adapters, read.alpha) == ({}, None) and list(read.tensors) == sorted(
        AdaptableFlow().state_dict()
    )
    loaded = load_weights(AdaptableFlow(seed=7), read)
    want = merged_state(model)
    assert not adapted_layers(loaded) and all(
        torch.equal(value, want[name]) for name, value in loaded.state_dict().items()
    )
    torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=5e-7)


def test_loading_leaves_networks_of_the_same_memory_alone(model, tmp_path):
    base = AdaptableFlow()
    other = AdaptableFlow()
    other.load_state_dict(base.state_dict(), assign=True)
    assert other.input_layer.weight.data_ptr() == base.input_layer.weight.data_ptr()
    load_weights(other, read_weights(write_merged(model, tmp_path / "merged.safetensors")))
    assert torch.equal(run(base), run(AdaptableFlow())) and not torch.equal(run(other), run(base))
    assert other.input_layer.weight.data_ptr() == base.input_layer.weight.data_ptr()  # equal: kept
    assert other.blocks[0].to_q.weight.data_ptr() != base.blocks[0].to_q.weight.data_ptr()


def test_the_network_s_own_types_are_kept(model, tmp_path):
    path = write_merged(model, tmp_path / "merged.safetensors")
    half = load_weights(AdaptableFlow().half(), read_weights(path))
    assert {v.dtype for v in half.state_dict().values()} == {torch.float16}


def test_targets_are_short_where_they_mean_just_the_layers():
    net = nn.ModuleDict(
        {"a": nn.ModuleDict({"to_q": nn.Linear(2, 2)}), "b": nn.ModuleDict({"to_q": nn.Linear(2, 2)})}
    )
    add_lora(net, LoraConfig(targets=("a.to_q",)), 0)
    assert targets_of(net) == ["a.to_q"]
    adapted_everywhere = AdaptableFlow()
    add_lora(adapted_everywhere, SMALL, 0)
    assert targets_of(adapted_everywhere) == ["to_kv", "to_out", "to_q", "to_qkv"]


def changed_config(**values):
    def change(folder, model):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return change


def changed_tensors(change):
    def write(folder, model):
        tensors = load_file(folder / ADAPTER)
        change(tensors)
        save_file(tensors, folder / ADAPTER)

    return write


FIRST_A = f"{PREFIX}blocks.0.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            lambda f, m: (f / CONFIG).unlink(),
            ("alpha", CONFIG),
        ),
        (lambda f, m: (f / CONFIG).write_text("{"), (CONFIG, "JSONDecodeError")),
        (changed_config(r=0), (CONFIG, "r >= 1", "lora_alpha")),
        (changed_config(use_dora=True), (CONFIG, "use_dora", "True")),
        (changed_config(use_rslora=True), (CONFIG, "use_rslora", "True")),
        (changed_config(peft_type="IA3"), (CONFIG, "peft_type", "'IA3'")),
        (changed_config(rank_pattern={"to_q": 4}), (CONFIG, "rank_pattern", "{'to_q': 4}")),
        (changed_config(init_lora_weights="pissa"), (CONFIG, "init_lora_weights", "'pissa'")),
        (changed_config(r=3), (ADAPTER, "[2, 3]")),
        (
            changed_tensors(lambda t: t.pop(FIRST_A)),
            (ADAPTER, "A and B", "blocks.0.to_q"),
        ),
        (
            changed_tensors(lambda t: t.__setitem__(FIRST_A, t[FIRST_A] / 0)),
            (ADAPTER, FIRST_A),
        ),
        (
            changed_tensors(lambda t: t.__setitem__(FIRST_A.replace("_A.", "_A.x."), t.pop(FIRST_A))),
            (ADAPTER, "x"),
        ),
        (
            changed_tensors(
                lambda t: t.__setitem__(
                    FIRST_A.replace("lora_A", "lora_magnitude_vector"), t[FIRST_A].clone()
                )
            ),
            (ADAPTER, "lora_magnitude_vector"),
        ),
        (
            changed_tensors(lambda t: t.__setitem__(FIRST_A, t[FIRST_A][:, :-1].clone())),
            ("blocks.0.to_q", "[8, 8]", "[8, 7]"),
        ),
        (
            changed_tensors(
                lambda t: [
                    t.__setitem__(k.replace("to_q.", "to_v."), t.pop(k)) for k in list(t) if "1.to_q." in k
                ]
            ),
            ("blocks.1.to_v",),
        ),
        (lambda f, m: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:-9]), (ADAPTER,)),
        (
            lambda f, m: write_merged(m, f / "model.safetensors"),
            ("adapter_model.safetensors", "model.safetensors"),
        ),
    ],
)
def test_unsupported_settings_and_tensors_are_rejected(model, tmp_path, change, names):
    write_adapter(model, tmp_path)
    change(tmp_path, model)
    with raising(*names):
        load_weights(AdaptableFlow(), read_weights(tmp_path))


def test_ambiguous_or_incomplete_files_are_rejected(model, tmp_path):
    with raising(str(tmp_path), ADAPTER, kind=FileNotFoundError):
        read_weights(tmp_path)
    with raising("add_lora"):
        write_adapter(AdaptableFlow(), tmp_path)
    write_adapter(model, tmp_path)
    with raising(CONFIG, "alpha", "8", "4"):
        read_weights(tmp_path, alpha=4)
    with raising(ADAPTER, "adapters"):
        load_weights(model, read_weights(tmp_path))
    state = AdaptableFlow().state_dict()
    state["extra"] = state.pop("pos_emb")
    save_file(state, tmp_path / "plain.safetensors")
    with raising("plain.safetensors", "missing: pos_emb", "unexpected: extra"):
        load_weights(AdaptableFlow(), read_weights(tmp_path / "plain.safetensors"))


class Bomb:
    def __reduce__(self):
        return os.system, ("echo ran",)


def test_no_code_in_a_file_is_run(tmp_path, capfd):
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb()}, 2))
    with raising("adapter_model.bin"):
        read_weights(tmp_path)
    assert "ran" not in capfd.readouterr().out


def test_adapter_tensors_without_peft_s_prefix_are_read_as_well(model):
    loaded, adapters = split_state(adapter_state(model), "state")
    assert loaded == {} and set(adapters) == set(adapted_layers(model))

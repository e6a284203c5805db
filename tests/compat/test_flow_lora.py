"""Adapters on TRELLIS's structure flow against values and files that PEFT made (fixtures/trellis)."""

import json

import pytest
import torch
from safetensors.torch import save_file

from eg3d_rlhf.models.lora import adapted_layers, adapter_state, adapters_off, merged_state
from eg3d_rlhf.models.policies import (
    ADAPTER,
    CONFIG,
    PREFIX,
    load_weights,
    read_weights,
    save_policy,
    split_state,
    tuned_model,
    write_adapter,
)
from eg3d_rlhf.models.trellis.flows import StructureFlow, StructureFlowConfig
from tests.compat.trellis_reference import config_of, holding, read

TOLERANCE = 1e-5
# of the largest output, adapter on against merged; up to 5.8e-7 were seen, by the processor
MERGED_TOLERANCE = 1.2e-6


@pytest.fixture(scope="module")
def peft():
    """Read the file with PEFT's adapters: full and adapter state dicts, settings, outputs."""
    found = holding("lora_json", "y_on", "y_off")
    if not found:
        pytest.skip("this set has no file of trellis with lora_json, y_on and y_off")
    state = read(found[0])
    parts = {
        kind: {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{kind}/")}
        for kind in ("full", "adapter")
    }
    config = config_of(state, "lora_json")
    return {**parts, "config": config, "on": state["y_on"], "off": state["y_off"]}


@pytest.fixture(scope="module")
def flow(peft):
    """Read architecture, weights and inputs of the network under the adapters, the flow of its shapes."""
    wanted = {name: tensor.shape for name, tensor in split_state(peft["full"], "full")[0].items()}
    for path in holding("config_json", "x", "t", "cond"):
        values = read(path)
        state = {name.removeprefix("sd/"): v for name, v in values.items() if name.startswith("sd/")}
        if {name: tensor.shape for name, tensor in state.items()} == wanted:
            inputs = values["x"], values["t"] / 1000, values["cond"]
            config = StructureFlowConfig(**config_of(values))
            return {"config": config, "state": state, "inputs": inputs}
    pytest.skip("this set has no flow of the shapes that PEFT's adapters sit on")


@pytest.fixture
def files(peft, tmp_path):
    """Both layouts as files: <tmp>/full.safetensors, and <tmp>/adapter as PEFT leaves it."""
    (tmp_path / "adapter").mkdir()
    save_file(peft["full"], tmp_path / "full.safetensors")
    save_file(peft["adapter"], tmp_path / "adapter" / ADAPTER)
    config = {**peft["config"], "peft_type": "LORA", "bias": "none", "use_dora": False, "lora_dropout": 0.0}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    return tmp_path


def network(flow, state):
    model = StructureFlow(flow["config"])
    model.load_state_dict(state)
    return model.eval()


def run(model, flow):
    with torch.no_grad():
        return model(*flow["inputs"])


def same_output(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=MERGED_TOLERANCE * float(want.abs().max()))


def test_both_layouts_hold_the_same(peft, flow):
    plain, adapters = split_state(peft["full"], "full")
    none, same = split_state(peft["adapter"], "adapter")
    assert none == {} and set(plain) == set(flow["state"])
    assert len(adapters) == sum(name.endswith("lora_A.weight") for name in peft["adapter"]) > 0
    assert list(adapters) == list(same)
    assert all(
        torch.equal(a, b) for layer in adapters for a, b in zip(adapters[layer], same[layer], strict=True)
    )


def test_outputs_with_and_without_adapters(peft, flow, files):
    base = network(flow, flow["state"])
    model = tuned_model(base, files / "adapter")
    torch.testing.assert_close(run(model, flow), peft["on"], rtol=TOLERANCE, atol=TOLERANCE)
    with adapters_off(model):
        off = run(model, flow)
    assert torch.equal(off, run(base, flow))
    torch.testing.assert_close(off, peft["off"], rtol=TOLERANCE, atol=TOLERANCE)
    assert (peft["on"] - peft["off"]).abs().max() > 100 * TOLERANCE


def test_merged_equals_adapter_on(peft, flow, files):
    base = network(flow, flow["state"])
    model = tuned_model(base, files / "adapter")
    merged = tuned_model(base, files / "adapter", merge=True)
    assert list(merged.state_dict()) == list(base.state_dict()) == list(merged_state(model))
    same_output(run(merged, flow), run(model, flow))


def test_the_full_layout_brings_its_own_base(peft, flow, files):
    """PEFT had merged the adapters into the fixture's base layers when it wrote this state: without them it
    is already y_on.
    """
    alpha = peft["config"]["lora_alpha"]
    model = load_weights(
        StructureFlow(flow["config"]), read_weights(files / "full.safetensors", alpha=alpha)
    ).eval()
    with adapters_off(model):
        same_output(run(model, flow), peft["on"])
    merged = merged_state(tuned_model(network(flow, flow["state"]), files / "adapter"))
    plain, adapters = split_state(peft["full"], "full")
    for name, value in plain.items():
        tuned = name.removesuffix(".weight") in adapters
        # the rounding of a merged number grows with it; the others are equal
        limit = 5e-8 * max(1.0, float(value.abs().max())) if tuned else 0
        torch.testing.assert_close(merged[name], value, rtol=0, atol=limit, msg=name)


def test_a_full_state_of_the_base_gives_the_same_network(peft, flow, files):
    on = tuned_model(network(flow, flow["state"]), files / "adapter")
    state = {f"{PREFIX}{name}": value for name, value in on.state_dict().items()}
    assert set(state) == {name.replace(".default.", ".") for name in peft["full"]}
    save_file(
        {name: state[name.replace(".default.", ".")].clone() for name in peft["full"]},
        files / "full.safetensors",
    )
    alpha = peft["config"]["lora_alpha"]
    full = tuned_model(network(flow, flow["state"]), files / "full.safetensors", alpha=alpha)
    kept = tuned_model(network(flow, flow["state"]), save_policy(on, files / "kept", {}))
    assert torch.equal(run(full, flow), run(on, flow)) and torch.equal(run(kept, flow), run(on, flow))


def test_written_as_peft_wrote_it(peft, flow, files):
    model = tuned_model(network(flow, flow["state"]), files / "adapter")
    again = read_weights(write_adapter(model, files / "again"))
    written = {f"{PREFIX}{name}": value for name, value in adapter_state(model).items()}
    assert set(written) == set(peft["adapter"]) and all(
        torch.equal(written[name], peft["adapter"][name]) for name in written
    )
    config = json.loads((files / "again" / CONFIG).read_text())
    want = peft["config"] | {"target_modules": sorted(peft["config"]["target_modules"])}
    assert {name: config[name] for name in want} == want
    assert again.alpha == want["lora_alpha"] and {len(A) for A, _ in again.adapters.values()} == {want["r"]}
    assert set(adapted_layers(model)) == set(again.adapters)

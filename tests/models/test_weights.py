"""Weights of published networks: read without running anything, loaded strictly, and written back."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eg3d_rlhf.models import weights
from tests.rejections import raising


class Bomb:
    def __reduce__(self):
        return os.system, ("echo ran",)


@pytest.fixture
def state():
    return {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}


def test_all_layouts_read_alike(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.ckpt")
    for path in sorted(tmp_path.iterdir()):
        again = weights.read(path, "--x")
        assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def _bytes(content: bytes):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (_bytes(b""), ("a.pt",)),
        (_bytes(b"junk"), ("a.pt",)),
        (_bytes(b"PK\x03\x04" * 9), ("a.pt",)),
        (lambda path: torch.save([1], path), ("list",)),
        (lambda path: torch.save({}, path), ("dict",)),
        (lambda path: torch.save({"a": "text"}, path), ("dict",)),
        (_bytes(pickle.dumps({"a": Bomb()}, 2)), ("pickle",)),
        (lambda path: torch.save({"a": Bomb()}, path), ("pickle",)),
    ],
)
def test_a_file_that_is_no_state_dict_is_rejected_in_one_line_and_not_run(write, names, tmp_path, capfd):
    write(tmp_path / "a.pt")
    with raising("--x", "a.pt", *names):
        weights.read(tmp_path / "a.pt", "--x")
    assert "ran" not in capfd.readouterr().out


def test_nothing_is_downloaded(tmp_path):
    with raising("--x", "no.pt", kind=FileNotFoundError):
        weights.read(tmp_path / "no.pt", "--x")


@pytest.mark.parametrize("put", [weights.fill, weights.adopt])
@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 3), lambda: weights.empty(lambda: nn.Linear(2, 3))])
def test_every_entry_goes_in_and_nothing_else(put, make, state):
    module = put(make(), state, "x")
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    wrong = {
        ("missing: bias",): {"weight": state["weight"]},
        ("unexpected: more",): {**state, "more": torch.ones(1)},
        ("misshapen: bias", "[2]", "[3]"): {**state, "bias": torch.ones(2)},
        ("finite", "bias"): {**state, "bias": torch.full((3,), torch.nan)},
    }
    for names, tensors in wrong.items():
        with raising("x:", *names):
            put(make(), tensors, "x")


def test_dtypes_are_those_of_the_file_or_those_requested(state):
    half = {name: tensor.half() for name, tensor in state.items()}
    made = weights.fill(
        weights.empty(lambda: nn.Linear(2, 3)), half, "x", requested_dtypes={"bias": torch.float32}
    )
    assert (made.weight.dtype, made.bias.dtype) == (torch.float16, torch.float32)
    assert {
        t.dtype for t in weights.adopt(weights.empty(lambda: nn.Linear(2, 3)), half, "x").parameters()
    } == {torch.float32}
    assert {t.dtype for t in weights.in_types_of(half, {"bias": state["bias"]}).values()} == {torch.float16}


@pytest.mark.parametrize("name", ["b.safetensors", "b.ckpt"])
def test_a_file_is_rewritten_completely_or_not_at_all(name, state, tmp_path, monkeypatch):
    weights.rewrite(tmp_path / "deep" / name, state)
    assert weights.read(tmp_path / "deep" / name, "x").keys() == state.keys()
    weights.write(tmp_path / "c.safetensors", {"a": state["bias"], "b": state["bias"]})  # shared memory
    assert load_file(tmp_path / "c.safetensors").keys() == {"a", "b"}
    with pytest.raises(Exception):  # noqa: B017  whichever the library says
        weights.rewrite(tmp_path / name, {"a": lambda: None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "deep"]


def test_parts_are_found_by_their_prefix(state):
    nested = {f"model.0.{name}": tensor for name, tensor in state.items()} | {
        "model.11.a": torch.ones(1),
        "other": torch.ones(2),
    }
    assert weights.entries_below(nested, "model.0.").keys() == state.keys()
    assert (weights.count(nested, "model."), weights.count(nested, "x.")) == (12, 0)
    assert weights.shape_of(nested, "model.0.weight", "x", 2) == (3, 2)
    for name, axes in (("no", 1), ("other", 2)):
        with raising(f" {name} ", f" {axes} "):
            weights.shape_of(nested, name, "x", axes)

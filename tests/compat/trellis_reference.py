"""Reading the reference values of TRELLIS's networks, and what equal means."""

import ast
import json

import numpy as np
import torch

OUTPUT, GRADIENT = 1e-5, 1e-3


def read(path):
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def config_of(values):
    return json.loads(bytes(values["config_json"].numpy()))


def state_of(values, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}


def close(got, want, tolerance=OUTPUT):
    got, want = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=tolerance, atol=tolerance * max(np.abs(want).max(), 1))


def assert_like_table(table, build):
    """The network has the table's parameters: names, their order, shapes and types."""
    want = {key: (ast.literal_eval(shape), dtype) for key, shape, dtype in (line.split("\t") for line in table.read_text().splitlines())}
    with torch.device("meta"):
        state = build().state_dict()
    assert {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in state.items()} == want
    assert list(state) == list(want)

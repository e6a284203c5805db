"""Reward files.

A reward is stored as `<name>.safetensors` (the state dict, names and order of published checkpoints) beside `<name>.json` (architecture,
slab geometry, and where the labels came from). Published `.pt` state dicts of the full-size network load as well.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from eg3d_rlhf.reward.config import PAPER, RewardArch
from eg3d_rlhf.reward.ensemble import RewardEnsemble
from eg3d_rlhf.reward.model import RewardModel
from eg3d_rlhf.sigma.spec import SlabSpec
from training.storage import write_atomic

FORMAT = "eg3d-rlhf reward 1"
_OLD_UPSAMPLING = "upsampling.upsample.weight"
Reward = RewardModel | RewardEnsemble


def build_reward(arch: RewardArch) -> Reward:
    """An untrained network, or several, of this architecture."""
    return RewardModel(arch) if arch.members == 1 else RewardEnsemble(arch)


def check_state(who: str, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError naming every missing, unexpected and misshapen entry of `state` for `model` (the first eight of each)."""
    old = [name for name in state if name.endswith(_OLD_UPSAMPLING)]
    if old:
        raise ValueError(
            f"{who}: expected '...upsample.conv_transposed.weight', got '{old[0]}'. These weights were trained with pytorch-3dunet 1.8.1 "
            "or older, whose upsampling computes other numbers; renaming the key would change the scores. Use weights trained with 1.8.2 "
            "or later."
        )
    own = model.state_dict()
    shapes = [(k, list(own[k].shape), list(state[k].shape)) for k in own if k in state and own[k].shape != state[k].shape]
    wrong = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "misshapen": [f"{k} (expected {a}, got {b})" for k, a, b in shapes],
    }
    found = [f"{len(v)} {k}: {', '.join(v[:8])}{', ...' if len(v) > 8 else ''}" for k, v in wrong.items() if v]
    if found:
        listed = "; ".join(found)
        raise ValueError(f"{who}: expected the {len(own)} entries of this architecture, got {listed}. Is it another network's file?")


def save_reward(path: str | Path, model: Reward, spec: SlabSpec, meta: Mapping) -> Path:
    """Write `path` (.safetensors) and its `.json`, each atomically; returns the path.

    `meta` holds plain JSON values; the training tool writes generator (sha256 hex of the weights), psi, truncation_cutoff,
    test_accuracy and labels (sha256 hex). Raises ValueError on another suffix or on values that JSON cannot hold.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_reward(path): expected a name ending in .safetensors, got {path.name}. Rename it.")
    sidecar = {"format": FORMAT, "arch": model.arch.to_dict(), "spec": spec.to_dict(), "meta": dict(meta)}
    try:
        text = json.dumps(sidecar, indent=2)
    except TypeError as error:
        raise ValueError(f"save_reward(meta): expected plain JSON values, got: {error}. Convert tensors and paths first.") from error
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomic(path, safetensors.torch.save(state, metadata={"format": FORMAT}))
    write_atomic(path.with_suffix(".json"), (text + "\n").encode())
    return path


def load_reward(path: str | Path, device: str | torch.device = "cpu") -> tuple[Reward, SlabSpec, dict]:
    """Read a reward -> (model in eval mode, slab geometry, meta).

    `.safetensors` needs its `.json`; `.pt`, `.pth` and `.ckpt` are read as a published state dict of the full-size network (or a
    {'state_dict': ...} of one) with the paper's slab and an empty meta. Nothing in the file is executed.

    Raises: FileNotFoundError; ValueError on truncated or foreign files and on entries that do not fit the architecture.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        arch, spec, meta = _read_sidecar(path.with_suffix(".json"))
        state = _read_safetensors(path)
    else:
        arch, spec, meta, state = PAPER, SlabSpec(), {}, read_torch(path)
    model = build_reward(arch)
    check_state(f"load_reward({path.name})", model, state)
    model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False), spec, meta


def _read_sidecar(path: Path) -> tuple[RewardArch, SlabSpec, dict]:
    if not path.is_file():
        raise FileNotFoundError(f"load_reward: expected the description {path} beside the weights, got none. Copy both files together.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"load_reward({path.name}): expected JSON, got: {error}. Was the file cut short? Copy it again.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"load_reward({path.name}): expected format '{FORMAT}', got another file. Use a reward of this package.")
    return RewardArch.from_dict(values["arch"]), SlabSpec.from_dict(values["spec"]), dict(values.get("meta", {}))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"load_reward: expected a file, got none at {path}. Check the path.")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_reward({path.name}): expected safetensors, got: {error}. Truncated or foreign? Copy it again.") from error


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    """A published state dict (.pt), weights only: nothing in the file is executed. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"load_reward: expected a file, got none at {path}. Check the path.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"load_reward({path.name}): expected a state dict, got: {reason}. Truncated or foreign? Copy it again.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"load_reward({path.name}): expected a dict of tensors, got {type(state).__name__}. Export the weights alone.")
    return dict(state)

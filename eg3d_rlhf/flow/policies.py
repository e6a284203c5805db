"""Tuned networks: kept in folders, put on the base that they were tuned from, and swapped into a pipeline for a while.

    adapters          adapter_model.safetensors, adapter_config.json (PEFT's layout), policy.json
    everything tuned  model.safetensors (plain names), policy.json
"""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from eg3d_rlhf.flow.lora import adapted_layers, merged_state
from eg3d_rlhf.flow.lora_files import ADAPTER, CONFIG, MODEL, load_weights, read_weights, replace_state, write_adapter, write_merged
from eg3d_rlhf.flow.stage import Pipeline, stage_of
from training.storage import write_atomic

META = "policy.json"


def shared_copy(model: nn.Module) -> nn.Module:
    """A frozen network like `model` whose parameters and buffers are the same memory: for adapters, which leave the base alone.

    To train it without adapters, use copy.deepcopy.
    """
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo)


def tuned_model(base: nn.Module, weights: str | Path, *, alpha: float | None = None, merge: bool = False) -> nn.Module:
    """The network that a file or folder of weights makes of a base; frozen, in eval mode. The base is left as it is.

    Tensors that tuning has not changed are the base's own memory.

    Args:
        weights: adapters or a full state dict, in any layout of lora_files; alpha: see read_weights.
        merge: work adapters into the weights, so that others can be added: a later round starts from there.
    Raises: FileNotFoundError; ValueError for weights of another network.
    """
    model = load_weights(shared_copy(base), read_weights(weights, alpha))
    if merge and adapted_layers(model):
        state, model = merged_state(model), shared_copy(base)
        replace_state(model, state, str(weights))
    return model.eval().requires_grad_(False)


def save_policy(model: nn.Module, folder: str | Path, meta: Mapping) -> Path:
    """Write a tuned network: its adapters if it has any, else all of it; returns the folder. Equal networks give equal bytes.

    Args: meta: JSON values for policy.json, such as the hash of the base, the step, the settings.
    Raises: ValueError for values that JSON cannot hold, or numbers that are not finite.
    """
    folder, adapted = Path(folder), bool(adapted_layers(model))
    bad = [name for name, value in model.state_dict().items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ValueError(f"save_policy: expected finite weights, got others in {', '.join(bad[:4])}. Lower the learning rate.")
    try:
        text = json.dumps({"kind": "adapters" if adapted else "full", "meta": dict(meta)}, indent=1, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"save_policy(meta): expected plain JSON values, got: {error}. Convert tensors and paths first.") from None
    if adapted:
        write_adapter(model, folder)
    else:
        write_merged(model, folder / MODEL)
    for stale in [MODEL] if adapted else [ADAPTER, CONFIG]:
        (folder / stale).unlink(missing_ok=True)
    write_atomic(folder / META, (text + "\n").encode())
    return folder


def link(source: Path, target: Path) -> None:
    """The same file at another place: linked, or copied where the disk is another or has no links. What was there goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def read_meta(folder: str | Path) -> dict:
    """What save_policy was told. Raises: FileNotFoundError, ValueError."""
    path = Path(folder) / META
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the description of a tuned network, got none. Name a folder that training wrote.")
    try:
        return dict(json.loads(path.read_text())["meta"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with meta, got: {error!r}. Copy the folder again.") from None


@contextlib.contextmanager
def with_models(pipeline: Pipeline, models: Mapping[str, nn.Module]) -> Iterator[Pipeline]:
    """Within it these stages have these networks; afterwards their own again. Raises: ValueError for a stage that is not there."""
    stages = {name: stage_of(pipeline, name) for name in models}
    own = {name: stage.model for name, stage in stages.items()}
    try:
        for name, stage in stages.items():
            stage.model = models[name]
        yield pipeline
    finally:
        for name, stage in stages.items():
            stage.model = own[name]

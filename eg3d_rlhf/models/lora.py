"""Low-rank adapters on named linear layers: the base stays as it is, and the same network with its adapters
off is the reference.

    y = W x + b + (alpha / rank) B A dropout(x)        Hu et al. 2021, LoRA, equation 3

A [rank, in] is random and B [out, rank] zero at the start, so that an untrained adapter changes nothing.
Parameters are called as PEFT calls them, less the name it gives an adapter: X.base_layer.weight,
X.lora_A.weight, X.lora_B.weight.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.models.lora_settings import LoraConfig
from torch_utils.ops.implementations import once
from torch_utils.ops.linear import Linear, fits, product

BASE = ".base_layer"


class _Adapted(torch.autograd.Function):
    """W x + b + scale B A x of a frozen W and b."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        low = product(x, a)  # [..., rank]
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        y = product(x, weight, bias)
        y.view(-1, len(b)).addmm_(low.flatten(0, -2), b.t(), alpha=scale)
        return y

    @staticmethod
    @once("LoraLinear")
    def backward(ctx, grad):
        x, low, weight, a, b = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        to_x = None
        to_low = ctx.scale * product(rows, b.t())  # [T, rank]
        if ctx.needs_input_grad[0]:
            to_x = product(rows, weight.t()).addmm_(to_low, a).view_as(x)
        to_a = product(to_low.t(), x.flatten(0, -2).t())
        to_b = ctx.scale * product(rows.t(), low.flatten(0, -2).t())
        return to_x, None, None, to_a, to_b, None


class LoraLinear(nn.Module):
    """A linear layer and its adapter. The adapter, zero as made, computes in float32 at least, whatever the
    base is in.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        weight = base_layer.weight
        kind = {
            "bias": False,
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        self.base_layer = base_layer
        self.lora_A = nn.utils.skip_init(nn.Linear, base_layer.in_features, rank, **kind)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base_layer.out_features, **kind)
        nn.init.zeros_(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]; exactly the base layer where the adapter is off."""
        base = self.base_layer
        scale = self.alpha / self.rank
        if self.active and fits(x, base.weight) and not (self.dropout and self.training):
            return _Adapted.apply(x, base.weight, base.bias, self.lora_A.weight, self.lora_B.weight, scale)
        y = base(x)
        if not self.active:
            return y
        x = x.to(self.lora_A.weight.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return y + (scale * self.lora_B(self.lora_A(x))).to(y.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The base's, for networks that read its type or shape; computing with it leaves the adapter out."""
        return self.base_layer.weight

    def update(self) -> torch.Tensor:
        """What the adapter adds to the weight, [out, in], in its own type."""
        return self.alpha / self.rank * (self.lora_B.weight.detach() @ self.lora_A.weight.detach())

    def merged_weight(self) -> torch.Tensor:
        """Weight and update in one, [out, in], rounded to the base's type."""
        update = self.update()
        weight = self.base_layer.weight.detach()
        return (weight.to(update.dtype) + update).to(weight.dtype)


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Put adapters on the target layers, in place, and freeze everything else; returns the layers' names.

    A is uniform within 1 / sqrt(in) (He et al. 2015, as linear layers start), drawn on the CPU from `seed` in
    the order of the layers.
    Raises: ValueError for a target that is not there, or is no plain linear layer; for a model that has
        adapters.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [n for n in modules if any(matches(n, t) for t in config.targets)]
    missing = [t for t in config.targets if not any(matches(n, t) for n in names)]
    if missing:
        there = (
            ", ".join(sorted({n.rpartition(".")[2] for n, m in modules.items() if _is_linear(m)})) or "none"
        )
        who = f"add_lora({type(model).__name__})"
        raise ValueError(
            f"{who}: expected layers named {', '.join(missing)}, got linear layers named {there}. Name"
            " targets among these."
        )
    layers = attach(model, names, config.rank, config.alpha, config.dropout)
    generator = torch.Generator().manual_seed(seed)
    for layer in dict.fromkeys(layers.values()):
        A = layer.lora_A.weight
        bound = 1 / math.sqrt(layer.base_layer.in_features)
        with torch.no_grad():
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
    return names


def attach(
    model: nn.Module, names: Iterable[str], rank: int, alpha: float, dropout: float = 0.0
) -> dict[str, LoraLinear]:
    """Wrap the linear layers of these names, in place, with adapters that are zero; everything else is
    frozen.
    """
    if adapted_layers(model):
        raise ValueError(
            f"add_lora: expected a network without adapters, got one with {len(adapted_layers(model))}. Merge"
            " them first (merged_state)."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(names)
    odd = [f"{n} ({type(modules[n]).__name__})" for n in names if not _is_linear(modules[n])]
    if odd:
        raise ValueError(
            f"add_lora: expected linear layers on plain tensors, got {', '.join(odd[:4])}. Choose other"
            " targets."
        )
    model.requires_grad_(False)
    wrapped: dict[nn.Module, LoraLinear] = {}  # a layer that is used under two names keeps one adapter
    for name in names:
        if modules[name] not in wrapped:
            wrapped[modules[name]] = LoraLinear(modules[name], rank, alpha, dropout).train(
                modules[name].training
            )
        owner, _, own = name.rpartition(".")
        setattr(modules[owner], own, wrapped[modules[name]])
    return {name: wrapped[modules[name]] for name in names}


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes W x + b of tensors; subclasses may take other inputs."""
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, Linear.forward)


def matches(name: str, target: str) -> bool:
    """Whether a layer's name is the target or ends in it, by whole parts."""
    return name == target or name.endswith(f".{target}")


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by the name that the layer had before."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, each once, in the order of the layers."""
    return [
        p
        for layer in dict.fromkeys(adapted_layers(model).values())
        for p in (layer.lora_A.weight, layer.lora_B.weight)
    ]


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = adapted_layers(model).items()
    return {
        f"{name}.{part}.weight": getattr(layer, part).weight.detach()
        for name, layer in layers
        for part in ("lora_A", "lora_B")
    }


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the network computes as its base does, to the last bit. Nests; run no backward pass within
    it.

    Raises: ValueError for a network without adapters.
    """
    layers = adapted_layers(model).values()
    if not layers:
        raise ValueError(
            "adapters_off: expected a network with adapters, got one without. Call add_lora first."
        )
    before = [(layer, layer.active) for layer in layers]
    try:
        for layer in layers:
            layer.active = False
        yield model
    finally:
        for layer, active in before:
            layer.active = active


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict with the adapters worked into the weights, under the base's plain names and in its types and
    order.
    """
    layers = adapted_layers(model)
    state = {}
    for key, value in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        stem, _, part = owner.rpartition(".")
        if part == BASE[1:] and stem in layers:
            state[f"{stem}.{leaf}"] = layers[stem].merged_weight() if leaf == "weight" else value
        elif not (part in ("lora_A", "lora_B") and stem in layers):
            state[key] = value
    return state


def merge_rounding(model: nn.Module) -> float:
    """How much of the update is lost where weights are rounded to the base's type: norm of the rounding over
    norm of the update.

    Near 0 for a float32 base. Training that moved float16 weights little may lose much of what it learned:
    keep the adapter then.
    """
    lost = size = 0.0
    for layer in dict.fromkeys(adapted_layers(model).values()):
        update = layer.update().double()
        weight = layer.base_layer.weight.detach().double()
        lost += float((layer.merged_weight().double() - weight - update).square().sum())
        size += float(update.square().sum())
    return math.sqrt(lost / size) if size else 0.0

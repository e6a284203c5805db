"""Low-rank adapters (LoRA) on named linear layers.

The base weights stay unchanged. The same network with its adapters switched off is the reference model.

    y = W x + b + (alpha / rank) B A dropout(x)        Hu et al. 2021, LoRA, equation 3

A [rank, in] is random and B [out, rank] zero at the start, so that an untrained adapter changes nothing.
Parameters have PEFT's names without the name of an adapter: X.base_layer.weight, X.lora_A.weight,
X.lora_B.weight.
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
    """Compute W x + b + scale B A x with a frozen W and b in one autograd node."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        # Neither y nor W x is kept for the backward pass: only the input and the low-rank product are.
        low = product(x, a)  # [..., rank]
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        y = product(x, weight, bias)
        # In place, so that no second tensor of the output's size exists. [rows, rank] x [rank, out]
        y.view(-1, len(b)).addmm_(low.flatten(0, -2), b.t(), alpha=scale)
        return y

    @staticmethod
    @once("LoraLinear")
    def backward(ctx, grad):
        x, low, weight, a, b = ctx.saved_tensors
        # All leading axes are rows: [..., out] -> [rows, out].
        rows = grad.flatten(0, -2)
        to_x = None
        to_low = ctx.scale * product(rows, b.t())  # [T, rank]
        if ctx.needs_input_grad[0]:
            # dL/dx = W^T g + A^T (scale B^T g), summed in place
            to_x = product(rows, weight.t()).addmm_(to_low, a).view_as(x)
        # dL/dA = (scale B^T g)^T x and dL/dB = scale g^T (A x)
        to_a = product(to_low.t(), x.flatten(0, -2).t())
        to_b = ctx.scale * product(rows.t(), low.flatten(0, -2).t())
        # W, b and the scale get no gradient: the base is frozen.
        return to_x, None, None, to_a, to_b, None


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter, whose B is zero at the start.

    The adapter computes in float32 at least, also where the base is in half precision: small updates would
    otherwise be lost to rounding.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        weight = base_layer.weight
        # Adapters live on the base's device; half precision is widened to float32.
        kind = {
            "bias": False,
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        self.base_layer = base_layer
        # skip_init draws nothing from torch's global random state, so adding adapters does not shift later
        # draws.
        self.lora_A = nn.utils.skip_init(nn.Linear, base_layer.in_features, rank, **kind)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base_layer.out_features, **kind)
        nn.init.zeros_(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        # Read when files are written: all adapters of a network must agree in these.
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, [..., in] -> [..., out]. With the adapter off the result is exactly the base
        layer's.
        """
        base = self.base_layer
        scale = self.alpha / self.rank
        if self.active and fits(x, base.weight) and not (self.dropout and self.training):
            # The fused node has no dropout and its base must be float32 on a CPU with oneDNN (`fits`).
            return _Adapted.apply(x, base.weight, base.bias, self.lora_A.weight, self.lora_B.weight, scale)
        y = base(x)
        if not self.active:
            return y
        # The general path: the adapter's product is computed in its own precision and then rounded to y's.
        x = x.to(self.lora_A.weight.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return y + (scale * self.lora_B(self.lora_A(x))).to(y.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Return the base's weight, for networks that read its dtype or shape.

        A computation that uses it leaves the adapter out.
        """
        return self.base_layer.weight

    def update(self) -> torch.Tensor:
        """Compute the matrix [out, in] that the adapter adds to the weight, in the adapter's dtype."""
        # [out, rank] x [rank, in] -> [out, in]
        return self.alpha / self.rank * (self.lora_B.weight.detach() @ self.lora_A.weight.detach())

    def merged_weight(self) -> torch.Tensor:
        """Compute the sum of weight and update, [out, in], rounded to the base's dtype."""
        update = self.update()
        weight = self.base_layer.weight.detach()
        # The sum is made in the adapter's precision and rounded once.
        return (weight.to(update.dtype) + update).to(weight.dtype)


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Put adapters on the target layers, in place, and freeze everything else. Returns the names of the
    layers.

    A is uniform within 1 / sqrt(in) (He et al. 2015, the initialisation of linear layers). It is drawn on the
    CPU from `seed` in the order of the layers, so that it does not depend on the device.

    Raises: ValueError for a target that does not exist or is no ordinary linear layer, and for a model that
        already has adapters.
    """
    # Duplicates are kept: a layer that two parts share can be named by either of its names.
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [n for n in modules if any(matches(n, t) for t in config.targets)]
    # Every target must match a layer; otherwise it is likely a misspelling.
    missing = [t for t in config.targets if not any(matches(n, t) for n in names)]
    if missing:
        available = (
            ", ".join(sorted({n.rpartition(".")[2] for n, m in modules.items() if _is_linear(m)})) or "none"
        )
        who = f"add_lora({type(model).__name__})"
        raise ValueError(
            f"{who}: no layer is named {', '.join(missing)}. The linear layers of this network are named"
            f" {available}. Choose targets among these."
        )
    layers = attach(model, names, config.rank, config.alpha, config.dropout)
    generator = torch.Generator().manual_seed(seed)
    # A shared layer appears under several names but has one adapter, so it is drawn once.
    for layer in dict.fromkeys(layers.values()):
        A = layer.lora_A.weight
        bound = 1 / math.sqrt(layer.base_layer.in_features)
        # Drawn in float32 on the CPU and then copied, so devices and dtypes do not matter.
        with torch.no_grad():
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
    return names


def attach(
    model: nn.Module, names: Iterable[str], rank: int, alpha: float, dropout: float = 0.0
) -> dict[str, LoraLinear]:
    """Wrap the named linear layers with zero adapters, in place, and freeze everything else.

    Returns: the wrapped layers by name.
    Raises: ValueError for a network that already has adapters, and for layers that are not linear.
    """
    if adapted_layers(model):
        raise ValueError(
            f"add_lora: cannot add adapters to a network that already has {len(adapted_layers(model))}. Merge"
            " them first (merged_state)."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(names)
    unsuitable = [f"{n} ({type(modules[n]).__name__})" for n in names if not _is_linear(modules[n])]
    if unsuitable:
        raise ValueError(
            f"add_lora: expected linear layers on ordinary tensors, got {', '.join(unsuitable[:4])}. Choose"
            " other targets."
        )
    model.requires_grad_(False)
    wrapped: dict[nn.Module, LoraLinear] = {}  # a layer that is used under two names keeps one adapter
    for name in names:
        if modules[name] not in wrapped:
            # The wrapper inherits the mode: a network in training mode gets adapters with dropout.
            wrapped[modules[name]] = LoraLinear(modules[name], rank, alpha, dropout).train(
                modules[name].training
            )
        owner, _, attribute = name.rpartition(".")
        setattr(modules[owner], attribute, wrapped[modules[name]])
    return {name: wrapped[modules[name]] for name in names}


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module computes W x + b of tensors.

    Subclasses of nn.Linear with another `forward` may take other inputs and do not count.
    """
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, Linear.forward)


def matches(name: str, target: str) -> bool:
    """Return whether a layer's name equals the target or ends in it, compared by whole parts between dots."""
    return name == target or name.endswith(f".{target}")


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers that have adapters, by the names that the layers had before."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all adapters, each once, in the order of the layers."""
    return [
        p
        # A layer that is used under two names counts once.
        for layer in dict.fromkeys(adapted_layers(model).values())
        for p in (layer.lora_A.weight, layer.lora_B.weight)
    ]


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of all adapters by name, such as blocks.0.attn.to_q.lora_A.weight."""
    layers = adapted_layers(model).items()
    return {
        # Detached: the tensors are written to a file
        f"{name}.{part}.weight": getattr(layer, part).weight.detach()
        for name, layer in layers
        for part in ("lora_A", "lora_B")
    }


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Switch all adapters off inside the block: the network then computes bitwise what its base does.

    Blocks may be nested. No backward pass may run inside one.

    Raises: ValueError for a network without adapters.
    """
    layers = adapted_layers(model).values()
    if not layers:
        raise ValueError(
            "adapters_off: expected a network with adapters, got one without. Call add_lora first."
        )
    # The former states are restored, not simply switched on, so that blocks may be nested.
    before = [(layer, layer.active) for layer in layers]
    try:
        for layer in layers:
            layer.active = False
        yield model
    finally:
        for layer, active in before:
            layer.active = active


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict in which the adapters are merged into the weights.

    Names, dtypes and order are those of the base.
    """
    layers = adapted_layers(model)
    state = {}
    for key, value in model.state_dict().items():
        # "X.base_layer.weight" is owner "X.base_layer" and leaf "weight"; the owner is stem "X" and part
        # "base_layer".
        owner, _, leaf = key.rpartition(".")
        stem, _, part = owner.rpartition(".")
        if part == BASE[1:] and stem in layers:
            state[f"{stem}.{leaf}"] = layers[stem].merged_weight() if leaf == "weight" else value
        # The adapters' own entries are dropped, all others pass unchanged.
        elif not (part in ("lora_A", "lora_B") and stem in layers):
            state[key] = value
    return state


def merge_rounding(model: nn.Module) -> float:
    """Compute the share of the update that is lost when weights are rounded to the base's dtype.

    It is the norm of the rounding error over the norm of the update, near 0 for a float32 base. Training that
    moved float16 weights little may lose much of its effect: keep the adapter then, and do not merge.
    """
    lost = size = 0.0
    for layer in dict.fromkeys(adapted_layers(model).values()):
        # In float64, so that the measurement adds no rounding of its own.
        update = layer.update().double()
        weight = layer.base_layer.weight.detach().double()
        lost += float((layer.merged_weight().double() - weight - update).square().sum())
        size += float(update.square().sum())
    # Without any update nothing is lost.
    return math.sqrt(lost / size) if size else 0.0

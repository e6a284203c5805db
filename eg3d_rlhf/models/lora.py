"""Low-rank adapters (LoRA) on named linear layers.

The base is the network before adapters are added. Its weights stay unchanged. The same network with its
adapters switched off is the reference model.

    y = W x + b + (alpha / rank) B A dropout(x)        Hu et al. 2021, LoRA, equation 3

x is the input and y the output of the layer, W its weight [out, in] and b its bias [out]. The adapter
consists of A [rank, in], which is random at the start, and B [out, rank], which is zero at the start. An
untrained adapter therefore changes nothing. Parameters have the names of the library PEFT without the name of
an adapter: X.base_layer.weight, X.lora_A.weight and X.lora_B.weight for a layer X.
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

BASE = ".base_layer"  # what PEFT appends to the name of a layer that has an adapter


class _Adapted(torch.autograd.Function):
    """Autograd function that computes W x + b + scale B A x with a frozen W and b."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        # Only the input and the low-rank product are stored for the backward pass, but neither y nor W x.
        low_rank_product = product(x, a)  # [..., rank]
        ctx.save_for_backward(x, low_rank_product, weight, a, b)
        ctx.scale = scale
        y = product(x, weight, bias)
        # In place, so that no second tensor of the output's size exists. [rows, rank] x [rank, out]
        y.view(-1, len(b)).addmm_(low_rank_product.flatten(0, -2), b.t(), alpha=scale)
        return y

    @staticmethod
    @once("LoraLinear")
    def backward(ctx, grad):
        x, low_rank_product, weight, a, b = ctx.saved_tensors
        # All leading axes are rows: [..., out] -> [rows, out].
        grad_rows = grad.flatten(0, -2)
        grad_x = None
        grad_low_rank = ctx.scale * product(
            grad_rows, b.t()
        )  # gradient of the low-rank product, [rows, rank]
        if ctx.needs_input_grad[0]:
            # dL/dx = W^T g + A^T (scale B^T g), summed in place
            grad_x = product(grad_rows, weight.t()).addmm_(grad_low_rank, a).view_as(x)
        # dL/dA = (scale B^T g)^T x and dL/dB = scale g^T (A x)
        grad_a = product(grad_low_rank.t(), x.flatten(0, -2).t())
        grad_b = ctx.scale * product(grad_rows.t(), low_rank_product.flatten(0, -2).t())
        # W, b and the scale get no gradient: the base is frozen.
        return grad_x, None, None, grad_a, grad_b, None


class LoraLinear(nn.Module):
    """Frozen linear layer with an adapter, [..., in] -> [..., out].

    The adapter computes in float32 even if the base layer is in half precision: small updates would otherwise
    be lost by rounding. Both matrices of a new adapter are zero; `add_lora` gives A its random values.

    Args:
        base_layer: linear layer.
        rank: rank of the adapter.
        alpha: scale of the adapter; its update is multiplied by alpha / rank.
        dropout: share of the adapter's inputs that is set to zero during training, 0..1.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        weight = base_layer.weight
        # The adapter is on the device of the base layer. Half precision is promoted to float32.
        tensor_options = {
            "bias": False,
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        self.base_layer = base_layer
        # skip_init does not use torch's global random generator. Random numbers after this point are
        # therefore the same with and without adapters.
        self.lora_A = nn.utils.skip_init(nn.Linear, base_layer.in_features, rank, **tensor_options)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base_layer.out_features, **tensor_options)
        nn.init.zeros_(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        # A file of adapters states one value of each of these settings for all layers.
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.active = True  # False: the adapter is switched off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, [..., in] -> [..., out].

        With the adapter switched off, the result is bitwise that of the base layer.
        """
        base_layer = self.base_layer
        scale = self.alpha / self.rank
        if self.active and fits(x, base_layer.weight) and not (self.dropout and self.training):
            # The fused function has no dropout, and its base layer must
            # be float32 on a CPU with oneDNN (`fits`).
            return _Adapted.apply(
                x, base_layer.weight, base_layer.bias, self.lora_A.weight, self.lora_B.weight, scale
            )
        y = base_layer(x)
        if not self.active:
            return y
        # The product of the adapter is computed in the adapter's precision and then rounded to that of y.
        x = x.to(self.lora_A.weight.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return y + (scale * self.lora_B(self.lora_A(x))).to(y.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight of the base layer, for networks that read its dtype or shape.

        A computation with this weight does not include the adapter.
        """
        return self.base_layer.weight

    def update(self) -> torch.Tensor:
        """Compute the matrix [out, in] that the adapter adds to the weight, in the dtype of the adapter."""
        # [out, rank] x [rank, in] -> [out, in]
        return self.alpha / self.rank * (self.lora_B.weight.detach() @ self.lora_A.weight.detach())

    def merged_weight(self) -> torch.Tensor:
        """Compute the sum of the weight and the update, [out, in], in the dtype of the base layer."""
        update = self.update()
        weight = self.base_layer.weight.detach()
        # The sum is computed in the precision of the adapter and rounded once.
        return (weight.to(update.dtype) + update).to(weight.dtype)


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Add adapters to the target layers of a network, in place, and freeze all other parameters.

    A is uniform in -1 / sqrt(in) .. 1 / sqrt(in), as torch initialises linear layers. It is sampled on the
    CPU in the order of the layers, so that it does not depend on the device.

    Args:
        model: network without adapters.
        config: targets, rank, alpha and dropout.
        seed: random seed of A.

    Returns: the names of the layers that have adapters now.
    Raises: ValueError for a target that does not exist or is not an ordinary linear layer, and for a network
        that already has adapters.
    """
    # Duplicates are included: a layer that occurs in two places has two names, and a target may match either.
    modules_by_name = dict(model.named_modules(remove_duplicate=False))
    layer_names = [
        layer_name
        for layer_name in modules_by_name
        if any(matches(layer_name, target) for target in config.targets)
    ]
    # Every target must match a layer. A target without a match is probably misspelt.
    unmatched_targets = [
        target
        for target in config.targets
        if not any(matches(layer_name, target) for layer_name in layer_names)
    ]
    if unmatched_targets:
        linear_names = sorted(
            {
                layer_name.rpartition(".")[2]
                for layer_name, candidate_layer in modules_by_name.items()
                if _is_linear(candidate_layer)
            }
        )
        raise ValueError(
            f"add_lora({type(model).__name__}): no layer is named {', '.join(unmatched_targets)}. The linear"
            f" layers of this network are named {', '.join(linear_names) or 'none'}. Choose targets among"
            " these."
        )
    layers = attach(model, layer_names, config.rank, config.alpha, config.dropout)
    generator = torch.Generator().manual_seed(seed)
    # A shared layer has several names but one adapter.
    # dict.fromkeys keeps the first occurrence of each layer.
    for layer in dict.fromkeys(layers.values()):
        A = layer.lora_A.weight
        bound = 1 / math.sqrt(layer.base_layer.in_features)
        # Sampled in float32 on the CPU and then copied, so that the values do not depend on device and dtype.
        with torch.no_grad():
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
    return layer_names


def attach(
    model: nn.Module, layer_names: Iterable[str], rank: int, alpha: float, dropout: float = 0.0
) -> dict[str, LoraLinear]:
    """Add adapters whose matrices are zero to the named linear layers, in place, and freeze the base.

    Args:
        model: network without adapters.
        layer_names: names of the layers in the network.
        rank: rank of the adapters.
        alpha: scale of the adapters, see `LoraLinear`.
        dropout: share of the adapters' inputs that is set to zero during training, 0..1.

    Returns: the layers with adapters, by name.
    Raises: ValueError for a network that already has adapters, and for layers that are not ordinary linear
        layers.
    """
    if adapted_layers(model):
        raise ValueError(
            f"add_lora: the network already has {len(adapted_layers(model))} adapters, and"
            " add_lora cannot add others. Merge them first, with merged_state."
        )
    modules_by_name = dict(model.named_modules(remove_duplicate=False))
    layer_names = list(layer_names)
    unsuitable_layers = [
        f"{layer_name} ({type(modules_by_name[layer_name]).__name__})"
        for layer_name in layer_names
        if not _is_linear(modules_by_name[layer_name])
    ]
    if unsuitable_layers:
        raise ValueError(
            "add_lora: adapters need ordinary linear layers, but these targets are others:"
            f" {', '.join(unsuitable_layers[:4])}. Choose other targets."
        )
    model.requires_grad_(False)
    adapted_by_base: dict[
        nn.Module, LoraLinear
    ] = {}  # by the base layer: a layer with two names gets one adapter
    for layer_name in layer_names:
        if modules_by_name[layer_name] not in adapted_by_base:
            # The new layer has the mode of the base layer: dropout is active only in training mode.
            adapted_by_base[modules_by_name[layer_name]] = LoraLinear(
                modules_by_name[layer_name], rank, alpha, dropout
            ).train(modules_by_name[layer_name].training)
        parent_name, _, attribute_name = layer_name.rpartition(".")
        setattr(modules_by_name[parent_name], attribute_name, adapted_by_base[modules_by_name[layer_name]])
    return {layer_name: adapted_by_base[modules_by_name[layer_name]] for layer_name in layer_names}


def _is_linear(layer: nn.Module) -> bool:
    """Return True if a module is a linear layer that computes W x + b of a tensor.

    For a subclass of nn.Linear with another `forward`, which may take other inputs, the result is False.
    """
    return isinstance(layer, nn.Linear) and type(layer).forward in (nn.Linear.forward, Linear.forward)


def matches(name: str, target: str) -> bool:
    """Return True if a layer's name is the target or ends with it.

    Only complete parts between dots are compared: "attn.to_q" matches the target "to_q", but "auto_q" does
    not.

    Args:
        name: name of a layer in the network.
        target: complete name of a layer, or its last parts.
    """
    return name == target or name.endswith(f".{target}")


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers that have adapters, by the names of their base layers in the base network."""
    return {
        layer_name: layer
        for layer_name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LoraLinear)
    }


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all adapters in the order of the layers: A and B of each layer, each once."""
    parameters: list[nn.Parameter] = []
    # dict.fromkeys keeps one occurrence of a layer that has two names.
    for layer in dict.fromkeys(adapted_layers(model).values()):
        parameters += [layer.lora_A.weight, layer.lora_B.weight]
    return parameters


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of all adapters by name, such as blocks.0.attn.to_q.lora_A.weight.

    The tensors share memory with the parameters and have no gradient.
    """
    adapter_tensors = {}
    for layer_name, layer in adapted_layers(model).items():
        adapter_tensors[f"{layer_name}.lora_A.weight"] = layer.lora_A.weight.detach()
        adapter_tensors[f"{layer_name}.lora_B.weight"] = layer.lora_B.weight.detach()
    return adapter_tensors


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Switch all adapters off inside a `with` block.

    Inside the block the network computes bitwise the same as its base. Blocks may be nested. A backward pass
    must not run inside the block.

    Raises: ValueError for a network without adapters.
    """
    layers = adapted_layers(model).values()
    if not layers:
        raise ValueError(
            f"adapters_off: the {type(model).__name__} has no adapters. Add them with add_lora first."
        )
    # In a nested block the adapters are off already and must stay off at its end.
    earlier_activity = [(layer, layer.active) for layer in layers]
    try:
        for layer in layers:
            layer.active = False
        yield model
    finally:
        for layer, was_active in earlier_activity:
            layer.active = was_active


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of the base network with the updates of the adapters added to its weights.

    Names, dtypes and order are those of the base network.
    """
    layers = adapted_layers(model)
    merged_tensors = {}
    for state_key, tensor in model.state_dict().items():
        # Keys of a layer X with an adapter are X.base_layer.weight, X.lora_A.weight and so on. They are
        # divided into the name of the layer, the part (base_layer, lora_A or lora_B) and the parameter.
        module_name, _, parameter_name = state_key.rpartition(".")
        layer_name, _, layer_part = module_name.rpartition(".")
        if layer_part == BASE[1:] and layer_name in layers:  # [1:] drops the dot
            merged_tensor = layers[layer_name].merged_weight() if parameter_name == "weight" else tensor
            merged_tensors[f"{layer_name}.{parameter_name}"] = merged_tensor
        # The matrices of the adapters are dropped. All other entries are unchanged.
        elif not (layer_part in ("lora_A", "lora_B") and layer_name in layers):
            merged_tensors[state_key] = tensor
    return merged_tensors


def merge_rounding(model: nn.Module) -> float:
    """Compute the share of the adapters' update that is lost when merged weights are rounded.

    The share is the norm of the rounding error over the norm of the update, for all layers together. It is
    near 0 for a float32 base. If small updates are merged into float16 weights, much of the effect of the
    training may be lost; store the adapter in this case, and do not merge it. The share is 0 without any
    update.
    """
    squared_error = 0.0
    squared_update = 0.0
    for layer in dict.fromkeys(adapted_layers(model).values()):
        # In float64, so that the measurement adds no rounding of its own.
        update = layer.update().double()
        weight = layer.base_layer.weight.detach().double()
        squared_error += float((layer.merged_weight().double() - weight - update).square().sum())
        squared_update += float(update.square().sum())
    return math.sqrt(squared_error / squared_update) if squared_update else 0.0

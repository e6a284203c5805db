"""Steering: a move of latents along a direction that is part of a generator's mapping network.

A sample whose coordinate along the direction is smaller than a threshold, the strength t, is moved to it;
other samples stay bitwise as they were. In the space "z", a latent z is scaled to the length sqrt(Z), its
component along the unit vector d is replaced by t, and the rest is scaled so that the length is kept:
z' = sqrt(Z - t^2) (z - a d) / |z - a d| + t d with a = z . d. In the space "w", a style vector w is shifted
by max(0, t - a) s d, where a = (w - m) . d / s is its standardised coordinate; m and s are the mean and the
standard deviation of w along d over random latents.

The moves are those of InterFaceGAN (Shen et al. 2019, arXiv 1907.10786), restricted to the samples that need
them. A network file states a steering in its header (`describe`) and holds the vectors as tensors.

Shapes: N samples, Z = z_dim, L style vectors of a sample, W = w_dim.
"""

import math
from typing import Any

import torch

SPACES = ("z", "w")
ATTRIBUTE = "steering"  # name of the submodule in a network, and of the entry in the header of a network file


class Steering(torch.nn.Module):
    """Move of latents along one direction, in the space z or w.

    Args:
        space: "z" or "w".
        size: number of entries of the direction: z_dim or w_dim.
        strength: threshold t, in standard deviations of the coordinate along the direction.
        layers: space w: number of first style vectors that are moved; None: all.
    Raises: ValueError for an unknown space, or a strength that is not finite or too large for the space z.
    """

    direction: torch.Tensor  # unit vector d, [Z] or [W]
    mean: torch.Tensor  # space w: mean m of the style vectors, [W]; space z: zeros [Z]
    std: torch.Tensor  # space w: standard deviation s along d, a scalar; space z: 1
    # Strength, and number of moved layers (-1: all). They are buffers only so that the hash of a network's
    # state changes with them; `strength` and `layers` hold the same values.
    threshold: torch.Tensor
    layer_count: torch.Tensor

    def __init__(self, space: str, size: int, strength: float = 1.0, layers: int | None = None):
        super().__init__()
        if space not in SPACES:
            raise ValueError(f"steering: expected the space z or w, got {space!r}.")
        if not math.isfinite(strength) or (space == "z" and strength**2 >= size):
            raise ValueError(
                f"steering: expected a finite strength below {math.sqrt(size):.3g}, the length of a latent,"
                f" got {strength}."
            )
        if layers is not None and (space == "z" or layers < 1):
            raise ValueError("steering: layers applies to the space w only, and must be at least 1.")
        self.space = space
        self.strength = float(strength)
        self.layers = layers
        self.register_buffer("direction", torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("threshold", torch.tensor(self.strength))
        self.register_buffer("layer_count", torch.tensor(-1 if layers is None else layers))

    def describe(self) -> dict[str, Any]:
        """Return the constructor arguments as JSON values, for the header of a network file."""
        return {
            "space": self.space,
            "size": len(self.direction),
            "strength": self.strength,
            "layers": self.layers,
        }

    def set_direction(
        self, direction: torch.Tensor, mean: torch.Tensor | None = None, std: float = 1.0
    ) -> "Steering":
        """Set the direction, which is scaled to length 1, and in the space w its statistics.

        Args:
            direction: vector of any length but 0, [Z] or [W].
            mean: mean of the style vectors, [W]; None: zeros.
            std: standard deviation of style vectors along the unit direction.
        Returns: the object itself.
        Raises: ValueError for a direction of length 0 or with values that are not finite.
        """
        length = float(direction.double().norm())
        if not (math.isfinite(length) and length > 0):
            raise ValueError("steering: expected a direction of finite length above 0.")
        self.direction.copy_((direction.double() / length).float())
        if mean is not None:
            self.mean.copy_(mean)
        self.std.fill_(std)
        return self

    def coordinates(self, latents: torch.Tensor) -> torch.Tensor:
        """Compute the standardised coordinates along the direction: z [N, Z] -> [N], ws [N, L, W] -> [N, L].

        Latents z are scaled to the length sqrt(Z) first.
        """
        if self.space == "z":
            return _normalised(latents) @ self.direction.to(latents)
        mean = self.mean.to(latents)
        return (latents - mean) @ self.direction.to(latents) / self.std.to(latents)

    def move_z(self, z: torch.Tensor) -> torch.Tensor:
        """Move latents [N, Z]; in the space w, return them unchanged. Differentiable in z."""
        if self.space == "w":
            return z
        d = self.direction.to(z)
        scaled_z = _normalised(z)
        coordinates = (scaled_z @ d)[:, None]  # a, [N, 1]
        rest = scaled_z - coordinates * d  # component perpendicular to d, [N, Z]
        rest = rest / rest.norm(dim=1, keepdim=True).clamp_min(1e-12)
        moved_z = math.sqrt(z.shape[1] - self.strength**2) * rest + self.strength * d
        # `where` keeps samples beyond the threshold bitwise, without the scaling above.
        return torch.where(coordinates < self.strength, moved_z, z)

    def move_ws(self, ws: torch.Tensor) -> torch.Tensor:
        """Move style vectors [N, L, W]; in the space z, return them unchanged. Differentiable in ws.

        The style vectors may come from anywhere, for example from an inverted photograph. Each style vector
        is moved by its own coordinate, because truncation may treat layers differently.
        """
        if self.space == "z":
            return ws
        coordinates = self.coordinates(ws)  # [N, L]
        steps = (self.strength - coordinates).clamp_min(0) * self.std.to(ws)
        if self.layers is not None:
            is_moved = torch.arange(ws.shape[1], device=ws.device) < self.layers
            steps = steps * is_moved
        # Adding a step of 0 keeps a style vector bitwise.
        return ws + steps[..., None] * self.direction.to(ws)


def _normalised(z: torch.Tensor) -> torch.Tensor:
    """Scale latents [N, Z] to the length sqrt(Z)."""
    return z * (math.sqrt(z.shape[1]) / z.norm(dim=1, keepdim=True).clamp_min(1e-12))


class _SteeredMapping:
    """Mixin before a network's class whose `mapping` moves the latents by the submodule `steering`."""

    def mapping(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map latents to style vectors, see the `mapping` of the network's class, and move them."""
        steering = getattr(self, ATTRIBUTE)
        # Truncation is a part of the network's own mapping, so style vectors are moved after it.
        return steering.move_ws(super().mapping(steering.move_z(z), *args, **kwargs))  # type: ignore[misc]


# Subclasses with a steered mapping, by the class of the network. Two networks of one class get one subclass.
_steered_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def _steered_class(network_class: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return a subclass of a network's class with a steered mapping. It has the same name."""
    if network_class not in _steered_classes:
        _steered_classes[network_class] = type(
            network_class.__name__,
            (_SteeredMapping, network_class),
            {"__module__": network_class.__module__},
        )
    return _steered_classes[network_class]


def steering_of(network: torch.nn.Module) -> Steering | None:
    """Return the steering of a network, or None if it is not steered."""
    return getattr(network, ATTRIBUTE, None)


def attach(network: torch.nn.Module, steering: Steering) -> torch.nn.Module:
    """Make a steering a part of a network's mapping, in place. An earlier steering is replaced.

    The class of the object becomes a subclass of its class, so that a family that recognises its networks by
    their class still does.

    Args:
        network: generator with a method `mapping(z, c, ...)` that returns style vectors.
        steering: the steering; it becomes a submodule, and so a part of the state dict.
    Returns: the network.
    Raises: ValueError if the network has no such method.
    """
    if not callable(getattr(network, "mapping", None)):
        raise ValueError(
            f"steering: a network of the class {type(network).__name__} has no method `mapping`, so its"
            " latents cannot be moved. Choose among its samples by a reward instead (eg3d-rlhf reward"
            " best-of-n)."
        )
    if not isinstance(network, _SteeredMapping):
        network.__class__ = _steered_class(type(network))
    setattr(network, ATTRIBUTE, steering.to(next(network.parameters()).device))
    return network


def detach(network: torch.nn.Module) -> torch.nn.Module:
    """Remove the steering of a network, in place, and return the network."""
    if isinstance(network, _SteeredMapping):
        delattr(network, ATTRIBUTE)
        network.__class__ = type(network).__mro__[2]
    return network

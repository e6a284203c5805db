"""CurveNet's curves: where they begin, how they walk from neighbour to neighbour, and how points read them.

Letters: N clouds, C channels, P points, K neighbours, Q curves, T steps.
"""

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.rewards.points.arch import leaky, norm
from eg3d_rlhf.rewards.points.neighbours import take

_EPS = 1e-8  # least product of norms in a cosine


class Walk(nn.Module):
    """Step by step to one neighbour: a hard choice forward, the gradient of its softmax backward."""

    def __init__(self, channels: int, steps: int, mix: str, kind: str):
        super().__init__()
        self.steps, self.mix = steps, mix
        self.agent_mlp = nn.Sequential(nn.Conv2d(2 * channels, 1, 1, bias=False), norm(kind, 1, 2))
        self.momentum_mlp = nn.Sequential(nn.Conv1d(2 * channels, 2, 1, bias=False), norm(kind, 2))

    def _mixed(self, current: torch.Tensor, descriptor: torch.Tensor) -> torch.Tensor:
        """The curve's descriptor after a step, of [N, C, Q] each: a mixture with where it stands."""
        weights = F.softmax(self.momentum_mlp(torch.cat([current, descriptor], dim=1)), dim=1)  # [N, 2, Q]
        if self.mix == "reshaped":  # as published: curve i reads the flat entries 2i and 2i + 1, of other curves
            weights = weights.reshape(len(weights), -1, 2).transpose(1, 2)
        return weights[:, :1] * current + weights[:, 1:] * descriptor

    def forward(self, x: torch.Tensor, index: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Features [N, C, P], neighbours without oneself [N, P, K], first points [N, Q] -> features along the curves [N, C, Q, T]."""
        place, current = start, take(x, start)  # [N, Q], [N, C, Q]
        descriptor, curve = current, []
        for step in range(self.steps):
            if step:
                descriptor = self._mixed(current, descriptor)
            choices = index.gather(1, place[..., None].expand(-1, -1, index.shape[2]))  # [N, Q, K]
            near = take(x, choices)  # [N, C, Q, K]
            logits = self.agent_mlp(torch.cat([near, descriptor[..., None].expand_as(near)], dim=1)).squeeze(1)  # [N, Q, K]
            if step:
                logits = logits * onward(current - descriptor, near - current[..., None])
            soft = F.softmax(logits, dim=2)
            best = logits.argmax(dim=2, keepdim=True)  # [N, Q, 1]
            hard = torch.zeros_like(soft).scatter(2, best, 1.0) - soft.detach() + soft
            current = (near * hard[:, None]).sum(dim=3)
            place = choices.gather(2, best).squeeze(2)
            curve.append(current)
        return torch.stack(curve, dim=3)


@torch.no_grad()
def onward(direction: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Factors in 0..1 that keep curves from turning back: 1 + cosine of the last step [N, C, Q] and the next [N, C, Q, K], [N, Q, K]."""
    dot = (direction[..., None] * steps).sum(dim=1)
    return (1 + dot / (direction.norm(dim=1)[..., None] * steps.norm(dim=1)).clamp_min(_EPS)).clamp(0, 1)


class CurveGrouping(nn.Module):
    """Curves that begin at the points of largest attention."""

    def __init__(self, channels: int, curves: int, steps: int, mix: str, kind: str):
        super().__init__()
        self.curves = curves
        self.att = nn.Conv1d(channels, 1, 1, bias=False)
        self.walk = Walk(channels, steps, mix, kind)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Features [N, C, P], neighbours without oneself [N, P, K] -> [N, C, Q, T].

        With the published mix the order of the first points matters, and it is whatever topk leaves unsorted.
        """
        attention = torch.sigmoid(self.att(x))  # [N, 1, P]
        start = attention.squeeze(1).topk(min(self.curves, x.shape[2]), dim=1, sorted=False).indices
        return self.walk(x * attention, index, start)


class CurveAggregation(nn.Module):
    """Every point reads the curves by dot-product attention: their means over steps, and their means over curves."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        half = channels // 2
        self.conva, self.convb, self.convc = (nn.Conv1d(channels, half, 1, bias=False) for _ in range(3))
        self.convn, self.convl = (nn.Conv1d(half, half, 1, bias=False) for _ in range(2))
        self.convd = nn.Sequential(nn.Conv1d(2 * half, channels, 1, bias=False), norm(kind, channels))
        self.line_conv_att = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: torch.Tensor, curves: torch.Tensor) -> torch.Tensor:
        """Features [N, C, P], curves [N, C, Q, T] -> [N, C, P]."""
        attention = self.line_conv_att(curves)  # [N, 1, Q, T]
        each = self.conva((curves * F.softmax(attention, dim=3)).sum(dim=3))  # [N, C/2, Q]
        across = self.convb((curves * F.softmax(attention, dim=2)).sum(dim=2))  # [N, C/2, T]
        query = self.convc(x).transpose(1, 2)  # [N, P, C/2]
        read = [
            self_values(keys).matmul(F.softmax(query @ keys, dim=2).transpose(1, 2))  # [N, C/2, P]
            for keys, self_values in ((each, self.convn), (across, self.convl))
        ]
        return leaky(x + self.convd(torch.cat(read, dim=1)))

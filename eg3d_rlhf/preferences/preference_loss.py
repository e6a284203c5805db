"""The one preference loss: of a per-pair margin, whether that is a difference of rewards or of flow-matching errors.

    reward model    delta = r_preferred - r_rejected                                                   Bradley and Terry (1952)
    flow            delta = (e_ref - e)_preferred - (e_ref - e)_rejected, e the flow-matching errors    Circular-DPO, equation 6

Shape letter: P pairs.
"""

import math

import torch
import torch.nn.functional as F

KINDS = ("sigmoid", "hinge", "ipo", "robust")
WEIGHT_MODES = ("inside", "outside")
AGGREGATIONS = ("mean", "drdpo")


def preference_loss(
    delta: torch.Tensor, kind: str = "sigmoid", beta: float = 1.0, *, weight: torch.Tensor | None = None, weight_mode: str = "inside",
    label_smoothing: float = 0.0, margin: float = 0.0,
) -> torch.Tensor:
    """Loss of each pair's margin, unreduced.

    With z = beta delta - margin, or beta weight delta - margin where the weight is inside:
        sigmoid   -(1 - e) log sigmoid(z) - e log sigmoid(-z), e the label smoothing (Rafailov et al. 2023, equation 7; e > 0: cDPO)
        robust    [-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2 e), unbiased when a share e of the labels is turned over
                  (Chowdhury, Kini and Natarajan 2024, equation 8)
        hinge     max(0, 1 - z) (Liu et al. 2023)
        ipo       (delta - 1 / (2 beta))^2, delta weighted where the weight is inside (Azar et al. 2023, equation 17)
    A weight outside multiplies the loss.

    Args:
        delta: [P], positive where the preferred one is ahead; beta: > 0, per unit of delta.
        weight: [P] or None; weight_mode: "inside" rescales what is asked of a pair (Circular-DPO, equation 7), "outside" its gradient.
        label_smoothing: 0 to below 0.5, for sigmoid and robust; margin: subtracted from z, for sigmoid, robust and hinge.
    Returns: [P]. Differentiable in: delta, weight.
    Raises: ValueError for an unknown kind or mode, or numbers that do not fit the kind.
    """
    check_options("preference_loss", kind, beta, weight_mode, label_smoothing, margin)
    if weight is not None and weight.shape != delta.shape:
        got = f"{list(delta.shape)}, got {list(weight.shape)}"
        raise ValueError(f"preference_loss: expected a weight per pair, {got}. Give one each.")
    inside = weight is not None and weight_mode == "inside"
    scaled = weight * delta if weight is not None and inside else delta
    z = beta * scaled - margin if margin else beta * scaled
    if kind == "ipo":
        loss = (scaled - 1 / (2 * beta)).square()
    elif kind == "hinge":
        loss = F.relu(1 - z)
    elif label_smoothing == 0:
        loss = F.softplus(-z)
    else:
        sign = -1 if kind == "robust" else 1
        loss = (1 - label_smoothing) * F.softplus(-z) + sign * label_smoothing * F.softplus(z)
        loss = loss / (1 - 2 * label_smoothing) if kind == "robust" else loss
    return loss if weight is None or inside else weight * loss


def aggregate(losses: torch.Tensor, kind: str = "mean", beta: float = 1.0) -> torch.Tensor:
    """One number from the losses of a batch, [P] -> [].

    "mean"; or "drdpo": -beta log mean exp(-loss / beta), which listens less to pairs that the policy finds hard, as wrong labels are
    (Wu et al. 2024, Dr. DPO, equation 10); beta -> infinity is the mean.
    """
    check_aggregation("aggregate", kind, beta)
    if kind == "mean":
        return losses.mean()
    return -beta * (torch.logsumexp(-losses / beta, 0) - math.log(len(losses)))


def check_aggregation(who: str, kind: str, beta: float) -> None:
    """Raise ValueError, in the name of `who`, for arguments that `aggregate` cannot use."""
    if kind not in AGGREGATIONS or not (math.isfinite(beta) and beta > 0):
        got = f"{kind!r} and {beta}"
        raise ValueError(f"{who}: expected one of {', '.join(AGGREGATIONS)} and beta > 0, got {got}. Correct them.")


def check_options(who: str, kind: str, beta: float, weight_mode: str, label_smoothing: float, margin: float) -> None:
    """Raise ValueError, in the name of `who`, for options that `preference_loss` cannot use together."""
    if kind not in KINDS:
        raise ValueError(f"{who}: expected kind one of {', '.join(KINDS)}, got {kind!r}. Choose one.")
    if weight_mode not in WEIGHT_MODES:
        raise ValueError(f"{who}: expected weight_mode one of {', '.join(WEIGHT_MODES)}, got {weight_mode!r}. Choose one.")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"{who}: expected beta > 0, got {beta}. Set it.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{who}: expected label_smoothing from 0 to below 0.5, got {label_smoothing}. Lower it.")
    if label_smoothing and kind not in ("sigmoid", "robust"):
        raise ValueError(f"{who}: expected label_smoothing 0 with {kind}, got {label_smoothing}. Use sigmoid or robust.")
    if not math.isfinite(margin):
        raise ValueError(f"{who}: expected a finite margin, got {margin}. Set it.")
    if margin and kind == "ipo":
        raise ValueError(f"{who}: expected margin 0 with ipo, got {margin}. Its margin is 1 / (2 beta).")

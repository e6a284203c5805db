"""AWM: GRPO's clip with a weighted flow-matching error in the place of a density's logarithm. It is
DiffusionNFT's first order without its bound, so no run here trains by it; it stands beside the others for
comparison.

With e = m((v - u)^2) at one time and noise, log p = -w(e); at v = v_old the gradient of the clipped loss is A
grad w(e).
"""

import torch

TINY = 1e-10
WEIGHTS = {  # of errors [N] at times t [N]
    "Uniform": lambda e, t: e,
    "t": lambda e, t: e * t,
    "t2": lambda e, t: e * t**2,
    "huber": lambda e, t: ((e + TINY).sqrt() - TINY**0.5) * t,
    "ghuber": lambda e, t: ((e + TINY) ** 0.25 - TINY**0.25) * t / 0.25,
}


def awm_log_p(errors: torch.Tensor, t: torch.Tensor, weight: str) -> torch.Tensor:
    """-w(e), [N], by the name of a weight. Differentiable in: errors."""
    return -WEIGHTS[weight](errors, t)

"""Random numbers of a whole batch where a process holds only some of its rows.

Accumulation rounds and ranks each see part of the batch. Inside `RowDraws` every random tensor whose first axis counts samples is drawn for
the whole batch, and the rows at hand are kept: the numbers that a sample meets depend on its place in the batch alone.
"""

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = {torch.rand, torch.randn}
_LIKE = {torch.rand_like, torch.randn_like}
_REFUSED = {
    torch.normal, torch.bernoulli, torch.randperm, torch.randint_like, torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_,
    torch.Tensor.random_, torch.Tensor.exponential_, torch.nn.functional.dropout2d, torch.nn.functional.dropout3d,
}


class RowDraws(TorchFunctionMode):
    """A with-statement inside which rand, randn, rand_like, randn_like and dropout give rows of the whole batch's draws.

    A tensor of first axis q * m, m = len(rows), holds q values of each sample in turn (rays), or, with `blocks`, q blocks of m samples.
    Scalars ([]) and first axes that m does not divide are drawn as they are, alike for all parts of the batch. A first axis that m divides
    by chance would be misread: draw per sample, or scalars.

    Args:
        rows: which samples of the batch are at hand; total: how many it has.

    >>> torch.manual_seed(0), torch.rand([4, 2])[1::2]  # equals the next line
    >>> with RowDraws(range(1, 4, 2), 4): torch.manual_seed(0), torch.rand([2, 2])
    """

    def __init__(self, rows, total: int, blocks: bool = False):
        super().__init__()
        self.rows, self.total, self.blocks = torch.as_tensor(list(rows)), total, blocks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _FACTORIES:
            size = kwargs.pop("size") if "size" in kwargs else args[0] if args and not isinstance(args[0], int) else args
            whole = self._whole(list(size))
            return func(list(size), **kwargs) if whole is None else self._keep(func(whole, **kwargs))
        if func in _LIKE:
            whole = self._whole(list(args[0].shape))
            return func(*args, **kwargs) if whole is None else self._keep(func(args[0].new_empty(whole), *args[1:], **kwargs))
        if func is torch.nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.multinomial:
            return self._multinomial(*args, **kwargs)
        assert func not in _REFUSED, f"{func}: inside RowDraws draw with rand or randn"
        return func(*args, **kwargs)

    def _whole(self, size: list[int]) -> list[int] | None:
        m = len(self.rows)
        return [size[0] // m * self.total, *size[1:]] if size and size[0] and size[0] % m == 0 else None

    def _keep(self, drawn: torch.Tensor) -> torch.Tensor:
        rows, q = self.rows.to(drawn.device), drawn.shape[0] // self.total
        if self.blocks:
            return drawn.unflatten(0, (q, self.total))[:, rows].flatten(0, 1)
        return drawn.unflatten(0, (self.total, q))[rows].flatten(0, 1)

    def _dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        whole = self._whole(list(x.shape)) if training else None
        if whole is None:
            return torch.nn.functional.dropout(x, p, training, inplace)
        return x * self._keep(torch.nn.functional.dropout(torch.ones(whole, dtype=x.dtype, device=x.device), p))

    def _multinomial(self, odds: torch.Tensor, count: int, replacement: bool = False, **kwargs) -> torch.Tensor:
        whole = self._whole(list(odds.shape))
        assert whole is not None and bool((odds == odds[:1]).all()), "inside RowDraws multinomial needs the same odds for every sample"
        return self._keep(torch.multinomial(odds[:1].expand(whole), count, replacement, **kwargs))

"""Which implementation of a custom op a call gets."""


def check_impl(who: str, impl: str) -> None:
    """Refuse an unknown `impl`.

    "ref" is the reference in plain torch; "auto" takes the fastest one that works for the tensors at hand.

    Raises: ValueError for any other name.
    """
    if impl not in ("auto", "ref"):
        raise ValueError(f'{who}: expected impl to be "auto" or "ref", got {impl!r}. Use "auto" unless you compare implementations.')

"""A progress bar for work that goes through named stages."""

from tqdm import tqdm

_SCALED = 10_000  # totals from here on are shown with k and M


class StageBar:
    """A bar per stage, with time left; called with (stage, units done, units in all)."""

    def __init__(self, prefix: str = ""):
        self._prefix, self._stage, self._bar = prefix, None, None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar to `done` of `total`; another stage starts a bar of its own."""
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=f"{self._prefix}{stage}", unit_scale=total >= _SCALED)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the running bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "StageBar":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

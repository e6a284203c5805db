"""Progress bars for terminals and logs: a bar on a terminal, else one line when the work ends."""

import tqdm as library


class tqdm(library.tqdm):
    """Progress bar with the signature of the library's.

    In a log, a bar with leave=False leaves no line.
    """

    def _moves(self) -> bool:
        """Return whether the output is a terminal, on which a bar can be redrawn."""
        return bool(self.fp.isatty())

    def display(self, msg=None, pos=None):
        """Draw the bar if the output is a terminal."""
        return super().display(msg, pos) if self._moves() else True

    def close(self) -> None:
        """End the bar. In a log, write one line with what was done and how long it took."""
        if not self.disable and not self._moves():
            # `leave=None` is the library's default for nested bars: only the outermost one stays.
            if self.leave or self.leave is None and not self.pos:
                done = f"{self.n:g}" if self.total in (None, self.n) else f"{self.n:g} of {self.total:g}"
                elapsed = self.format_interval(self.format_dict["elapsed"])
                unit = "" if self.unit == "it" else f" {self.unit}" if self.n == 1 else f" {self.unit}s"
                self.fp.write(f"{self.desc or 'done'}: {done}{unit} in {elapsed}\n")
            self.sp = None  # the library's close() then writes nothing and only removes the bar from its list
        super().close()

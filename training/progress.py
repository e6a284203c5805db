"""Progress bars that know a log: on a terminal they move; elsewhere each leaves one line when it ends."""

import tqdm as library


class tqdm(library.tqdm):
    """The library's bar, whose signature it keeps. Nothing is left of one with leave=False outside a
    terminal.
    """

    def _moves(self) -> bool:
        return bool(self.fp.isatty())

    def display(self, msg=None, pos=None):
        """Draw the bar, on a terminal alone."""
        return super().display(msg, pos) if self._moves() else True

    def close(self) -> None:
        """End the bar; in a log, with what was done and how long it took."""
        if not self.disable and not self._moves():
            if self.leave or self.leave is None and not self.pos:
                done = f"{self.n:g}" if self.total in (None, self.n) else f"{self.n:g} of {self.total:g}"
                elapsed = self.format_interval(self.format_dict["elapsed"])
                unit = "" if self.unit == "it" else f" {self.unit}" if self.n == 1 else f" {self.unit}s"
                self.fp.write(f"{self.desc or 'done'}: {done}{unit} in {elapsed}\n")
            self.sp = None  # the library then only forgets the bar
        super().close()

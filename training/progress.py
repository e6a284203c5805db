"""Progress bars: a bar that is redrawn on a terminal, or one line at the end of the work in a log file."""

import tqdm as library


class tqdm(library.tqdm):
    """Progress bar with the signature of the class tqdm in the library of the same name.

    If the output is no terminal, a bar with leave=False writes nothing.
    """

    def _is_terminal(self) -> bool:
        """Return True if the output is a terminal, on which the bar can be redrawn."""
        return bool(self.fp.isatty())

    def display(self, msg=None, pos=None):
        """Draw the bar if the output is a terminal. See the library for arguments and result."""
        return super().display(msg, pos) if self._is_terminal() else True

    def close(self) -> None:
        """End the bar. If the output is no terminal, write one line with the number of units and the time."""
        if not self.disable and not self._is_terminal():
            # With leave=None, the library keeps only the outermost of nested bars, which has the position 0.
            if self.leave or self.leave is None and not self.pos:
                count_text = (
                    f"{self.n:g}" if self.total in (None, self.n) else f"{self.n:g} of {self.total:g}"
                )
                elapsed_text = self.format_interval(self.format_dict["elapsed"])
                # "it" (iterations) is the library's default unit, which carries no information here.
                unit_text = "" if self.unit == "it" else f" {self.unit}" if self.n == 1 else f" {self.unit}s"
                self.fp.write(f"{self.desc or 'done'}: {count_text}{unit_text} in {elapsed_text}\n")
            # Without `sp`, its function that prints, the library's close() only removes the bar from
            # its list.
            self.sp = None
        super().close()

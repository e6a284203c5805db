"""Signals: SIGTERM as an interrupt, and what was there before is put back."""

import os
import signal

import pytest

from eg3d_rlhf.experiments.process import sigterm_interrupts


def test_sigterm_interrupts_inside_alone():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before

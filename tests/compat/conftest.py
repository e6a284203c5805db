"""The exponentials of the machine that computed the references."""

import os
import subprocess
import sys

import pytest
import torch

from eg3d_rlhf.models.trellis import blocks

SCRIPT = (
    "from eg3d_rlhf.models.trellis import blocks as b; print(b.time_rates(b.TIME_FREQUENCIES // 2).tolist())"
)


@pytest.fixture(scope="session")
def rates_of_the_references() -> torch.Tensor:
    """Rates of time as MKL's plain code has them, which the references' machine ran.

    MKL chooses its exp by the processor: 3 of 128 rates differ by a unit in the last place on an Intel with
    AVX-512, and the cosines of times near 1000 by 3e-5.
    """
    plain = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"},
        check=True,
        capture_output=True,
        text=True,
    )
    rates = torch.tensor([float(word) for word in plain.stdout.strip().strip("[]").split(",")])
    torch.testing.assert_close(rates, blocks.time_rates(len(rates)), rtol=2e-7, atol=0)
    return rates


@pytest.fixture(autouse=True)
def as_the_references(request, monkeypatch):
    if request.module.__name__.rpartition(".")[2] in (
        "test_family_trellis2",
        "test_family_sam3d",
        "test_trellis",
    ):
        rates = request.getfixturevalue("rates_of_the_references")
        monkeypatch.setattr(blocks, "time_rates", lambda count: rates)

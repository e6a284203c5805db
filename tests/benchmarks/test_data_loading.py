"""`python -m benchmarks.data_loading`: every case runs, and workers neither cause waiting nor outlive it."""

import multiprocessing
import re
import time

import pytest
from click.testing import CliRunner

from benchmarks import data_loading as waiting
from training.dataset import ImageFolderDataset


def test_every_case_is_shown():
    flags = ["--seconds=0.02", "--iterations=2", "--batch=4", "--resolution=16", "--images=8", "--workers=2"]
    result = CliRunner().invoke(waiting.main, flags)
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert {"4", "16", "0.02"} <= set(re.findall(r"[\d.]*\d", head))
    assert [line.split()[:2] for line in lines] == [
        [name, count] for name in ("elsewhere", "here") for count in ("0", "2")
    ]
    # what is waited for, of an iteration, its share, and what the floats take
    assert all(re.search(r"\d\.\d\d ms\b.*\d\.\d{3} s\b.*\d\.\d{3}%.*\d ms", line) for line in lines)
    assert multiprocessing.active_children() == []


@pytest.mark.long
def test_training_waits_less_than_two_percent_of_an_iteration(tmp_path):
    waiting.write_images(tmp_path / "images.zip", 512, 64)
    dataset = ImageFolderDataset(tmp_path / "images.zip", use_labels=False).without_memory()
    alone, ahead = (waiting.measure(dataset, 32, workers, 4, lambda: time.sleep(2)) for workers in (0, 1))
    assert ahead.waited < 0.02 * ahead.iteration and alone.waited > 10 * ahead.waited

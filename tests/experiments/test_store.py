"""Artefacts: made once, found again, gone on with, and never confused."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from eg3d_rlhf.experiments.process import run_lock
from eg3d_rlhf.experiments.store import DONE, Store
from tests.rejections import raising


class Maker:
    """Writes a product and counts its calls."""

    def __init__(self, text: str = "product", fails: int = 0):
        self.text = text
        self.calls = 0
        self.fails = fails

    def __call__(self, folder):
        self.calls += 1
        seen = sorted(path.name for path in folder.iterdir())
        (folder / "begun").write_text("half")
        if self.calls <= self.fails:
            raise InterruptedError
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / "a.txt").write_text(self.text)
        return [folder / "out"], {"seen": seen}


def test_made_once_and_found_by_another_process(tmp_path):
    maker = Maker()
    first = Store(tmp_path).make("kind", {"x": 1, "y": [2]}, maker)
    again = Store(tmp_path).make("kind", {"y": [2], "x": 1}, maker)
    assert maker.calls == 1 and not first.reused and again.reused
    assert first.folder == again.folder and first.content == again.content and again.record == first.record
    assert first.folder.name.startswith("kind-")


def test_folders_named_by_their_kind_refuse_other_inputs(tmp_path):
    assert Store(tmp_path, hashed=False).make("kind", {"x": 1}, Maker()).folder == tmp_path / "kind"
    with raising(str(tmp_path / "kind"), "inputs"):
        Store(tmp_path, hashed=False).make("kind", {"x": 2}, Maker())


def test_other_inputs_are_another_artefact_and_equal_products_have_equal_content(tmp_path):
    store = Store(tmp_path)
    one = store.make("kind", {"x": 1}, Maker())
    two = store.make("kind", {"x": 2}, Maker())
    other = store.make("kind", {"x": 3}, Maker("else"))
    assert one.folder != two.folder and one.content == two.content != other.content


def test_an_interrupted_making_goes_on_in_its_folder(tmp_path):
    maker = Maker(fails=1)
    with pytest.raises(InterruptedError):
        Store(tmp_path).make("kind", {"x": 1}, maker)
    lines = []
    found = Store(tmp_path, report_line=lines.append).make("kind", {"x": 1}, maker, "thing")
    assert "begun" in found.record["seen"] and maker.calls == 2
    (line,) = lines
    assert line.startswith("thing") and str(found.folder) in line


def test_changed_products_and_inputs_are_refused(tmp_path):
    made = Store(tmp_path).make("kind", {"x": 1}, Maker())
    product = made.folder / "out" / "a.txt"
    product.write_text("tampered")
    with raising(str(made.folder), "out/a.txt"):
        Store(tmp_path).make("kind", {"x": 1}, Maker())
    product.unlink()
    with raising(str(made.folder), "out/a.txt", "missing"):
        Store(tmp_path).make("kind", {"x": 1}, Maker())
    product.write_text("product")
    (made.folder / "inputs.json").write_text(json.dumps({"x": 7}))
    with raising(str(made.folder), "inputs"):
        Store(tmp_path).make("kind", {"x": 1}, Maker())
    (made.folder / DONE).write_text("{")
    with raising(str(made.folder), "inputs.json", DONE):
        Store(tmp_path).make("kind", {"x": 1}, Maker())


def test_a_record_that_was_edited_is_refused(tmp_path):
    made = Store(tmp_path).make("kind", {"x": 1}, Maker())
    path = made.folder / DONE
    path.write_text(path.read_text().replace('"seen"', '"other"'))
    with raising(str(made.folder), DONE):
        Store(tmp_path).make("kind", {"x": 1}, Maker())


def test_a_store_that_renews_makes_what_is_damaged_or_outdated_again(tmp_path):
    def make(maker, **inputs):
        return Store(tmp_path, hashed=False, renew=True).make("kind", inputs, maker)

    maker = Maker()
    first = make(maker, x=1)
    assert make(maker, x=1).reused and maker.calls == 1
    (first.folder / "out" / "a.txt").write_text("tampered")
    assert make(maker, x=1).content == first.content and maker.calls == 2
    (first.folder / "stale").touch()
    assert "stale" not in make(maker, x=2).record["seen"] and maker.calls == 3
    assert Store(tmp_path, hashed=False, renew=True).find("kind", {"x": 1}) is None


def test_a_store_that_renews_waits_for_another_process(tmp_path):
    """The other one makes the artefact, which is then found."""
    store = Store(tmp_path, renew=True)
    folder = store.folder("kind", {"x": 1})
    folder.mkdir()
    maker = Maker()
    with ThreadPoolExecutor(1) as pool:
        with run_lock(folder):
            waiting = pool.submit(store.make, "kind", {"x": 1}, maker)
            time.sleep(0.2)
            assert not waiting.done()
            Store.finish(folder, {"x": 1}, [], {"by": "another"})
        assert waiting.result(10).record == {"by": "another"} and maker.calls == 0


def test_what_was_made_without_the_store_is_found(tmp_path):
    store = Store(tmp_path / "store", hashed=False)
    product = tmp_path / "elsewhere.txt"
    product.write_text("product")
    assert not store.begun("kind", {"x": 1})
    store.finish(store.folder("kind", {"x": 1}), {"x": 1}, [product], {"figure": 1})
    assert store.begun("kind", {"x": 1}) and not store.begun("kind", {"x": 2})
    assert store.find("kind", {"x": 1}).record == {"figure": 1}
    product.write_text("other")
    with raising("elsewhere.txt"):
        store.find("kind", {"x": 1})


def test_arrays_are_computed_once(tmp_path):
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True, False])}
    calls = []
    first, again = (
        Store(tmp_path).arrays("kind", {"x": 1}, lambda: calls.append(1) or values) for _ in range(2)
    )
    assert len(calls) == 1 and first.keys() == again.keys() == values.keys()
    assert all(np.array_equal(again[name], values[name]) for name in values)

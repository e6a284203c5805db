"""Artefacts: made once, found again, gone on with, and never confused."""

import json

import pytest

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
    found = Store(tmp_path, tell=lines.append).make("kind", {"x": 1}, maker, "thing")
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
    with raising(str(made.folder), "out/a.txt", "nothing"):
        Store(tmp_path).make("kind", {"x": 1}, Maker())
    product.write_text("product")
    (made.folder / "inputs.json").write_text(json.dumps({"x": 7}))
    with raising(str(made.folder), "inputs"):
        Store(tmp_path).make("kind", {"x": 1}, Maker())
    (made.folder / DONE).write_text("{")
    with raising(str(made.folder), "inputs.json", DONE):
        Store(tmp_path).make("kind", {"x": 1}, Maker())

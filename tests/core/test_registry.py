"""Things by name are imported when asked for, plugins bring theirs,
and an unknown name says which are known.
"""

import sys
from pathlib import Path

import pytest

from eg3d_rlhf.core import registry
from tests.rejections import raising

REPO = Path(__file__).parents[2]
MODULE = "from {table} import THINGS\n\nTHINGS.add({name!r}, {value})\n"


@pytest.fixture
def things(tmp_path, monkeypatch):
    """A registry of two modules in a package of its own, of which only one exists yet in `sys.modules`; and
    the folder.
    """
    package = f"things_{tmp_path.name.replace('-', '_')}"
    (tmp_path / package).mkdir()
    ours = {"alpha": f"{package}.first", "beta": f"{package}.second"}
    table = ["from eg3d_rlhf.core.registry import Registry", f'THINGS = Registry("thing", {ours})']
    (tmp_path / package / "__init__.py").write_text("\n".join(table))
    for name, module, value in (("alpha", "first", 1), ("beta", "second", 2)):
        (tmp_path / package / f"{module}.py").write_text(MODULE.format(table=package, name=name, value=value))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))
    return __import__(package).THINGS, package


def test_a_module_is_imported_when_its_name_is_asked_for(things):
    table, package = things
    assert list(table) == ["alpha", "beta"] and len(table) == 2 and "beta" in table and "gamma" not in table
    assert not {f"{package}.first", f"{package}.second"} & sys.modules.keys()
    assert table["beta"] == 2 and f"{package}.first" not in sys.modules
    assert dict(table) == {"alpha": 1, "beta": 2}


@pytest.mark.parametrize("name", ["gamma", None, 3])
def test_an_unknown_name_is_rejected_with_a_list_of_known_names(name, things):
    with raising("thing", "alpha", "beta", repr(name)):
        things[0][name]


def test_a_plugin_adds_a_name_and_may_ask_while_it_is_loaded(things, tmp_path, monkeypatch):
    table, package = things
    # loads plugins again, which must not run this file again
    asking = "try:\n    THINGS['later']\nexcept ValueError:\n    pass\n"
    plugin = tmp_path / f"plugin_of_{package}.py"
    plugin.write_text(MODULE.format(table=package, name="gamma", value=3) + asking)
    monkeypatch.setenv(registry.VARIABLE, str(plugin))
    assert table["gamma"] == 3 and list(table) == ["alpha", "beta", "gamma"]


def test_a_plugin_that_cannot_be_imported_is_named_each_time(things, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "no_such_plugin")
    for _ in range(2):
        with raising(registry.VARIABLE, "no_such_plugin"):
            things[0]["gamma"]

"""Things by name. Ours are a table of modules, each imported when one of its names is asked for; plugins add
theirs.

    FAMILIES: Registry[Family] = Registry("generator family", {"eg3d": "eg3d_rlhf.generators.eg3d", ...})

    FAMILIES.add("eg3d", Family(...))        in the module that the table names, or in a plugin
    FAMILIES["eg3d"]                         imports the module where that has not happened yet

A new thing inside the package is one file that adds it and one name in the table. The module of the table
itself imports none of its members, so that nothing is imported in a circle and `--help` stays quick.

The same file may stand outside the package, as a plugin. Name it in the environment,

    EG3D_RLHF_PLUGINS=my_package.panohead,./frontal_depth.py

or install it as an entry point of the group `eg3d_rlhf.plugins`. Plugins run with the user's rights: name
only what you would import.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

VARIABLE = "EG3D_RLHF_PLUGINS"
GROUP = "eg3d_rlhf.plugins"
Thing = TypeVar("Thing")
_loaded: set[str] = set()  # marked before they are imported: a plugin may ask a registry itself


def load_plugins() -> None:
    """Import every plugin that is named, once each.

    Raises: ValueError for one that cannot be imported.
    """
    names = (part.strip() for part in os.environ.get(VARIABLE, "").split(","))
    for name in filter(None, names):
        if name not in _loaded:
            _loaded.add(name)
            _load(name)
    if GROUP not in _loaded:
        _loaded.add(GROUP)
        for entry in importlib.metadata.entry_points(group=GROUP):
            entry.load()


def _load(name: str) -> None:
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ImportError(f"nothing at {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    except ImportError as error:
        _loaded.discard(name)
        raise ValueError(
            f"{VARIABLE}: expected a module or a .py file that can be imported, got {name}: {error}."
            " Correct it."
        ) from error


class Registry(Mapping[str, Thing], Generic[Thing]):
    """A mapping that imports what it is asked for. Plugins are loaded for a name that is neither ours nor
    added yet.

    Args: what: for messages; ours: the module that adds each name.
    """

    def __init__(self, what: str, ours: Mapping[str, str]):
        self._what = what
        self._ours = dict(ours)
        self._things = dict[str, Thing]()

    def add(self, name: str, thing: Thing) -> Thing:
        self._things[name] = thing
        return thing

    def __getitem__(self, name: object) -> Thing:
        """Raises: ValueError naming those that are known."""
        if name not in self._things and name in self._ours:
            importlib.import_module(self._ours[name])
        if name not in self._things:
            load_plugins()
        if name not in self._things:
            raise ValueError(
                f"{self._what}: expected one of {', '.join(self)}, got {name!r}. Name one, or the plugin that"
                " brings it."
            )
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        """Ours in the table's order, then those that were added. A plugin's are among them once plugins are
        loaded.
        """
        return iter(dict.fromkeys([*self._ours, *self._things]))

    def __len__(self) -> int:
        return len(set(self._ours) | set(self._things))

    def __contains__(self, name: object) -> bool:
        """Whether a name is known by now; imports nothing."""
        return name in self._things or name in self._ours

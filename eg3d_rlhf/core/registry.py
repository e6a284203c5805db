"""Registries: mappings from a name to an object. Plugins can add entries.

Each of our entries is a row of a table, name -> module, and the module is imported when its name is first
looked up.

    FAMILIES: Registry[Family] = Registry("generator family", {"eg3d": "eg3d_rlhf.generators.eg3d", ...})

    FAMILIES.add("eg3d", Family(...))        in the module that the table names, or in a plugin
    FAMILIES["eg3d"]                         imports the module, if it was not imported yet

To add an entry inside the package, write one file that calls `add`, and put its name into the table. The
module that holds the table imports none of its entries. This avoids circular imports and keeps `--help` fast.

The same file can stand outside the package, as a plugin. Name it in the environment,

    EG3D_RLHF_PLUGINS=my_package.panohead,./frontal_depth.py

or install it as an entry point of the group `eg3d_rlhf.plugins`. Plugins run with the rights of the user, so
name only code that you trust.
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
_loaded: set[str] = set()  # names of plugins whose import has begun


def load_plugins() -> None:
    """Import every plugin that the environment or an entry point names, once per process.

    Raises: ValueError for a plugin that cannot be imported.
    """
    names = (part.strip() for part in os.environ.get(VARIABLE, "").split(","))
    for name in filter(None, names):
        if name not in _loaded:
            # Marked before the import: a plugin may look up a registry while it is imported, which calls this
            # function.
            _loaded.add(name)
            _load(name)
    if GROUP not in _loaded:
        _loaded.add(GROUP)
        # Installed packages that declare plugins.
        for entry in importlib.metadata.entry_points(group=GROUP):
            entry.load()


def _load(name: str) -> None:
    """Import one plugin: a module by its dotted name, or a .py file by its path."""
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        # No loader for this kind of file, or no file.
        if spec is None or spec.loader is None or not path.is_file():
            raise ImportError(f"nothing at {path}")
        module = importlib.util.module_from_spec(spec)
        # The file may import itself by its stem. A module of that name that is already imported is not
        # replaced.
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    except ImportError as error:
        # A later call tries again, for example after the user corrected the path.
        _loaded.discard(name)
        raise ValueError(
            f"{VARIABLE}: expected a module or a .py file that can be imported, got {name}: {error}."
            " Correct the name, or install what the plugin imports."
        ) from error


class Registry(Mapping[str, Thing], Generic[Thing]):
    """A mapping that imports the module of an entry when the entry is first looked up.

    Plugins are loaded when a name is neither in our table nor added yet.

    Args: what: the kind of entries, for messages; ours: name -> module that adds it.
    """

    def __init__(self, what: str, ours: Mapping[str, str]):
        self._what = what
        self._ours = dict(ours)
        self._things = dict[str, Thing]()

    def add(self, name: str, thing: Thing) -> Thing:
        """Add an entry and return it. An entry of the same name is replaced."""
        self._things[name] = thing
        return thing

    def __getitem__(self, name: object) -> Thing:
        """Return an entry. Raises: ValueError that lists the known names."""
        if name not in self._things and name in self._ours:
            # The import runs the module's call of `add`, which fills `_things`.
            importlib.import_module(self._ours[name])
        if name not in self._things:
            load_plugins()
        # Still unknown: plugins are imported now, and only now.
        if name not in self._things:
            raise ValueError(
                f"{self._what}: expected one of {', '.join(self)}, got {name!r}. Use one of these names, or"
                f" set {VARIABLE} to the plugin that adds it."
            )
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over names: ours in the order of the table, then those that were added.

        Names of plugins are included only after plugins have been loaded.
        """
        # Each name once, though an imported entry is in both.
        return iter(dict.fromkeys([*self._ours, *self._things]))

    def __len__(self) -> int:
        return len(set(self._ours) | set(self._things))

    def __contains__(self, name: object) -> bool:
        """Return True if a name is in the table or was added. Imports nothing."""
        return name in self._things or name in self._ours

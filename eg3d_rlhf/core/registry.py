"""Things by name. Ours are a table of modules, each imported when one of its names is asked for; plugins add theirs.

    FAMILIES: Registry[Family] = Registry("generator family", {"eg3d": "eg3d_rlhf.generators.eg3d", ...})

    FAMILIES.add("eg3d", Family(...))        in the module that the table names, or in a plugin
    FAMILIES["eg3d"]                         imports the module where that has not happened yet

A new thing inside the package is one file that adds it and one name in the table. The same file, named in EG3D_RLHF_PLUGINS, is a plugin.
The module of the table itself imports none of its members, so that nothing is imported in a circle and `--help` stays quick.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from eg3d_rlhf.core.plugins import load_plugins

Thing = TypeVar("Thing")


class Registry(Mapping[str, Thing], Generic[Thing]):
    """A mapping that imports what it is asked for. Plugins are loaded for a name that is neither ours nor added yet.

    Args: what: for messages; ours: the module that adds each name.
    """

    def __init__(self, what: str, ours: Mapping[str, str]):
        self._what, self._ours, self._things = what, dict(ours), dict[str, Thing]()

    def add(self, name: str, thing: Thing) -> Thing:
        """Make a thing known."""
        self._things[name] = thing
        return thing

    def __getitem__(self, name: object) -> Thing:
        """Raises: ValueError naming those that are known."""
        if name not in self._things and name in self._ours:
            importlib.import_module(self._ours[name])
        if name not in self._things:
            load_plugins()
        if name not in self._things:
            raise ValueError(f"{self._what}: expected one of {', '.join(self)}, got {name!r}. Name one, or the plugin that brings it.")
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        """Ours in the table's order, then those that were added. A plugin's are among them once plugins are loaded."""
        return iter(dict.fromkeys([*self._ours, *self._things]))

    def __len__(self) -> int:
        return len(set(self._ours) | set(self._things))

    def __contains__(self, name: object) -> bool:
        """Whether a name is known by now; imports nothing."""
        return name in self._things or name in self._ours

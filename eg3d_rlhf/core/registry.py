"""Registries: mappings from a name to an object, to which plugins can add entries.

The entries of this package are rows of a table, name -> module. The module is imported when its name is
looked up for the first time.

    FAMILIES: Registry[Family] = Registry("generator family", {"eg3d": "eg3d_rlhf.generators.eg3d", ...})

    FAMILIES.add("eg3d", Family(...))        # in the module that the table names, or in a plugin
    FAMILIES["eg3d"]                         # imports the module, if it was not imported yet

To add an entry inside the package, write one file that calls `add`, and put its name into the table. The
module that holds the table imports none of its entries. This avoids circular imports and keeps `--help` fast.

The same file can be a plugin outside the package. Either name it in an environment variable, as a module or
as the path of a .py file, with commas between several plugins:

    EG3D_RLHF_PLUGINS=my_package.panohead,./frontal_depth.py

or install it as an entry point of the group `eg3d_rlhf.plugins`. Plugins run with the permissions of the
user, so name only code that you trust.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

VARIABLE = "EG3D_RLHF_PLUGINS"  # environment variable that names plugins
GROUP = "eg3d_rlhf.plugins"  # group of entry points that installed packages use
Thing = TypeVar("Thing")
# Names of plugins whose import has begun, and GROUP once the entry points were imported.
_loaded: set[str] = set()


def load_plugins() -> None:
    """Import every plugin that the environment variable or an entry point names.

    A plugin is imported only once per process.

    Raises: ValueError for a plugin of the environment variable that cannot be imported.
    """
    plugins = (plugin_name.strip() for plugin_name in os.environ.get(VARIABLE, "").split(","))
    # filter(None, ...) drops empty names. An unset variable gives one empty name.
    for plugin in filter(None, plugins):
        if plugin not in _loaded:
            # Added before the import: a plugin may look up a registry while it is imported, and that calls
            # this function again.
            _loaded.add(plugin)
            _load(plugin)
    if GROUP not in _loaded:
        _loaded.add(GROUP)
        for entry_point in importlib.metadata.entry_points(group=GROUP):
            entry_point.load()


def _load(plugin: str) -> None:
    """Import one plugin: a module by its dotted name, or a .py file by its path."""
    try:
        if not plugin.endswith(".py"):
            importlib.import_module(plugin)
            return
        plugin_path = Path(plugin).resolve()
        module_spec = importlib.util.spec_from_file_location(plugin_path.stem, plugin_path)
        # Python returns None for a kind of file that it cannot import. It does not check that the
        # file exists.
        if module_spec is None or module_spec.loader is None or not plugin_path.is_file():
            raise ImportError(f"there is no file {plugin_path}")
        plugin_module = importlib.util.module_from_spec(module_spec)
        # Other modules may import the file by its stem. An imported module of the same name is not replaced.
        sys.modules.setdefault(plugin_path.stem, plugin_module)
        module_spec.loader.exec_module(plugin_module)
    except ImportError as error:
        # Removed, so that a later call can try the import again.
        _loaded.discard(plugin)
        raise ValueError(
            f"{VARIABLE}: the plugin {plugin} cannot be imported: {error}. Name an importable module or a .py"
            " file, and install the packages that it imports."
        ) from error


class Registry(Mapping[str, Thing], Generic[Thing]):
    """A mapping that imports the module of an entry when the entry is looked up for the first time.

    Plugins are loaded when a name is neither in the table nor was added before.

    Args:
        entry_kind: kind of the entries in the singular, for messages.
        module_table: names of this package's entries -> dotted name of the module that adds the entry.
    """

    def __init__(self, entry_kind: str, module_table: Mapping[str, str]):
        self._entry_kind = entry_kind
        self._module_table = dict(module_table)
        self._entries = dict[str, Thing]()

    def add(self, entry_name: str, new_entry: Thing) -> Thing:
        """Add an entry and return it. An existing entry with the same name is replaced."""
        self._entries[entry_name] = new_entry
        return new_entry

    def __getitem__(self, name: object) -> Thing:
        """Return the entry with a name, and import the module or the plugins that add it if necessary.

        Raises: ValueError, which lists the existing names, for an unknown name.
        """
        if name not in self._entries and name in self._module_table:
            # The import runs the module's call of `add`, which fills `_entries`.
            importlib.import_module(self._module_table[name])
        if name not in self._entries:
            load_plugins()
        # A plugin may have added the name, so it is looked up again.
        if name not in self._entries:
            raise ValueError(
                f"{self._entry_kind}: expected one of {', '.join(self)}, got {name!r}. Use one of these"
                f" names, or set the environment variable {VARIABLE} to the plugin that adds {name!r}."
            )
        return self._entries[name]

    def check(self, name: object) -> None:
        """Raise ValueError, which lists the existing names, for an unknown name.

        The module of an entry of this package is not imported, which may take seconds.
        """
        if name not in self:
            self[name]

    def is_listed(self, name: str) -> bool:
        """Return True if a name is in this package's table, and False for the name of a plugin's entry."""
        return name in self._module_table

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the order of the table, followed by the names of other added entries.

        Names of plugins are included only after the plugins have been loaded.
        """
        # dict.fromkeys removes duplicates: an imported entry of the table is in both.
        return iter(dict.fromkeys([*self._module_table, *self._entries]))

    def __len__(self) -> int:
        return len(set(self._module_table) | set(self._entries))

    def __contains__(self, name: object) -> bool:
        """Return True if a name is in the table or was added. Nothing is imported."""
        return name in self._entries or name in self._module_table

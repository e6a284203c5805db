"""Further members of the registries (observations, generator families, modes, ...) from outside the package.

A plugin is a module that registers what it brings when it is imported. Name it in the environment,

    EG3D_RLHF_PLUGINS=my_package.panohead,./frontal_depth.py

or install it as an entry point of the group `eg3d_rlhf.plugins`. Plugins run with the user's rights: name only what you would import.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "EG3D_RLHF_PLUGINS"
GROUP = "eg3d_rlhf.plugins"


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
        raise ValueError(f"{VARIABLE}: expected a module or a .py file that can be imported, got {name}: {error}. Correct it.") from error

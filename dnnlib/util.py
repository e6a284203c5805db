"""Small helpers under the names of EG3D's dnnlib."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse
from urllib.request import url2pathname

# Packages from which names may be taken. Names come from
# configuration files, which must not run arbitrary code.
ALLOWED_ROOTS = ("training", "torch_utils", "dnnlib", "torch", "eg3d_rlhf")


class EasyDict(dict):
    """Dictionary whose items are attributes as well.

    >>> EasyDict(lr=0.1).lr
    0.1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            # hasattr and copy.copy expect this type of error.
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


def get_obj_by_name(name: str) -> Any:
    """Return the object with the name 'package.module.name'.

    Deviates: only this project's packages and torch are available, since such names come from files.
    Raises: ValueError for any other package, ImportError for a module or name that does not exist.
    """
    parts = name.split(".")
    if parts[0] not in ALLOWED_ROOTS or len(parts) < 2:
        raise ValueError(
            f"get_obj_by_name: expected a dotted name in {', '.join(ALLOWED_ROOTS)}, got {name!r}. Import"
            " other objects yourself."
        )
    # Where the module ends and the attributes begin is not known: try the longest module first.
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            obj: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # A missing module that `module_name` itself imports is a real error, not a wrong split.
            if error.name is None or not module_name.startswith(error.name):
                raise
            continue
        for part in parts[split:]:
            if not hasattr(obj, part):
                raise ImportError(
                    f"get_obj_by_name: {module_name} has no {'.'.join(parts[split:])}. Check the spelling of"
                    f" {name!r}."
                )
            obj = getattr(obj, part)
        return obj
    raise ImportError(f"get_obj_by_name: there is no module for {name!r}. Check the spelling.")


def call_func_by_name(*args: Any, func_name: str, **kwargs: Any) -> Any:
    """Call the function named 'package.module.function'."""
    func: Callable = get_obj_by_name(func_name)
    return func(*args, **kwargs)


def construct_class_by_name(*args: Any, class_name: str, **kwargs: Any) -> Any:
    """Construct the class named 'package.module.Class'."""
    return call_func_by_name(*args, func_name=class_name, **kwargs)


def open_url(url: str) -> BinaryIO:
    """Open a local path or file:// URL for reading, in binary mode.

    Deviates: nothing is downloaded. Networks and detectors are files that the user names.
    Raises: ValueError for a remote URL, FileNotFoundError.
    """
    parsed = urlparse(url)
    if parsed.scheme in ("http", "https", "ftp"):
        raise ValueError(
            f"open_url: expected a local file, got {url!r}. Download it yourself and pass its path."
        )
    path = Path(url2pathname(parsed.path)) if parsed.scheme == "file" else Path(url)
    return open(path, "rb")

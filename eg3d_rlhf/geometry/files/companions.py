"""Search for the files that a mesh file names: material files and textures.

A name in a mesh file from an untrusted source must never lead out of the folder that the user passed. A name
that cannot be used as it stands is searched beside the file that contains it, because exporters write
absolute paths of the machine on which they ran.
"""

import re
from pathlib import Path

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # a URL; its scheme has two letters or more
_DRIVE = re.compile(r"[a-z]:", re.IGNORECASE)  # drive letter of Windows


def find_companion(owner: Path, file_name: str, root: Path, max_bytes: int) -> Path:
    """Return the resolved path of a file that another file names.

    It is the named file if that lies in `root` or below, or else the file of the same name beside `owner`.
    Upper and lower case count only if there are several such files.

    Args:
        owner: file that contains the name.
        file_name: name or path, with "/" or "\\" between folders.
        root: folder that the user passed, which contains `owner`.
        max_bytes: largest allowed size in bytes.

    Raises: ValueError if there is no such file, if it lies outside `root`, or if it is too large.
    """
    # shortened, because a name in an untrusted file may be very long
    named_text = f"{owner.name} names the file {file_name[:80]!r}"
    plain_name = file_name.strip().strip('"').replace("\\", "/")
    if _ADDRESS.match(plain_name):
        raise ValueError(f"{named_text}, which is an address. Put the file beside {owner.name}.")
    if "\0" in plain_name:
        raise ValueError(f"{named_text}, which is no name of a file. Correct the name.")
    relative_path = Path(plain_name)
    candidates = [owner.parent / relative_path.name]
    fault = f"does not exist. Put it beside {owner.name}."
    if relative_path.is_absolute() or _DRIVE.match(plain_name):
        fault = f"is an absolute path. Put the file beside {owner.name}."
    else:
        candidates.insert(0, owner.parent / relative_path)
    try:
        for candidate in candidates:
            # A symbolic link may lead out of the folder although its name does not. Folders outside are not
            # looked at, so that a note does not say which files they contain.
            is_inside = candidate.resolve().is_relative_to(root.resolve())
            existing_path = _existing(candidate) if is_inside else None
            if existing_path is None:
                if candidate is candidates[0] and not is_inside:
                    fault = f"is outside the folder {root.name or root}. Put the file beside {owner.name}."
                continue
            # another case of the name may be a link
            if not existing_path.resolve().is_relative_to(root.resolve()):
                continue
            if existing_path.stat().st_size > max_bytes:
                raise ValueError(
                    f"{named_text}, which has more than {max_bytes >> 20} MB, the limit. Reduce its size."
                )
            return existing_path.resolve()
    # a name that is too long, and links that form a loop
    except (OSError, RuntimeError):
        pass
    raise ValueError(f"{named_text}, which {fault}")


def _existing(path: Path) -> Path | None:
    """Return a file with the name of `path`, if necessary in other case; None if there is not one."""
    if not path.name:
        return None
    if path.is_file():
        return path
    if not path.parent.is_dir():
        return None
    similar_paths = [
        similar_path
        for similar_path in path.parent.iterdir()
        if similar_path.name.casefold() == path.name.casefold() and similar_path.is_file()
    ]
    return similar_paths[0] if len(similar_paths) == 1 else None

"""Reader of small YAML files that other programs wrote.

It builds only dicts, lists and scalars, so that a file cannot create other objects.
"""

from pathlib import Path
from typing import Any

MAX_DEPTH = 64  # largest number of nested levels; the files that we read have fewer


def read_yaml(
    path: Path, message_start: str = "", max_bytes: int = 1 << 16, max_aliases: int = 16
) -> dict[Any, Any]:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: path of the file.
        message_start: start of error messages; the path by default.
        max_bytes: largest allowed size of the file, in bytes.
        max_aliases: largest allowed number of aliases (*name), which repeat a part of the file.
    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file is too large, is not YAML, uses tags or too many aliases, is nested too deeply,
            or contains no mapping at its top level.
    """
    # Imported here, because most commands do not need it.
    import yaml

    message_start = message_start or str(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{message_start}: there is no file {path}. Pass the path of an existing YAML file."
        )
    # Checked before the file is read into memory.
    if path.stat().st_size > max_bytes:
        raise ValueError(
            f"{message_start}: {path} has {path.stat().st_size >> 10} KiB, but this YAML file may have at"
            f" most {max_bytes >> 10} KiB. Check that the path names the right file."
        )
    try:
        yaml_text = path.read_text(encoding="utf-8")
        depth = 0
        alias_count = 0
        # Aliases and depth are counted on the parser's events, before any object is built. Nested
        # aliases could otherwise expand to gigabytes. The parser is lazy, so a rejected file is not
        # parsed to its end.
        for event in yaml.parse(yaml_text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            alias_count += isinstance(event, yaml.AliasEvent)
            # Both errors are caught below, where the path is added.
            if alias_count > max_aliases:
                raise ValueError(f"it uses more than {max_aliases} aliases (*name)")
            if depth > MAX_DEPTH:
                raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
        # SafeLoader rejects tags, which could name other types.
        root = yaml.load(yaml_text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        allowed_form = "YAML" if max_aliases else "plain YAML without tags and aliases"
        # The parser's message has several lines and may quote the file at length.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{message_start}: {path} is not {allowed_form}: {reason}. Correct the file, or download it"
            " again."
        ) from None
    if not isinstance(root, dict):
        raise ValueError(
            f"{message_start}: expected a mapping at the top level of {path}, got {type(root).__name__}."
            " Check that the path names the right file."
        )
    return root

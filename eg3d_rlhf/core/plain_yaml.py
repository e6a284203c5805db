"""Reader of small YAML files that other programs wrote. It builds dicts, lists and scalars, and no other
objects.
"""

from pathlib import Path
from typing import Any

DEEPEST = 64  # nested levels; files that we read have fewer


def read_yaml(path: Path, who: str = "", most_bytes: int = 1 << 16, aliases: int = 16) -> dict[Any, Any]:
    """Read the mapping that a file contains.

    Args:
        who: start of error messages; the path by default.
        most_bytes: largest size of the file.
        aliases: largest number of repetitions (*name) in it.
    Raises: FileNotFoundError; ValueError for a file that is too large, is not YAML, uses tags or too many
    aliases, is nested too deeply, or contains no mapping.
    """
    # Imported here, because most commands do not need it
    import yaml

    who = who or str(path)
    many = f"more than {aliases} " if aliases else ""
    if not path.is_file():
        raise FileNotFoundError(f"{who}: expected a file at {path}, got none. Check the path.")
    # Checked before the file is read into memory.
    if path.stat().st_size > most_bytes:
        raise ValueError(
            f"{who}: expected at most {most_bytes >> 10} KiB, got {path.stat().st_size >> 10} KiB. Check that"
            " the path names the right file."
        )
    try:
        text = path.read_text(encoding="utf-8")
        depth = used = 0
        # Aliases and depth are counted on events, before any object is built: nested aliases could
        # otherwise expand to gigabytes. The parser is lazy, so a rejected file is not read to its end.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            used += isinstance(event, yaml.AliasEvent)
            if used > aliases or depth > DEEPEST:
                raise ValueError(
                    f"it uses {many}aliases (*name)"
                    if used > aliases
                    else f"it nests deeper than {DEEPEST} levels"
                )
        # SafeLoader builds no objects of other types; tags are errors.
        root = yaml.load(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        expected = "YAML" if aliases else "plain YAML without tags and aliases"
        # The parser's message in one line, of bounded length.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{who}: expected {expected}, got: {reason}. Correct or restore the file.") from None
    if not isinstance(root, dict):
        raise ValueError(
            f"{who}: expected a mapping at the top level, got {type(root).__name__}. Check that the path"
            " names the right file."
        )
    return root

"""Small YAML files of other people's programs, as plain dicts, lists and scalars; no object of any other kind
is built.
"""

from pathlib import Path
from typing import Any

DEEPEST = 64  # levels


def read_yaml(path: Path, who: str = "", most_bytes: int = 1 << 16, aliases: int = 16) -> dict[Any, Any]:
    """The mapping that a file holds.

    Args: who: speaks in messages, by default the path; aliases: most repetitions (*name) in it.
    Raises: FileNotFoundError; ValueError for a file that is large, no YAML, uses tags or more aliases, nests
        deeper, or holds no mapping.
    """
    import yaml  # only here: nothing else needs it

    who = who or str(path)
    many = f"more than {aliases} " if aliases else ""
    if not path.is_file():
        raise FileNotFoundError(f"{who}: expected a file at {path}, got none. Check the path.")
    if path.stat().st_size > most_bytes:
        raise ValueError(
            f"{who}: expected at most {most_bytes >> 10} KiB, got {path.stat().st_size >> 10}. Is it another"
            " file?"
        )
    try:
        text = path.read_text(encoding="utf-8")
        depth = used = 0
        # lazily, so that what is refused is not read to its end
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            used += isinstance(event, yaml.AliasEvent)
            if used > aliases or depth > DEEPEST:
                raise ValueError(
                    f"it uses {many}aliases (*name)"
                    if used > aliases
                    else f"it nests deeper than {DEEPEST} levels"
                )
        root = yaml.load(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        expected = "YAML" if aliases else "plain YAML without tags and aliases"
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{who}: expected {expected}, got: {reason}. Restore the file.") from None
    if not isinstance(root, dict):
        raise ValueError(
            f"{who}: expected a mapping at the top, got {type(root).__name__}. Is it another file?"
        )
    return root

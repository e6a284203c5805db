"""Small YAML files of other programs, as plain values."""

from pathlib import Path

LARGEST, ALIASES = 1 << 16, 16  # bytes of a file, and repetitions in it


def read_yaml(path: Path) -> dict:
    """A mapping from a file; no object of any other kind is built. Raises: ValueError."""
    import yaml  # only here, as in reward/release.py: nothing else needs it

    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: expected at most {LARGEST >> 10} KiB, got {path.stat().st_size >> 10}. Is it another file?")
    text = path.read_text()
    try:
        repeated = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text) if repeated <= ALIASES else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got: {' '.join(str(error).split())[:120]}. Restore the file.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got another value or many repetitions. Restore the file.")
    return content

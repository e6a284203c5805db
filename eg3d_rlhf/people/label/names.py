"""Names of annotators that can be told apart: by eye, and not by capitals alone.

The comparison follows Unicode's TS #39 (skeletons of confusable characters; scripts mixed as in its "highly restrictive" level), with the
tables of `confusable_homoglyphs`. Only new names are checked: a database that holds others goes on working.
"""

import unicodedata
from collections.abc import Iterable

from confusable_homoglyphs import categories
from confusable_homoglyphs.confusables import confusables_data

_ANY = {"COMMON", "INHERITED"}
_TOGETHER = ({"LATIN", "HAN", "HIRAGANA", "KATAKANA"}, {"LATIN", "HAN", "BOPOMOFO"}, {"LATIN", "HAN", "HANGUL"})


def check_name(name: str, known: Iterable[str]) -> None:
    """Refuse a name that is mistaken for one of `known`.

    Raises: ValueError.
    """
    scripts = categories.unique_aliases(unicodedata.normalize("NFKC", name)) - _ANY
    if len(scripts) > 1 and not any(scripts <= allowed for allowed in _TOGETHER):
        found = " and ".join(sorted(script.capitalize() for script in scripts))
        raise ValueError(f"annotator: expected letters of one script, got {name!r} of {found}. Choose another name.")
    looks = _looks(name)
    for other in known:
        if other == name:
            raise ValueError(f"annotator: expected a new name, got {name!r}, which is in use. Choose another.")
        if looks & _looks(other):
            raise ValueError(f"annotator: expected a name unlike the others, got {name!r}, which is too like {other!r}. Choose another.")


def _looks(name: str) -> set[str]:
    """Of two names that are mistaken for each other, some are the same: what is seen, and what is seen of small letters."""
    name = unicodedata.normalize("NFKC", " ".join(name.split()))
    return {_skeleton(name), _skeleton(name.casefold()), _skeleton(name).casefold()}


def _skeleton(name: str) -> str:
    decomposed = "".join(_prototype(character) for character in unicodedata.normalize("NFD", name))
    return unicodedata.normalize("NFD", decomposed)


def _prototype(character: str) -> str:
    """The one character for all that look alike; of 'l', '1', 'I' and '|' it is 'l'.

    The table leads from a prototype to all that look like it, and from each of these to the prototype alone.
    """
    alike = [found["c"].strip("\u200e") for found in confusables_data.get(character, ())]
    if len(alike) != 1:
        return character
    return alike[0] if len(confusables_data.get(alike[0], ())) > 1 else min(character, alike[0])

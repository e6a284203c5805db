"""Check the language of the code: python -m tests.language [--counts] [FILE ...], or all files of git.

CONTRIBUTING.md describes how this project writes. This lint finds what a program can find:

1. docstrings that open with a question word or a genitive (What, Of, Whether, ...) instead of a verb, or of a
   noun for a class;
2. variables and arguments whose name does not say what they hold (found, told, own, said, one);
3. terms of our own where the field has a standard term: every entry of `tests/language.toml`, with the
   contexts in which the word is allowed;
4. comments inside functions that only repeat the words of the line below them.

`--counts` prints the figures that CONTRIBUTING.md quotes: share of docstrings that open with a stop word,
names from the stop list, comment tokens per line, and full-line comments inside functions per line.
"""

import argparse
import ast
import functools
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
TERMS = Path(__file__).with_suffix(".toml")
TOPS = ("eg3d_rlhf", "training", "torch_utils", "tools", "dnnlib", "builders", "benchmarks")
COUNTED = ("eg3d_rlhf", "training", "torch_utils", "tools")  # what the figures of --counts cover

OPENERS = frozenset("what of whether which its where how who whose whom why".split())
STOP_NAMES = frozenset("found told own said one".split())
KEY = re.compile(r"(--)?[a-z][a-z0-9]*([_-][a-z0-9]+)*")
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *SCOPES)


class Place(NamedTuple):
    """A line of a file and what is wrong there."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        path = self.path.relative_to(REPO) if self.path.is_relative_to(REPO) else self.path
        return f"{path}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Term:
    """A word of our own, the standard term, and the contexts in which the word is allowed."""

    here: str
    write: str
    pattern: re.Pattern | None  # None: no program can find it; `why` says so
    allowed: re.Pattern | None  # matched against the text around the word
    names: re.Pattern | None  # matched against whole identifiers, module names and keys
    why: str


@dataclass(frozen=True)
class Kept:
    """A file that keeps old words, and why."""

    file: str
    words: re.Pattern
    why: str


@dataclass
class Source:
    """A Python file: its text, syntax tree and comments."""

    path: Path
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree; several finders look at them."""
        return list(ast.walk(self.tree))

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @functools.cached_property
    def comments(self) -> list[tokenize.TokenInfo]:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [token for token in tokens if token.type == tokenize.COMMENT]

    def docstrings(self) -> Iterator[tuple[int, str]]:
        """Yield the line and the text of every docstring."""
        for node in self.nodes:
            if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
                yield node.body[0].lineno, text

    def texts(self) -> Iterator[tuple[int, str]]:
        """Yield line and text of docstrings, comments and messages: string constants that hold a space."""
        for token in self.comments:
            yield token.start[0], token.string
        for node in self.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
                yield node.lineno, node.value

    def names(self) -> Iterator[tuple[int, str]]:
        """Yield line and name of variables, arguments, attributes that are assigned, functions, classes."""
        for node in self.nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.lineno, node.id
            elif isinstance(node, ast.arg):
                yield node.lineno, node.arg
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.lineno, node.attr
            elif isinstance(node, (ast.ClassDef, *SCOPES)):
                yield node.lineno, node.name

    def keys(self) -> Iterator[tuple[int, str]]:
        """Yield line and text of string constants that look like identifiers or flags."""
        for node in self.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and KEY.fullmatch(node.value):
                yield node.lineno, node.value.lstrip("-").replace("-", "_")

    def full_line_comments(self) -> list[tokenize.TokenInfo]:
        """Return comments inside functions that have a line of their own."""
        spans = [(node.lineno, node.end_lineno) for node in self.nodes if isinstance(node, SCOPES)]
        return [
            token
            for token in self.comments
            if token.line.strip().startswith("#")
            and any(first < token.start[0] <= last for first, last in spans)
        ]


def read_terms(path: Path = TERMS) -> list[Term]:
    """Read the table of terms.

    Raises ValueError for an entry that has neither a pattern nor a reason for having none.
    """
    terms = []
    for entry in read_table(path)["term"]:
        if not (entry.get("pattern") or entry.get("names") or entry.get("why")):
            raise ValueError(f"{path.name}: {entry['here']}: give a pattern, or in `why` the reason for none")
        compiled = {
            key: re.compile(entry[key], re.IGNORECASE) if entry.get(key) else None
            for key in ("pattern", "allowed", "names")
        }
        terms.append(Term(here=entry["here"], write=entry["write"], why=entry.get("why", ""), **compiled))
    return terms


def read_table(path: Path = TERMS) -> dict:
    """Read the file of terms as it is."""
    return tomllib.loads(path.read_text())


def read_kept(path: Path = TERMS) -> list[Kept]:
    """Read which files keep which old words."""
    return [
        Kept(entry["file"], re.compile(entry["words"], re.IGNORECASE), entry["why"])
        for entry in read_table(path).get("kept", [])
    ]


def openers(source: Source) -> Iterator[Place]:
    """Yield docstrings that open with a stop word."""
    for line, text in source.docstrings():
        word = re.match(r"\W*([A-Za-z']+)", text)
        if word and word[1].lower() in OPENERS:
            yield Place(source.path, line, f"docstring opens with {word[1]!r}; open it with a verb")


def stop_names(source: Source) -> Iterator[Place]:
    """Yield variables and arguments of the stop list."""
    for node in source.nodes:
        name = node.arg if isinstance(node, ast.arg) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if name and name.lstrip("_") in STOP_NAMES:
            yield Place(source.path, node.lineno, f"variable {name!r}: name the thing that it holds")


def private_terms(source: Source, terms: list[Term]) -> Iterator[Place]:
    """Yield terms of our own in docstrings, comments, messages and identifiers."""
    # a phrase may run over a line's end
    texts = [(first, text, text.replace("\n", " ")) for first, text in source.texts()]
    # the module's own name stands at line 1
    names = sorted({(1, source.path.stem), *source.names(), *source.keys()})
    for term in terms:
        if term.pattern:
            for first, text, flat in texts:
                for match in term.pattern.finditer(flat):
                    around = flat[max(match.start() - 60, 0) : match.end() + 60]
                    if term.allowed and any(
                        max(match.start() - 60, 0) + hit.start() <= match.start()
                        and max(match.start() - 60, 0) + hit.end() >= match.end()
                        for hit in term.allowed.finditer(around)
                    ):
                        continue
                    line = first + text.count("\n", 0, match.start())
                    yield Place(source.path, line, f"{match[0]!r}: write {term.write}")
        if term.names:
            for line, name in names:
                if term.names.fullmatch(name.lstrip("_")):
                    yield Place(source.path, line, f"name {name!r}: write {term.write}")


def restating(source: Source) -> Iterator[Place]:
    """Yield comments inside functions whose every word stands in the line of code below."""
    comments: list[tuple[int, str]] = []  # first line and text; lines that follow one another are one comment
    last = 0
    for token in source.full_line_comments():
        if comments and token.start[0] == last + 1:
            comments[-1] = (comments[-1][0], f"{comments[-1][1]} {token.string}")
        else:
            comments.append((token.start[0], token.string))
        last = token.start[0]
    for first, text in comments:
        row = first
        while row < len(source.lines) and source.lines[row].lstrip().startswith("#"):
            row += 1
        code = source.lines[row] if row < len(source.lines) else ""
        words = {word.lower().rstrip("s") for word in re.findall(r"[A-Za-z]{3,}", text)} - FILLERS
        parts = {part.lower().rstrip("s") for part in re.findall(r"[A-Za-z][a-z]{2,}", code)}
        if words and words <= parts:
            yield Place(source.path, first, "comment repeats the line below; say why, or delete it")


FIGURES = {
    "stop_word_percent": "docstrings that open with a stop word, %",
    "stop_names": "variables and arguments from the stop list",
    "comments_per_100": "comment tokens per 100 lines",
    "full_line_per_100": "full-line comments inside functions per 100 lines",
}
FILLERS = frozenset("the and for from with into that this each all are its set get return".split())


def counts(sources: list[Source]) -> dict[str, float]:
    """Return the figures of --counts over files."""
    documented = [text for source in sources for _, text in source.docstrings()]
    lines = sum(len(source.lines) for source in sources)
    stopped = sum(len(list(openers(source))) for source in sources)
    return {
        "files": len(sources),
        "lines": lines,
        "docstrings": len(documented),
        "stop_word_percent": 100 * stopped / max(len(documented), 1),
        "stop_names": sum(len(list(stop_names(s))) for s in sources),
        "comments_per_100": 100 * sum(len(s.comments) for s in sources) / max(lines, 1),
        "full_line_per_100": 100 * sum(len(s.full_line_comments()) for s in sources) / max(lines, 1),
    }


def files(tops: tuple[str, ...] = TOPS) -> list[Path]:
    """Return the Python files of these folders that git knows or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    return [REPO / name for name in names if name.split("/")[0] in tops and (REPO / name).exists()]


def check(paths: list[Path]) -> list[Place]:
    """Return every finding in files, in the order of files and lines."""
    terms = read_terms()
    kept = read_kept()
    places: set[Place] = set()
    for path in paths:
        source = Source(path, path.read_text())
        exempt = [entry for entry in kept if path == REPO / entry.file]
        for finder in (openers, stop_names, restating):
            places.update(finder(source))
        places.update(
            place
            for place in private_terms(source, terms)
            if not any(entry.words.search(place.message.split(": write ")[0]) for entry in exempt)
        )
    return sorted(places)


def main(arguments: list[str]) -> int:
    """Print findings or counts; return 1 if there are findings, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.language", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--counts", action="store_true", help="print figures instead of findings")
    parser.add_argument("--summary", action="store_true", help="print the number of findings of each kind")
    options = parser.parse_args(arguments)
    if options.counts:
        paths = [path.resolve() for path in options.files] or files(COUNTED)
        for name, value in counts([Source(path, path.read_text()) for path in paths]).items():
            print(f"{value:8.1f}  {FIGURES.get(name, name)}")
        return 0
    places = check([path.resolve() for path in options.files] or files())
    if options.summary:
        kinds: dict[str, int] = {}
        for place in places:
            kind = place.message.split(": write ")[-1] if ": write " in place.message else place.message[:24]
            kinds[kind] = kinds.get(kind, 0) + 1
        for kind, number in sorted(kinds.items(), key=lambda item: -item[1]):
            print(f"{number:6d}  {kind}")
    else:
        for place in places:
            print(place)
    return int(bool(places))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

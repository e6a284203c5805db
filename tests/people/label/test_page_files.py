"""The files of the page as they are kept: made from their sources, small, licensed, packed, and fit for the
strict policy.
"""

import hashlib
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser

import pytest

from eg3d_rlhf.people.label.server.options import STATIC

WEB = STATIC.parent / "web"
REPO = STATIC.parents[3]


class Tags(HTMLParser):
    """Notes what a page holds and loads."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and data.strip():
            tag = self.elements[-1][0]
            self.texts[tag] = self.texts.get(tag, "") + data


@pytest.mark.parametrize("name", ["app.js", "admin.js", "gaussian_worker.js", "sw.js"])
def test_bundles_are_made_from_the_sources_beside_them(name):
    sources = sorted(["build.mjs", "package-lock.json", *(f"src/{p.name}" for p in (WEB / "src").glob("*"))])
    digest = hashlib.sha256(
        "".join(f"{name}\0{(WEB / name).read_text()}\0" for name in sources).encode()
    ).hexdigest()
    banner = re.match(r"/\* sources ([0-9a-f]{64});", (STATIC / name).read_text())
    assert banner and banner[1] == digest, (
        f"{name} is stale: cd eg3d_rlhf/people/label/web && npm ci && npm run build"
    )


def test_the_bundles_are_reproducible():
    if shutil.which("node") is None or not (WEB / "node_modules" / "esbuild").is_dir():
        pytest.skip("needs node and the pinned packages: cd eg3d_rlhf/people/label/web && npm ci")
    result = subprocess.run(
        ["node", "build.mjs", "--check"], cwd=WEB, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_three_js_is_there_with_its_licence_and_of_the_pinned_version():
    bundle = (STATIC / "app.js").read_text()
    assert len(bundle.encode()) < 900_000
    assert "SPDX-License-Identifier: MIT" in bundle and "Three.js Authors" in bundle
    assert "MIT License" in (STATIC / "THREE-LICENSE").read_text()
    assert '"three": "0.187.0"' in (WEB / "package.json").read_text()
    assert '"187"' in bundle, "three's revision"


@pytest.mark.parametrize("name", ["index.html", "admin.html"])
def test_pages_fit_the_policy_and_load_nothing_from_elsewhere(name):
    tags = Tags((STATIC / name).read_text())
    assert "script" not in tags.texts and "style" not in tags.texts, "no inline script or style"
    for tag, attributes in tags.elements:
        assert not [key for key in attributes if key == "style" or key.startswith("on")], (tag, attributes)
        for key in ("src", "href", "action", "poster", "srcset", "data"):
            address = attributes.get(key)
            if address is not None:
                assert re.match(r"/(?!/)|#|data:image/", address), (tag, address)
            if address is not None and address.startswith("/static/"):
                assert (STATIC / address.removeprefix("/static/")).is_file()
    assert ("html", "en") in [(tag, attributes.get("lang")) for tag, attributes in tags.elements]


BANNED = (
    r"\beval\(|new"
    r" Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write|https?://(?!www\.w3\.org/2000/svg)"
)


def test_scripts_neither_evaluate_text_nor_write_html():
    for path in (WEB / "src").glob("*.js"):
        text = path.read_text()
        assert re.findall(BANNED, text) == [], path.name


def test_the_files_are_packed_with_the_project():
    declared = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {p.name for pattern in declared["eg3d_rlhf.people.label"] for p in STATIC.parent.glob(pattern)}
    pages = {
        "index.html",
        "app.js",
        "gaussian_worker.js",
        "sw.js",
        "app.css",
        "admin.html",
        "admin.js",
        "admin.css",
        "asked.css",
    }
    assert pages | {"login.html", "login.js", "login.css", "login.json", "THREE-LICENSE"} == packed

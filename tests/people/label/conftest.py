"""Fixtures of the labelling application's tests."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eg3d_rlhf.people.label.store import Store
from tests.people.label import serving
from tests.people.label.browser import browser, page, serve
from tests.people.label.plans import Clock
from tests.people.label.postgres import postgres_server, postgres_url

__all__ = ["browser", "page", "postgres_server", "postgres_url", "serve"]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> str:
    """URL of an empty database of either kind."""
    return (
        f"sqlite:///{tmp_path / 'labels.db'}"
        if request.param == "sqlite"
        else request.getfixturevalue("postgres_url")
    )


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for localhost, fullchain.pem, and its key, privkey.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl not found; install Debian's package openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=localhost",
    ]
    files = folder / "fullchain.pem", folder / "privkey.pem"
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path, clock) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path / 'labels.db'}", clock=clock) as opened:
        yield opened


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Iterator[serving.Served]:
    """A module's server on loopback: no tokens."""
    with serving.running(tmp_path_factory.mktemp("local"), limits=serving.GENEROUS) as served:
        yield served


@pytest.fixture(scope="module")
def exposed(tmp_path_factory) -> Iterator[serving.Served]:
    """A module's exposed server, with tokens of an annotator, an admin and one whose access was revoked."""
    folder = tmp_path_factory.mktemp("exposed")
    with serving.running(
        folder, exposed=True, access_log=folder / "access.jsonl", limits=serving.GENEROUS
    ) as served:
        roles = {"ann": "annotator", "boss": "admin", "gone": "annotator"}
        served.tokens = {name: served.store.add_annotator(name, role) for name, role in roles.items()}
        served.store.revoke_annotator("gone")
        yield served

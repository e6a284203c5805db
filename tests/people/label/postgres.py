"""A private PostgreSQL for tests: own data folder in /tmp, Unix socket only, as an unprivileged user, gone
afterwards.

Fixtures: `postgres_server` (session), `postgres_url` (an empty schema per test: a new database would take a
second). They skip where PostgreSQL is not installed.
"""

import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REMEDY = "install Debian's package postgresql, or put initdb on the PATH"
_numbers = itertools.count(1)


def find_binaries() -> Path | None:
    """Folder with initdb and postgres: the newest of Debian's, else that on the PATH."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    if binaries:
        return binaries[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def unprivileged() -> pwd.struct_passwd | None:
    """Return the user to run the server as if this process is root, which PostgreSQL rejects; else None."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise OSError(
        "tests/people/label/postgres.py: expected a user postgres or nobody, got neither. Run the tests as an"
        " ordinary user."
    )


class PostgresServer:
    def __init__(self, folder: Path, command: list, who: dict):
        self.folder = folder
        self.command = command
        self.who = who
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder, **self.who)
        _wait(self.folder, self.process)

    def stop(self) -> None:
        self.process.send_signal(3)  # SIGQUIT
        self.process.wait(30)

    def new_database(self) -> str:
        """Make an empty schema of its own; returns a URL that sees it alone."""
        import psycopg

        name = f"test{next(_numbers)}"
        with psycopg.connect(
            f"host={self.folder} user=labels dbname=postgres", autocommit=True
        ) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"postgresql+psycopg://labels@/postgres?host={self.folder}&options=-csearch_path%3D{name}"


@contextlib.contextmanager
def run_postgres() -> Iterator[PostgresServer]:
    """Make a cluster, start a server on it, stop it at the end.

    Raises: RuntimeError with the server's log when it does not start.
    """
    binaries = find_binaries()
    user = unprivileged()
    # short: the path of a Unix socket has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="eg3d-pg-", dir="/tmp"))
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)
    try:
        subprocess.run(
            [
                binaries / "initdb",
                "-D",
                folder / "data",
                "-U",
                "labels",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            **who,
        )
        settings = [
            "listen_addresses=",
            f"unix_socket_directories={folder}",
            "max_connections=120",
            "deadlock_timeout=200ms",
        ]
        command = [
            binaries / "postgres",
            "-D",
            folder / "data",
            *(part for setting in settings for part in ("-c", setting)),
        ]
        server = PostgresServer(folder, command, who)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(folder: Path, process: subprocess.Popen, seconds: float = 30) -> None:
    import psycopg

    end = time.monotonic() + seconds
    while True:
        try:
            psycopg.connect(f"host={folder} user=labels dbname=postgres").close()
            return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"postgres did not start: {(folder / 'log').read_text()}") from error
            time.sleep(0.05)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    if find_binaries() is None:
        pytest.skip(f"PostgreSQL not found; {REMEDY}")
    pytest.importorskip("psycopg", reason="psycopg not found; pip install 'eg3d-rlhf[postgres]'")
    with run_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server) -> str:
    """URL of an empty schema of the private server."""
    return postgres_server.new_database()

"""docs/nginx.conf, as it is but for its two ports, in front of the application."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.people.label import serving
from tests.people.label.attack import any_server
from tests.people.label.test_load import free_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONFIGURATION = Path(__file__).resolve().parents[3] / "docs" / "nginx.conf"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(NGINX is None, reason="nginx not found; install Debian's package nginx-light"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl not found; install Debian's package openssl"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Debian's nginx keeps temporary files where only root may write; run the test as root"),
]


@pytest.fixture
def proxied(tmp_path):
    """A server that believes nginx, nginx in front of it, and nginx's port."""
    log, front = tmp_path / "access.jsonl", free_port()
    with serving.running(tmp_path / "server", config={"proxy": "127.0.0.1"}, exposed=True, access_log=log) as served:
        text = CONFIGURATION.read_text()
        for port, real in (("listen 8443 ", f"listen 127.0.0.1:{front} "), ("127.0.0.1:8000", urlsplit(served.url).netloc)):
            assert text.count(port) == 1
            text = text.replace(port, real)
        (tmp_path / "nginx.conf").write_text(text)
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-out", tmp_path / "fullchain.pem"]
        subprocess.run([*command, "-keyout", tmp_path / "privkey.pem"], check=True, capture_output=True)
        settings = f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/nginx.log;"
        nginx = subprocess.Popen([NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", settings], stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 10
            while socket.socket().connect_ex(("127.0.0.1", front)):
                assert nginx.poll() is None and time.monotonic() < end, (tmp_path / "nginx.log").read_text()
                time.sleep(0.05)
            yield served, front
        finally:
            nginx.terminate()
            nginx.wait(10)


def test_the_example_configuration(proxied):
    served, port = proxied
    url = f"https://127.0.0.1:{port}"
    path = httpx.HTTPTransport(verify=any_server(), local_address="127.5.6.7")
    with httpx.Client(base_url=url, transport=path, headers={"X-Forwarded-For": "6.6.6.6", "Origin": url}) as page:
        response = serving.login(page, served.store.add_annotator("ann"))
        assert response.status_code == 303 and "Secure" in response.headers["set-cookie"]
        page.headers["X-CSRF-Token"] = page.get("/api/session").json()["csrf"]
        pair = page.get("/api/assignments").json()["assignments"][0]
        assert page.get(f"/api/shapes/{pair['left']}").status_code == 200
        assert page.post("/api/judgements", content=b"x" * 70_000).status_code == 413
        slow = [ssl_socket(port) for _ in range(150)]
        for one in slow:
            one.sendall(b"GET /login HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
        began = time.monotonic()
        assert serving.answer(page, pair["assignment"], "k").status_code == 201 and time.monotonic() - began < 2
        for one in (slow[0], slow[-1], silent[0], silent[-1]):
            one.settimeout(15 - (time.monotonic() - began))
            try:
                assert one.recv(4096) == b""
            except ConnectionResetError:
                pass
        assert 8 < time.monotonic() - began < 15
        for one in (*slow, *silent):
            one.close()
    entries = [json.loads(line) for line in served.options.access_log.read_text().splitlines()]
    assert {entry["address"] for entry in entries if entry["event"] == "request"} == {"127.5.6.7"}


def ssl_socket(port: int) -> ssl.SSLSocket:
    """A connection whose handshake is done."""
    return any_server().wrap_socket(socket.create_connection(("127.0.0.1", port)))

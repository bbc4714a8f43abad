import hashlib
import os
import time

import pytest

from fastgpt.data import download
from fastgpt.data.download import fetch, get
from fastgpt.errors import UserError

DATA = os.urandom(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def url(server):
    server.files["/file.bin"] = DATA
    return f"{server.url}/file.bin"


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_comes_whole_and_once(server, url, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    for _ in range(2):
        assert fetch(url, path, sha256=SHA, size=len(DATA)) == path and server.wanted == [None]
    assert path.read_bytes() == DATA and names(path.parent) == ["file.bin"]
    path.write_bytes(DATA[:-1])
    fetch(url, path, sha256=SHA)
    assert path.read_bytes() == DATA and len(server.wanted) == 2


@pytest.mark.parametrize("size", [len(DATA), 0])
@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections_are_continued(server, url, tmp_path, size, ranges):
    server.faults, server.ranges = [100_000, 50_000], ranges
    fetch(url, tmp_path / "file.bin", sha256=SHA, size=size)
    assert (tmp_path / "file.bin").read_bytes() == DATA
    assert server.wanted == [None, "bytes=100000-", f"bytes={100_000 * ranges + 50_000}-"]


def test_a_later_run_goes_on(server, url, tmp_path):
    server.faults = [10_000, 0, 0, 0]
    with pytest.raises(UserError, match="cut off.* after 10,000 bytes, which are kept.*; do this"):
        fetch(url, tmp_path / "file.bin", sha256=SHA, hint="do this")
    assert names(tmp_path) == ["file.bin.part"]
    fetch(url, tmp_path / "file.bin", sha256=SHA)
    assert server.wanted[-1] == "bytes=10000-" and names(tmp_path) == ["file.bin"]
    assert (tmp_path / "file.bin").read_bytes() == DATA


@pytest.mark.parametrize("part", [DATA, b"other", bytes(len(DATA)), bytes(len(DATA) + 5)])
@pytest.mark.parametrize("size", [len(DATA), 0])
def test_a_part_is_taken_if_it_is_of_this_file(url, tmp_path, part, size):
    (tmp_path / "file.bin.part").write_bytes(part)
    fetch(url, tmp_path / "file.bin", sha256=SHA, size=size)
    assert (tmp_path / "file.bin").read_bytes() == DATA and names(tmp_path) == ["file.bin"]


def test_a_wrong_checksum_keeps_nothing(url, tmp_path):
    with pytest.raises(UserError, match=f"hash is {SHA[:16]}.*expected 0000.*; --input"):
        fetch(url, tmp_path / "file.bin", sha256="0" * 64, hint="--input works")
    assert names(tmp_path) == []


def test_busy_servers_are_asked_again(server, url, tmp_path):
    server.faults = ["503", "429", "500", None, "404", "404"]
    fetch(url, tmp_path / "file.bin", sha256=SHA)
    assert len(server.asked) == 4
    for call in (lambda: fetch(url, tmp_path / "other", sha256=SHA), lambda: get(url)):
        with pytest.raises(UserError, match="HTTP Error 404"):
            call()
    assert len(server.asked) == 6 and names(tmp_path) == ["file.bin"] and get(url) == DATA


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x", "http://no.such.host.invalid/x", "htp://x", "http://[", "x"]
)
def test_no_network_is_one_clear_line(server, tmp_path, url):
    for call in (
        lambda: fetch(url, tmp_path / "x", sha256=SHA, hint="--input=FILE works"),
        lambda: get(url, "--input=FILE works"),
    ):
        with pytest.raises(UserError, match="cannot download .*--input=FILE works") as e:
            call()
        assert str(e.value).startswith(f"cannot download {url}")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("code", "says"), [(28, "no space left"), (13, "cannot write .*writable")])
def test_disks_that_cannot_be_written(url, tmp_path, monkeypatch, code, says):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=says):
        fetch(url, tmp_path / "file.bin", sha256=SHA)
    assert names(tmp_path) == ["file.bin.part"]


# --- hostile servers


def endless(chunk, pause_s=0.0):
    """Answers with one chunk after another for as long as the client stays."""

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(chunk)
            time.sleep(pause_s)

    return answer


LIMIT = {"LIMIT": 500_000}
SLOW = {"WINDOW_S": 0.1, "MIN_RATE": 100_000}


@pytest.mark.parametrize(
    ("body", "size", "limits", "says"),
    [
        (endless(bytes(100_000)), 11_024, LIMIT, "/x: is longer than the 11,024 bytes"),
        (endless(bytes(100_000)), 0, LIMIT, "/x: is longer than the 500,000 bytes"),
        (endless(b"x", pause_s=0.005), 0, SLOW, "slower than 100,000 bytes per second"),
    ],
)
def test_an_endless_or_slow_body_is_given_up(
    server, tmp_path, monkeypatch, body, size, limits, says
):
    server.files["/x"] = body
    for name, value in limits.items():
        monkeypatch.setattr(download, name, value)
    with pytest.raises(UserError, match=says):
        fetch(f"{server.url}/x", tmp_path / "x", sha256=SHA, size=size)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= (size or 500_000)
    if not size:
        with pytest.raises(UserError, match=says):
            get(f"{server.url}/x")

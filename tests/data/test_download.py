import hashlib
import http.server
import os
import threading

import pytest

from fastgpt.data import download
from fastgpt.data.download import fetch, get
from fastgpt.errors import UserError

DATA = os.urandom(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `data`; `plan` holds, per request, what goes wrong: bytes sent, or a status."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.plan, self.ranges, self.asked = DATA, [], True, []
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        s = self.server
        wanted = self.headers.get("Range")
        s.asked.append(wanted)
        fault = s.plan.pop(0) if s.plan else None
        if isinstance(fault, str):
            self.send_error(int(fault))
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and s.ranges else 0
        if start >= len(s.data) and start:
            self.send_error(416)
            return
        body = s.data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(s.data) - 1}/{len(s.data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if fault is None else body[:fault])
        if fault is not None:
            self.connection.close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    s = Server()
    thread = threading.Thread(target=s.serve_forever, args=(0.01,))
    thread.start()
    yield s
    s.shutdown()
    s.server_close()
    thread.join()


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_comes_whole_and_once(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    for _ in range(2):
        assert fetch(server.url, path, sha256=SHA, size=len(DATA)) == path
    assert path.read_bytes() == DATA and names(path.parent) == ["file.bin"]
    assert server.asked == [None]


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(DATA[:-1])
    fetch(server.url, path, sha256=SHA)
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("known_size", [True, False])
def test_cut_connections_are_continued(server, tmp_path, known_size):
    server.plan = [100_000, 50_000]
    size = len(DATA) if known_size else None
    fetch(server.url, tmp_path / "file.bin", sha256=SHA, size=size)
    assert (tmp_path / "file.bin").read_bytes() == DATA
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_servers_without_ranges_start_over(server, tmp_path):
    server.plan, server.ranges = [100_000], False
    fetch(server.url, tmp_path / "file.bin", sha256=SHA)
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_a_later_run_goes_on(server, tmp_path):
    server.plan = [10_000, 0, 0, 0]
    with pytest.raises(UserError, match="cut off.* after 10,000 bytes, which are kept.*; do this"):
        fetch(server.url, tmp_path / "file.bin", sha256=SHA, hint="do this")
    assert names(tmp_path) == ["file.bin.part"]
    fetch(server.url, tmp_path / "file.bin", sha256=SHA)
    assert server.asked[-1] == "bytes=10000-" and names(tmp_path) == ["file.bin"]
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_a_complete_part_is_taken(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(DATA)
    fetch(server.url, tmp_path / "file.bin", sha256=SHA)
    assert (tmp_path / "file.bin").read_bytes() == DATA


@pytest.mark.parametrize("stale", [b"other", bytes(len(DATA)), bytes(len(DATA) + 5)])
def test_a_part_of_another_file_is_thrown_away(server, tmp_path, stale):
    (tmp_path / "file.bin.part").write_bytes(stale)
    fetch(server.url, tmp_path / "file.bin", sha256=SHA, size=len(DATA))
    assert (tmp_path / "file.bin").read_bytes() == DATA and names(tmp_path) == ["file.bin"]


def test_a_wrong_checksum_keeps_nothing(server, tmp_path):
    with pytest.raises(UserError, match=f"sha256 is {SHA[:16]}.*expected 0000.*; --input") as e:
        fetch(server.url, tmp_path / "file.bin", sha256="0" * 64, hint="--input works")
    assert names(tmp_path) == [] and "\n" not in str(e.value)


def test_busy_servers_are_asked_again(server, tmp_path):
    server.plan = ["503", "429", "500"]
    fetch(server.url, tmp_path / "file.bin", sha256=SHA)
    assert len(server.asked) == 4


def test_absent_files_are_not_asked_for_again(server, tmp_path):
    server.plan = ["404"]
    with pytest.raises(UserError, match="HTTP 404") as e:
        fetch(server.url, tmp_path / "file.bin", sha256=SHA)
    assert len(server.asked) == 1 and names(tmp_path) == [] and "\n" not in str(e.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://no.such.host.invalid/x"])
def test_no_network_is_one_clear_line(tmp_path, monkeypatch, url):
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for call in (
        lambda: fetch(url, tmp_path / "x", sha256=SHA, hint="--input=FILE works"),
        lambda: get(url, "--input=FILE works"),
    ):
        with pytest.raises(UserError, match=f"cannot download {url}.*--input=FILE works") as e:
            call()
        assert "\n" not in str(e.value)
    assert names(tmp_path) == []


def test_too_little_space_is_said_before(server, tmp_path):
    with pytest.raises(UserError, match="needs 1000000000.0 GB.*--data_dir"):
        fetch(server.url, tmp_path / "x", sha256=SHA, size=10**18)
    assert server.asked == []


def test_a_disk_that_fills_up(server, full_disk):
    folder = full_disk(128 << 10)
    with pytest.raises(UserError, match="no space left"):
        fetch(server.url, folder / "file.bin", sha256=SHA)
    assert "file.bin" not in names(folder)


def test_a_read_only_folder(server, tmp_path, read_only):
    read_only(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        fetch(server.url, tmp_path / "file.bin", sha256=SHA)


def test_small_documents(server):
    server.data = b"[1, 2]"
    assert get(server.url) == b"[1, 2]"
    server.plan = ["404"]
    with pytest.raises(UserError, match="HTTP 404"):
        get(server.url)

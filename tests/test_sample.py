"""The sample is fetched from a server when asked, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from wsi_brush import sample
from wsi_brush.errors import MachineError, RefusedError

CONTENT = bytes(range(256)) * 400
REAL = Path(__file__).parents[1] / "../shared/data/slides" / sample.NAME


class Server(ThreadingHTTPServer):
    """Answers with `content`; says that it is `length` long."""

    content, length, asked = CONTENT, len(CONTENT), 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/slides/"


class Answer(BaseHTTPRequestHandler):
    """The file, where it is asked for by its name."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(200 if self.path == f"/slides/{sample.NAME}" else 404)
        self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on this machine that has the file which the digest asks for."""
    monkeypatch.setattr(sample, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = Server(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def test_it_is_fetched_once(tmp_path: Path, server: Server) -> None:
    target = tmp_path / "new" / "folder" / "a slide.svs"
    assert sample.fetch_sample(target, source=server.address) == (target, True)
    assert target.read_bytes() == CONTENT
    assert target.stat().st_mode & 0o444 == 0o444
    assert sample.fetch_sample(target, source=server.address) == (target, False)
    assert server.asked == 1
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a slide.svs"]


def test_a_folder_and_the_users_cache(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SOURCE", server.address.rstrip("/"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert sample.fetch_sample(tmp_path) == (tmp_path / sample.NAME, True)
    path, fetched = sample.fetch_sample()
    assert fetched
    assert path == sample.sample_path()
    assert path.name == sample.NAME
    if sys.platform.startswith("linux"):
        assert path.is_relative_to(tmp_path / "cache" / "wsi-brush")


@pytest.mark.parametrize(
    ("content", "length", "line"),
    [
        (CONTENT[:5000], len(CONTENT), "cannot be fetched"),  # cut, and the server had said how long it is
        (CONTENT[:5000], 5000, "gives another file"),
        (CONTENT[:-1] + b"x", len(CONTENT), "gives another file"),
    ],
)
def test_what_is_cut_or_another_file_is_refused_and_not_kept(
    tmp_path: Path, server: Server, content: bytes, length: int, line: str
) -> None:
    server.content, server.length = content, length
    with pytest.raises((MachineError, RefusedError), match=line):
        sample.fetch_sample(tmp_path / "new" / "x.svs", source=server.address)
    assert server.asked == 1
    assert not list(tmp_path.iterdir())


def test_a_mirror_without_it(tmp_path: Path, server: Server) -> None:
    with pytest.raises(MachineError, match="HTTP 404"):
        sample.fetch_sample(tmp_path / "x.svs", source=server.address.replace("slides", "none"))


def test_another_file_of_that_name_stays_as_it_is(tmp_path: Path, server: Server) -> None:
    (tmp_path / "x.svs").write_bytes(b"mine")
    with pytest.raises(RefusedError, match=r"another file is there .*remove it or choose another name"):
        sample.fetch_sample(tmp_path / "x.svs", source=server.address)
    assert (tmp_path / "x.svs").read_bytes() == b"mine"
    assert server.asked == 0


def test_where_nothing_can_be_written(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written"):
        sample.fetch_sample(tmp_path / "file" / "x.svs", source=server.address)


def run(*words: Any, source: str, digest: str) -> subprocess.CompletedProcess[str]:
    """The command, asking this machine in place of OpenSlide's."""
    code = (
        f"from wsi_brush import sample; sample.SOURCE, sample.SHA256 = {source!r}, {digest!r}; "
        "from wsi_brush.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "sample", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_words(tmp_path: Path, server: Server) -> None:
    target, given = tmp_path / "x.svs", {"source": server.address, "digest": sample.SHA256}
    done = run("-o", target, "--json", **given)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert (said["path"], said["fetched"], said["sha256"]) == (str(target), True, sample.SHA256)
    assert "CC0" in said["licence"]
    again = run("-o", target, **given)
    assert "there already" in again.stdout
    assert f"wsi-brush synthesize --ref {target}" in again.stdout
    assert server.asked == 1


def test_offline_is_one_line(tmp_path: Path, server: Server) -> None:
    nobody = "http://127.0.0.1:9/"
    done = run("-o", tmp_path / "x.svs", source=nobody, digest=sample.SHA256)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"wsi-brush: {nobody}{sample.NAME}: cannot be fetched (ConnectionError); ")
    assert not list(tmp_path.iterdir())


@pytest.mark.real
def test_the_digest_is_that_of_the_real_file() -> None:
    if not REAL.is_file():
        pytest.skip(f"no {REAL}")
    content = REAL.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (sample.BYTES, sample.SHA256)

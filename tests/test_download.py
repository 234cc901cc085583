"""Downloads from a real server on this machine that misbehaves on purpose."""

from __future__ import annotations

import hashlib
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from suanli.core.errors import DownloadError, StorageError
from suanli.core.types import Download
from suanli.data.download import fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
HALF = len(CONTENT) // 2


class _Handler(BaseHTTPRequestHandler):
    server: Publisher

    def do_GET(self) -> None:
        publisher = self.server
        with publisher.lock:
            publisher.ranges.append(self.headers.get("Range"))
            number = len(publisher.ranges)
        publisher.answer(self, number)

    def log_message(self, *_: object) -> None:
        pass

    @property
    def start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def whole(self, content: bytes = CONTENT) -> None:
        self.head(200, Content_Length=len(content))
        self.wfile.write(content)

    def proper(self, content: bytes = CONTENT) -> None:
        """As a good server answers, with or without Range."""
        if not self.start:
            return self.whole(content)
        rest = content[self.start :]
        span = f"bytes {self.start}-{len(content) - 1}/{len(content)}"
        self.head(206, Content_Length=len(rest), Content_Range=span)
        self.wfile.write(rest)
        return None

    def cut_at(self, count: int, content: bytes = CONTENT) -> None:
        """Promises everything, sends `count` bytes and hangs up."""
        self.head(200, Content_Length=len(content))
        self.wfile.write(content[:count])
        self.close_connection = True


@dataclass
class _State:
    answer: Callable[[_Handler, int], None] = lambda handler, _: handler.proper()
    ranges: list[str | None] = field(default_factory=list)  # of each request
    lock: threading.Lock = field(default_factory=threading.Lock)


class Publisher(_State, ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        _State.__init__(self)
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some of these tests are about."""

    def url(self, name: str = "data.bin") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/sets/{name}"


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Publisher() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download(url: str, content: bytes = CONTENT, algorithm: str = "sha256") -> Download:
    digest = hashlib.new(algorithm, content).hexdigest()
    return Download(url=url, checksum=f"{algorithm}:{digest}", size_bytes=len(content))


def get(publisher: Publisher, folder: Path, *, timeout_s: float = 5.0, attempts: int = 3) -> Path:
    return fetch(download(publisher.url()), folder, timeout_s=timeout_s, attempts=attempts, pause_s=0.01)


def part_of(folder: Path) -> Path:
    return folder / "data.bin.part"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_file_is_downloaded_once(publisher: Publisher, tmp_path: Path, algorithm: str) -> None:
    wanted = download(publisher.url(), algorithm=algorithm)
    seen: list[float] = []
    path = fetch(wanted, tmp_path / "new" / "folder", report=seen.append)
    assert path == tmp_path / "new" / "folder" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)
    assert fetch(wanted, path.parent) == path
    assert len(publisher.ranges) == 1
    assert left(path.parent) == ["data.bin"]


def test_continues_after_a_cut_connection(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answer = lambda handler, n: handler.cut_at(HALF) if n == 1 else handler.proper()
    assert get(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.ranges == [None, f"bytes={HALF}-"]


def test_a_later_call_continues_an_earlier_one(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answer = lambda handler, n: handler.cut_at(HALF) if n == 1 else handler.proper()
    with pytest.raises(DownloadError, match=r"ended after 524\.3 kB of 1\.0 MB") as error:
        get(publisher, tmp_path, attempts=1)
    assert str(tmp_path / "data.bin") in error.value.fix
    assert part_of(tmp_path).read_bytes() == CONTENT[:HALF]
    assert get(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.ranges[1] == f"bytes={HALF}-"


def test_a_server_that_ignores_range_starts_again(publisher: Publisher, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(b"x" * HALF)
    publisher.answer = lambda handler, _: handler.whole()
    assert get(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.ranges == [f"bytes={HALF}-"]


@pytest.mark.parametrize("span", ["bytes 999999-1048575/1048576", "bytes 524288-1048575/77", "", "nonsense"])
def test_a_wrong_content_range_starts_again(publisher: Publisher, tmp_path: Path, span: str) -> None:
    def answer(handler: _Handler, number: int) -> None:
        if number > 1:
            return handler.proper()
        handler.head(206, Content_Length=HALF, Content_Range=span)
        handler.wfile.write(CONTENT[HALF:])
        return None

    part_of(tmp_path).write_bytes(CONTENT[:HALF])
    publisher.answer = answer
    assert get(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.ranges == [f"bytes={HALF}-", None]


def test_a_range_from_earlier_on_is_used_from_there(publisher: Publisher, tmp_path: Path) -> None:
    def answer(handler: _Handler, _: int) -> None:
        handler.head(206, Content_Length=len(CONTENT) - 100, Content_Range="bytes 100-1048575/1048576")
        handler.wfile.write(CONTENT[100:])

    part_of(tmp_path).write_bytes(CONTENT[:HALF])
    publisher.answer = answer
    assert get(publisher, tmp_path).read_bytes() == CONTENT


def test_a_refused_range_starts_again(publisher: Publisher, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(b"y" * HALF)
    publisher.answer = lambda handler, n: handler.head(416) if n == 1 else handler.proper()
    assert get(publisher, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [HALF, len(CONTENT), len(CONTENT) + 9])
def test_a_part_of_something_else_is_replaced(publisher: Publisher, tmp_path: Path, size: int) -> None:
    part_of(tmp_path).write_bytes(b"z" * size)
    assert get(publisher, tmp_path).read_bytes() == CONTENT


def test_wrong_bytes_are_refused_and_removed(publisher: Publisher, tmp_path: Path) -> None:
    wrong = b"?" * len(CONTENT)
    publisher.answer = lambda handler, _: handler.proper(wrong)
    with pytest.raises(DownloadError) as error:
        get(publisher, tmp_path)
    expected, got = (download("", content).checksum for content in (CONTENT, wrong))
    assert expected in str(error.value)
    assert got in str(error.value)
    assert str(tmp_path / "data.bin") in error.value.fix
    assert left(tmp_path) == []
    assert len(publisher.ranges) == 1


@pytest.mark.parametrize("stated", [True, False])
def test_never_more_than_the_expected_size(publisher: Publisher, tmp_path: Path, stated: bool) -> None:
    def answer(handler: _Handler, _: int) -> None:
        handler.head(200, **({"Content_Length": len(CONTENT) * 8} if stated else {}))
        handler.wfile.write(CONTENT * 8)
        handler.close_connection = True

    publisher.answer = answer
    with pytest.raises(DownloadError, match="expected"):
        get(publisher, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= len(CONTENT)
    assert not (tmp_path / "data.bin").exists()


def test_a_page_instead_of_the_file_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answer = lambda handler, _: handler.whole(b"<html>Please log in</html>")
    with pytest.raises(DownloadError, match="26 bytes"):
        get(publisher, tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(publisher: Publisher, tmp_path: Path, status: int) -> None:
    publisher.answer = lambda handler, _: handler.head(status)
    with pytest.raises(DownloadError, match=str(status)) as error:
        get(publisher, tmp_path)
    assert publisher.url() in error.value.message
    assert len(publisher.ranges) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_temporary_error_is_tried_again(publisher: Publisher, tmp_path: Path, status: int) -> None:
    publisher.answer = lambda handler, n: handler.head(status) if n < 3 else handler.proper()
    assert get(publisher, tmp_path).read_bytes() == CONTENT


def test_tries_are_bounded(publisher: Publisher, tmp_path: Path) -> None:
    publisher.answer = lambda handler, _: handler.head(500)
    with pytest.raises(DownloadError, match=r"500.*tried 3 times"):
        get(publisher, tmp_path)
    assert len(publisher.ranges) == 3


@pytest.mark.parametrize("after_head", [True, False])
def test_a_silent_server_is_given_up(publisher: Publisher, tmp_path: Path, after_head: bool) -> None:
    release = threading.Event()

    def answer(handler: _Handler, _: int) -> None:
        if after_head:
            handler.head(200, Content_Length=len(CONTENT))
            handler.wfile.write(CONTENT[:10])
            handler.wfile.flush()
        release.wait(10)

    publisher.answer = answer
    with pytest.raises(DownloadError, match="timed out"):
        get(publisher, tmp_path, timeout_s=0.2, attempts=2)
    release.set()


def test_redirects_are_followed(publisher: Publisher, tmp_path: Path) -> None:
    def answer(handler: _Handler, _: int) -> None:
        if handler.path.startswith("/sets"):
            return handler.head(302, Location="/elsewhere/data.bin", Content_Length=0)
        return handler.proper()

    publisher.answer = answer
    assert get(publisher, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x", "/sets/data.bin"])
def test_redirects_lead_only_to_the_web_and_end(publisher: Publisher, tmp_path: Path, location: str) -> None:
    publisher.answer = lambda handler, _: handler.head(302, Location=location, Content_Length=0)
    with pytest.raises(DownloadError):
        get(publisher, tmp_path)
    assert len(publisher.ranges) < 20


def test_no_network_names_the_address_and_the_fix(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.bin"
        with pytest.raises(DownloadError, match="no connection") as error:
            fetch(download(url), tmp_path, attempts=2, pause_s=0.01)
    assert url in error.value.message
    assert str(tmp_path / "data.bin") in error.value.fix


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a/b", "data.bin", "https://a/", "http:///x", "https://a/.."]
)
def test_only_web_addresses_of_files(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="not the address"):
        fetch(download(url), tmp_path)


def test_a_file_put_there_by_hand_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(CONTENT)
    assert fetch(download("https://nowhere.invalid/data.bin"), tmp_path).read_bytes() == CONTENT
    assert left(tmp_path) == ["data.bin"]


def test_a_wrong_file_with_its_name_is_replaced(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"old" * 1000)
    assert get(publisher, tmp_path).read_bytes() == CONTENT


def test_a_wrong_file_stays_if_the_download_fails(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"old")
    publisher.answer = lambda handler, _: handler.head(404)
    with pytest.raises(DownloadError):
        get(publisher, tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"old"


def test_a_target_that_is_no_folder(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as error:
        get(publisher, tmp_path / "file" / "data")
    assert error.value.exit_code == 4


def test_no_space_left(publisher: Publisher, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, before[1]))
    try:
        with pytest.raises(StorageError, match=r"data\.bin\.part"):
            get(publisher, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "data.bin").exists()
    assert get(publisher, tmp_path).read_bytes() == CONTENT


def test_two_processes_download_once(publisher: Publisher, tmp_path: Path) -> None:
    def slowly(handler: _Handler, _: int) -> None:
        time.sleep(1.0)  # long enough for the second process to come
        handler.proper()

    publisher.answer = slowly
    wanted = download(publisher.url())
    program = (
        "import sys; from pathlib import Path; from suanli.data.download import fetch; "
        "from suanli.core.types import Download; "
        "fetch(Download(url=sys.argv[1], checksum=sys.argv[2], size_bytes=int(sys.argv[3])), Path(sys.argv[4]))"
    )
    command = [sys.executable, "-c", program, wanted.url, wanted.checksum, str(wanted.size_bytes), str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(publisher.ranges) == 1
    assert left(tmp_path) == ["data.bin"]

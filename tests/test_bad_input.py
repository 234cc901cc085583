"""Bad input as a user meets it: through the command line, on real files, servers, mounts and processes.

Each must end with its exit code and one paragraph that says what was given and what to do, and
lose nothing: no file that was there changes, nothing half-written has a final name, and a run that
never started leaves no directory.
"""

from __future__ import annotations

import hashlib
import http.server
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from suanli.cli import main
from suanli.core.errors import BadInput
from suanli.core.run import Run
from suanli.core.types import Download
from suanli.data.decode import decode
from suanli.data.download import fetch
from suanli.data.readers import _archives
from suanli.machine import device
from suanli.training.trainer import checkpoint

Folder = Callable[..., Path]
Refused = Callable[..., str]
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has what this is about")
NET = (
    "from torch import nn\n"
    "def tiny(classes, in_channels, image_size, width=4):\n"
    "    h, w = image_size\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * h * w, width), nn.Linear(width, classes))\n"
)


def call(*arguments: str | Path) -> int:
    """Runs the command line in this process; its exit code. The network of these tests is their own code."""
    trust = ["--trust-code"] if arguments[0] in ("train", "run", "evaluate", "predict") else []
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments] + trust)
    return int(stopped.value.code or 0)


def files_below(top: Path) -> dict[str, str]:
    """Every file that a user could miss, by its content; locks and prepared data can be made again."""
    digests = {}
    for folder, folders, names in os.walk(top):
        if Path(folder) == top:
            folders[:] = [f for f in folders if f not in ("cache", "datasets")]
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not name.endswith(".lock") and "__pycache__" not in path.parts:
                digests[os.fsdecode(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def assert_one_paragraph(stderr: str) -> None:
    """The last thing on standard error: 'suanli: what is wrong. What to do.'"""
    assert "Traceback" not in stderr
    assert stderr.count("suanli: ") == 1, stderr
    paragraph = stderr[stderr.index("suanli: ") :].rstrip("\n")
    assert "\n\n" not in paragraph
    assert re.search(r"[.:)\d/'\"\w]$", paragraph)
    assert len(re.findall(r"[.:?] ?", paragraph)) >= 2, f"no fix in: {paragraph}"


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Calls the command line, which must refuse with that code, those words, and without a trace."""

    def check(*arguments: str | Path, code: int, says: tuple[str, ...] | str) -> str:
        before = files_below(tmp_path)
        capsys.readouterr()
        assert call(*arguments) == code, capsys.readouterr().err
        stderr = capsys.readouterr().err
        assert_one_paragraph(stderr)
        for words in [says] if isinstance(says, str) else says:
            assert words in stderr
        assert files_below(tmp_path) == before
        assert not (tmp_path / "runs").exists()
        assert not list(tmp_path.rglob(".*.tmp"))
        return stderr

    return check


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Options for a training of a few milliseconds."""
    (tmp_path / "mynet.py").write_text(NET)
    return ["--model", "mynet:tiny", "--epochs", "1", "--threads", "1"]


def process(*arguments: str | Path, before: str = "", **options: object) -> subprocess.Popen[str]:
    """The command line in a process of its own, after the Python code `before`."""
    code = f"import sys\n{before}\nfrom suanli.cli import main\nmain(sys.argv[1:])"
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code, *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def ended(started: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said on standard error."""
    _, stderr = started.communicate(timeout=120)
    return started.returncode, stderr


@contextmanager
def small_disk(place: Path, *, size: str = "1m", options: str = "rw") -> Iterator[Path]:
    """A real file system of that size."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "suanli-test", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))


# --- paths, folders, classes, pictures --------------------------------------------------------


@pytest.mark.parametrize("verb", ["prepare", "train", "run"])
def test_a_path_that_does_not_exist(verb: str, refused: Refused) -> None:
    refused(verb, "nowhere/at/all", code=3, says=("no file or folder nowhere/at/all", "Built in: "))


def test_a_folder_of_runs_is_no_data(refused: Refused) -> None:
    for name in ("digits-1", "digits-2"):
        Path("kept", name).mkdir(parents=True)
        Path("kept", name, "recipe.json").write_text("{}")
    refused("train", "kept", code=2, says="kept holds runs, not data. To resume a run, name it, such as kept/digits-2.")


def test_data_in_the_place_of_a_model(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK")
    refused(
        "optimize", "photos.zip", code=3, says="no model (no model.json). Give a run directory or its model/ folder."
    )
    refused("predict", "photos.zip", "x", code=3, says="If this is data, train first: suanli train photos.zip")
    refused("predict", "digits", "x", code=3, says="Train first: suanli train digits")


def test_a_run_that_does_not_exist(refused: Refused) -> None:
    refused("evaluate", "nowhere", code=3, says="not a run directory")
    refused("report", "nowhere", code=3, says="nowhere")
    refused("predict", "nowhere", "x.png", code=3, says="nothing at nowhere")


@pytest.mark.parametrize("verb", ["prepare", "train", "run"])
def test_folders_without_two_classes(verb: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused(verb, "empty", code=3, says=("empty", "class folders"))
    (tmp_path / "single" / "cat").mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / "single" / "cat" / f"{i}.png")
    refused(verb, "single", code=3, says=("only one class, 'cat'", "at least two"))


def test_a_class_with_one_image(picture_folder: Folder, refused: Refused) -> None:
    root = picture_folder()
    (root / "lonely").mkdir()
    Image.new("RGB", (12, 12), (9, 9, 9)).save(root / "lonely" / "one.png")
    refused("train", root, code=3, says=("Class 'lonely' has a single usable example", "add more of that class"))


def whole_jpeg(folder: Path) -> bytes:
    Image.effect_noise((64, 64), 80).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    return content


@pytest.mark.parametrize(
    "kind", ["zero bytes", "truncated png", "truncated jpeg", "corrupt", "text", "too many pixels"]
)
def test_a_file_that_is_no_picture(
    kind: str, picture_folder: Folder, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    root = picture_folder()
    png, jpeg = (root / "class1" / "000.png").read_bytes(), whole_jpeg(tmp_path)
    bad = root / "class0" / "bad.jpg"
    if kind == "too many pixels":
        Image.new("1", (20_000, 10_000)).save(bad, "PNG")
        assert bad.stat().st_size < 100_000
    else:
        contents = {
            "zero bytes": b"",
            "truncated png": png[: len(png) // 2],
            "truncated jpeg": jpeg[: len(jpeg) // 2],
            "corrupt": png[:60] + bytes(len(png) - 60),
            "text": b"This is no picture.",
        }
        bad.write_bytes(contents[kind])
    refused("train", root, code=3, says=("1 of 61 examples", "class0/bad.jpg: ", "--max-bad 0.03"))
    assert call("prepare", root, "--max-bad", "0.03") == 0
    assert "1 example left out, can't be decoded: class0/bad.jpg" in capsys.readouterr().err


# --- archives and tables ------------------------------------------------------------------------


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../escaped.png", "/escaped.png", "a/../../escaped.png", "C:/escaped.png"])
def test_an_archive_that_leads_out_of_itself(name: str, tmp_path: Path, refused: Refused) -> None:
    pictures = {f"{c}/{i}.png": b"x" for c in "ab" for i in range(3)}
    refused("prepare", zipped(tmp_path / "z.zip", pictures | {name: b"x"}), code=3, says=(name, "leads out of it"))
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        for member in [*pictures, name]:
            archive.addfile(tarfile.TarInfo(member))
    refused("prepare", tmp_path / "t.tar.gz", code=3, says=(name, "leads out of it"))


def test_an_archive_that_is_a_bomb(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zipped(tmp_path / "bomb.zip", {"a/1.png": bytes(20_000_000), "b/1.png": b"x"})
    refused("prepare", bomb, code=3, says=("decompression bomb", "unpack it and give the folder"))
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        (tmp_path / "zeros").write_bytes(bytes(20_000_000))
        archive.add(tmp_path / "zeros", "a/1.png")
    refused("prepare", tmp_path / "bomb.tar.gz", code=3, says="decompression bomb")
    monkeypatch.setattr(_archives, "MAX_MEMBERS", 100)  # 10 million would take minutes to write
    many = zipped(tmp_path / "many.zip", {f"{'ab'[i % 2]}/{i}.png": b"" for i in range(101)})
    refused("prepare", many, code=3, says=("more than 100 members", "Unpack it"))
    monkeypatch.setattr(_archives, "MAX_MEMBER_BYTES", 1000)
    large = zipped(tmp_path / "large.zip", {"a/1.png": os.urandom(1001), "b/1.png": b""})
    refused("prepare", large, code=3, says="the limit for one file is")


def test_an_archive_that_is_cut_short(tmp_path: Path, refused: Refused) -> None:
    whole = zipped(tmp_path / "w.zip", {f"{c}/{i}.png": os.urandom(50) for c in "ab" for i in range(9)}).read_bytes()
    (tmp_path / "short.zip").write_bytes(whole[: len(whole) // 2])
    refused("train", "short.zip", code=3, says=("damaged, cut short", "Get it again"))
    (tmp_path / "text.zip").write_text("not an archive")
    refused("train", "text.zip", code=3, says="damaged, cut short, or not what its name says")


def test_a_table_with_missing_columns_or_files(picture_folder: Folder, refused: Refused) -> None:
    root = picture_folder()
    paths = sorted(root.rglob("*.png"))
    table = root.parent / "table.csv"
    table.write_text("path,colour\n" + "".join(f"{p},a,\n" for p in paths))
    refused("train", table, code=3, says=table.name)
    table.write_text("path,colour,size\n" + "".join(f"{p},{p.parent.name},1\n" for p in paths))
    refused("train", table, code=3, says=("no label column", "path, colour, size", "--label-column"))
    refused("train", table, "--label-column", "color", code=2, says="Did you mean 'colour'")
    table.write_text("path,label\n" + "".join(f"gone/{p.name},{p.parent.name}\n" for p in paths))
    refused("train", table, code=3, says=("None of the first 20 files", "gone/000.png", "relative to"))
    table.write_text("path,label\n" + "".join(f"{p},{p.parent.name}\n" for p in [*paths, root / "gone.png"]))
    refused("train", table, code=3, says=("1 of 61 examples", "gone.png: No such file", "--max-bad"))
    table.write_text("path,label\n")
    refused("train", table, code=3, says="table.csv")
    table.write_text("")
    refused("train", table, code=3, says="table.csv")


# --- downloads ----------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes a server on this machine the publisher of `mnist`; it answers as the test says."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch.__kwdefaults__ is not None
    monkeypatch.setitem(fetch.__kwdefaults__, "pause_s", 0.01)
    servers = []

    def publish(*, content: bytes, sends: bytes, status: int = 200) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(sends)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        publish_at(monkeypatch, server.server_address[1], content)

    yield publish
    for server in servers:
        server.shutdown()
        server.server_close()


def publish_at(monkeypatch: pytest.MonkeyPatch, port: int, content: bytes) -> None:
    mnist = importlib.import_module("suanli.data.datasets.mnist")
    download = Download(
        url=f"http://127.0.0.1:{port}/mnist/images.gz",
        checksum=f"sha256:{hashlib.sha256(content).hexdigest()}",
        size_bytes=len(content),
    )
    monkeypatch.setattr(mnist, "DATASET", replace(mnist.DATASET, downloads=(download,)))


@pytest.mark.parametrize(
    ("status", "sends", "says"),
    [
        (200, b"y" * 1000, "checksum"),
        (403, b"x" * 1000, "403 Forbidden"),
        (404, b"x" * 1000, "404 Not Found"),
        (503, b"x" * 1000, "503 Service Unavailable (tried 4 times)"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_a_download_that_fails(
    verb: str, status: int, sends: bytes, says: str, published: Callable[..., None], refused: Refused
) -> None:
    published(content=b"x" * 1000, sends=sends, status=status)
    refused(verb, "mnist", "--data-dir", "kept", code=3, says=("127.0.0.1", says, "put it at", "kept/mnist/images.gz."))
    assert not Path("kept/mnist/images.gz").exists()


def test_a_download_cut_short(
    published: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    published(content=b"x" * 1000, sends=b"x" * 500)
    assert call("train", "mnist", "--data-dir", "kept") == 3
    stderr = capsys.readouterr().err
    assert_one_paragraph(stderr)
    assert "connection ended after 500 B of 1.0 kB (tried 4 times)" in stderr
    assert "a partial download is resumed" in stderr
    # What came is kept, under a name that says what it is.
    assert Path("kept/mnist/images.gz.part").read_bytes() == b"x" * 500
    assert len(files_below(tmp_path)) == 1


def test_no_network(refused: Refused, monkeypatch: pytest.MonkeyPatch, published: object) -> None:  # noqa: ARG001
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        publish_at(monkeypatch, taken.getsockname()[1], b"x")
        refused("train", "mnist", code=3, says=("Connection refused", "Try again later", "put it at"))


# --- no space, no permission --------------------------------------------------------------------


def test_no_space_while_preparing(picture_folder: Folder, tmp_path: Path, refused: Refused) -> None:
    root = picture_folder(each=100, size=(48, 48))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    before = files_below(tmp_path)
    code, stderr = ended(process("train", root, "--cache-dir", "made", before=limit))
    assert code == 4, stderr
    assert_one_paragraph(stderr)
    assert "Can't write" in stderr
    assert files_below(tmp_path) == before
    assert all(path.suffix == ".lock" for path in Path("made/prepared").iterdir())
    with small_disk(tmp_path / "disk") as disk:
        refused("prepare", root, "--cache-dir", disk, code=4, says=("1.4 MB", "disk", "--cache-dir"))
        assert files_below(disk) == {}


def test_no_space_for_a_checkpoint(
    picture_folder: Folder, tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints before stay, and the run goes on from there once there is space."""
    with small_disk(tmp_path / "disk") as disk:  # room for two checkpoints of 0.4 MB, not for three
        options = [*tiny, "--set", "model_args.width=80", "--out", disk / "run", "--checkpoint-every-s", "0"]
        assert call("train", picture_folder(), *options, "--epochs", "9") == 4
        stderr = capsys.readouterr().err
        assert_one_paragraph(stderr)
        assert "checkpoints/step-00000003.safetensors: No space left" in stderr
        assert "Free some space" in stderr
        assert not list(disk.rglob("*.tmp"))
        assert not (disk / "run" / "model").exists()
        kept = sorted((disk / "run" / "checkpoints").iterdir())
        assert [checkpoint.read(path).step for path in kept] == [1, 2]
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert call("train", disk / "run") == 0
        assert "going on from step 2" in capsys.readouterr().err


def test_no_space_for_the_report(
    picture_folder: Folder, tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", size="3m") as disk:
        assert call("run", picture_folder(), *tiny, "--out", disk / "run") == 0
        fill(disk)
        before = files_below(disk)
        capsys.readouterr()
        assert call("report", disk / "run") == 4
        stderr = capsys.readouterr().err
        assert_one_paragraph(stderr)
        assert "No space left" in stderr
        assert call("evaluate", disk / "run") == 4
        assert files_below(disk) == before


@linux_only
def test_where_nothing_may_be_written(
    picture_folder: Folder, tmp_path: Path, tiny: list[str], refused: Refused
) -> None:
    root = picture_folder()
    refused("train", root, *tiny, "--out", "/proc/suanli/run", code=4, says=("Can't write /proc/suanli", "Choose a"))
    refused("prepare", root, "--cache-dir", "/proc/suanli", code=4, says="Can't write /proc/suanli")
    Path("file").write_text("precious")
    refused("train", root, *tiny, "--out", "file/run", code=4, says="Can't write file/run")
    refused("train", root, *tiny, "--out", "x" * 300, code=4, says="File name too long")
    refused("train", root, *tiny, "--out", "file", code=2, says="Choose a new --out")
    with small_disk(tmp_path / "disk", options="ro") as disk:
        refused("train", root, *tiny, "--out", disk / "run", code=4, says=("Read-only file system", str(disk)))
        refused("prepare", root, "--cache-dir", disk, code=4, says="Read-only file system")
    assert call("run", root, *tiny, "--out", "made") == 0
    refused("report", "made", "--out", "/proc/suanli.html", code=4, says="Can't write /proc/suanli.html")


# --- runs and checkpoints -----------------------------------------------------------------------


def test_a_run_that_another_process_writes(
    picture_folder: Folder, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: a billion epochs can be stopped at once, and nothing but the last steps is lost."""
    options = [*tiny, "--out", "busy", "--checkpoint-every-s", "0", "--epochs", "1e9"]
    other = process("train", picture_folder(), *options)
    try:
        wait_for(lambda: bool(list(Path("busy").glob("checkpoints/step-*"))), other)
        assert call("train", "busy") == 4
        stderr = capsys.readouterr().err
        assert_one_paragraph(stderr)
        assert "Another process is writing busy. Wait until it ends" in stderr
        assert call("train", "pictures", *options) == 2
        assert "exists and is not an empty directory" in capsys.readouterr().err
        assert call("report", "busy") == 0  # reading is allowed
        other.send_signal(signal.SIGINT)
        code, stderr = ended(other)
    finally:
        other.kill()
    assert code == 130
    assert_one_paragraph(stderr)
    assert "suanli train busy" in stderr
    saved = checkpoint.read_newest(Path("busy/checkpoints"))
    assert saved is not None
    assert f"at step {saved.step} of" in stderr


def wait_for(reached: Callable[[], bool], other: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not reached():
        assert other.poll() is None, other.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_trainings_into_the_same_directory_at_once(picture_folder: Folder, tiny: list[str]) -> None:
    root = picture_folder()
    both = [process("train", root, *tiny, "--out", "one", "--seed", str(i)) for i in range(2)]
    ends = [ended(p) for p in both]
    assert sorted(code for code, _ in ends) in ([0, 2], [0, 4]), ends
    winner = [code for code, _ in ends].index(0)
    assert_one_paragraph(ends[1 - winner][1])
    assert json.loads(Path("one/recipe.json").read_text())["seed"] == winner
    assert json.loads(Path("one/model/model.json").read_text())["recipe"]["seed"] == winner


def test_checkpoints_cut_short(
    picture_folder: Folder, tiny: list[str], refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", picture_folder(), *tiny, "--epochs", "3", "--out", "run", "--checkpoint-every-s", "0") == 0
    saved = sorted(Path("run/checkpoints").glob("step-*"))
    assert len(saved) == 2
    Path("run/summary.json").write_text('{"status": "interrupted"}')
    os.truncate(saved[1], 100)
    os.truncate(saved[0], saved[0].stat().st_size - 1)
    refused("train", "run", code=3, says=(f"checkpoint {saved[0]} is damaged", "train again"))
    refused("report", "nothing", code=3, says="nothing")
    assert call("report", "run") == 0
    saved[0].unlink()
    saved[1].unlink()
    capsys.readouterr()
    assert call("train", "run") == 0  # from the start


def test_only_the_newest_checkpoint_cut_short(
    picture_folder: Folder, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", picture_folder(), *tiny, "--epochs", "3", "--out", "run", "--checkpoint-every-s", "0") == 0
    whole = Path("run/model/weights.safetensors").read_bytes()
    before, newest = sorted(Path("run/checkpoints").glob("step-*"))
    Path("run/summary.json").write_text('{"status": "interrupted"}')
    newest.write_bytes(newest.read_bytes()[:100])
    capsys.readouterr()
    assert call("train", "run") == 0
    stderr = capsys.readouterr().err
    assert f"{newest} is damaged" in stderr
    assert f"going on from step {int(before.stem[5:])}" in stderr
    assert Path("run/model/weights.safetensors").read_bytes() == whole


def test_files_of_a_run_that_are_damaged(picture_folder: Folder, tiny: list[str], refused: Refused) -> None:
    assert call("run", picture_folder(), *tiny, "--out", "run") == 0
    for name, verbs in {
        "model/weights.safetensors": ["evaluate", "predict"],
        "model/model.json": ["evaluate", "predict"],
        "data.json": ["evaluate"],
        "recipe.json": ["train", "report"],
    }.items():
        path = Path("run") / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for verb in verbs:
            more = {"predict": ["pictures"], "train": ["--more-epochs", "1"]}.get(verb, [])
            refused(verb, "run", *more, code=3, says="run")
        path.write_bytes(whole)


# --- weights ------------------------------------------------------------------------------------


def test_weights_that_can_not_be_used(
    picture_folder: Folder, tiny: list[str], refused: Refused, tmp_path: Path
) -> None:
    root = picture_folder()
    save_file({"other.weight": torch.zeros(2)}, "other.safetensors")
    whole = Path("other.safetensors").read_bytes()
    Path("short.safetensors").write_bytes(whole[:-1])
    Path("text.safetensors").write_text("weights")
    Path("empty.safetensors").write_bytes(b"")
    save_file({"1.weight": torch.full((4, 432), torch.nan)}, "nan.safetensors")
    torch.save({"1.weight": torch.zeros(4, 432)}, "pickle.pt")
    os.rename("pickle.pt", "disguised.safetensors")
    torch.save({"1.weight": torch.zeros(4, 432)}, "pickle.pt")
    (tmp_path / "folder").mkdir()

    def refuses(name: str, code: int, *says: str) -> None:
        refused("train", root, *tiny, "--weights", name, code=code, says=(name, *says))

    refuses("other.safetensors", 3, "doesn't fit the model", "--model")
    refuses("short.safetensors", 3, "not a complete safetensors file", "again")
    refuses("text.safetensors", 3, "not a complete safetensors file")
    refuses("empty.safetensors", 3, "not a complete safetensors file")
    refuses("disguised.safetensors", 3, "not a complete safetensors file")
    refuses("nan.safetensors", 3, "NaN or infinity")
    refuses("pickle.pt", 2, "pickle, which can run any code", "convert it")
    refuses("gone.safetensors", 2, "safetensors file")
    refuses("folder", 2, "folder")


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "digits", "--epoch", "3"], "--epochs"),
        (["trian", "digits"], "Did you mean 'train'? See suanli --help."),
        (
            ["train"],
            "Name the data: a folder, archive, table or built-in name, such as suanli train digits. See suanli tr",
        ),
        (["predict"], "such as suanli predict runs/digits-1 photo.png. See suanli predict --help."),
        (["optimize"], "Name a trained run, such as suanli optimize runs/digits-1."),
        (["export", "run"], "Name the format: --to onnx, openvino, pt2, litert or safetensors."),
        (["train", "digits", "--model", "resnet81"], "Did you mean 'resnet18'"),
        (["train", "digits", "--model", "nomodule:net"], "Can't import 'nomodule'"),
        (["train", "digits", "--model", "mynet:gone"], "no function 'gone'"),
        (["train", "digits", "--recipe", "small_image"], "Did you mean 'small_images'"),
        (["train", "digits", "--set", "weight_decai=0"], "Did you mean 'weight_decay'"),
        (["train", "digits", "--set", "lr=fast"], "'lr' can't be 'fast'"),
        (["train", "digits", "--set", "lr"], "field=value"),
        (["train", "digits", "--set", "augment=cutuot"], "Did you mean 'cutout'"),
        (["train", "digits", "--set", "augment=crop(paddin=2)"], "padding"),
        (["train", "digits", "--set", "optimizer=adam"], "Did you mean 'adamw'"),
        (["train", "digits", "--set", "optimizer_args.momentun=0.9"], "momentum"),
        (["train", "digits", "--set", "model_args.widht=2"], "width"),
        (["train", "digits", "--set", "preprocess.siez=8"], "Did you mean 'size'"),
        (["train", "digits", "--set", "schedule=cosin"], "'cosine'"),
        (["train", "digits", "--set", "task=clasification"], "Did you mean 'classification'"),
        (["train", "digits", "--speedups", "bf61"], "Did you mean 'bf16'"),
        (["train", "digits", "--track", "tensorbord"], "Did you mean 'tensorboard'"),
        (["train", "digits", "--threads", "0"], "--threads can't be 0"),
        (["train", "digits", "--batch-size", "0"], "'batch_size' can't be 0"),
        (["train", "digits", "--batch-size", "1e9"], "--batch-size"),
        (["train", "digits", "--epochs", "nan"], "'epochs' can't be nan"),
        (["train", "digits", "--epochs", "inf"], "'epochs' can't be inf"),
        (["train", "digits", "--lr", "inf"], "'lr' can't be inf"),
        (["train", "digits", "--seed", "-1"], "'seed' can't be -1"),
        (["train", "digits", "--checkpoint-every-s", "-1"], "--checkpoint-every-s"),
        (["train", "digits", "--set", "val_fraction=0.6", "--set", "test_fraction=0.6"], "less than 1"),
        (["train", "digitz"], "Did you mean 'digits'"),
        (["prepare", "cifar_10"], "Did you mean 'cifar10'"),
        (["run", "nosuchfolder"], "There is no file or folder nosuchfolder, and no built-in data set of that name."),
        (["run", "mynet"], "The nearest file or folder is 'mynet.py'. Did you mean 'mnist'?"),
        (["prepare", "digits", "--max-bad", "2"], "--max-bad"),
    ],
)
def test_unknown_names_and_impossible_values(
    arguments: list[str], says: str, tiny: list[str], refused: Refused
) -> None:
    assert tiny  # writes mynet.py
    refused(*arguments, code=2, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--speedups", "fast"], "Unknown speedup 'fast'. Allowed: "),
        (["--threads", "9999"], "--threads can't be 9999"),
        (["--target-accuracy", "89"], "--target-accuracy can't be 89.0"),
    ],
)
def test_options_are_checked_before_data_is_decoded(
    arguments: list[str], says: str, picture_folder: Folder, tmp_path: Path, refused: Refused
) -> None:
    root = picture_folder()
    refused("train", root, *arguments, "--cache-dir", tmp_path / "cache", code=2, says=says)
    if arguments[0] != "--target-accuracy":
        refused("bench", root, *arguments, "--cache-dir", tmp_path / "cache", code=2, says=says)


def test_a_pdf(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "doc.pdf").write_bytes(b"%PDF-1.7\n")
    refused("train", "doc.pdf", code=3, says="doc.pdf is not data that suanli reads. Give a folder")
    with pytest.raises(BadInput, match="it is a PDF"):
        decode(b"%PDF-1.7\n")


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_ctrl_c_says_what_is_kept(picture_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    Path("stopping.py").write_text(
        "from pathlib import Path\n"
        "from interrupts import press_ctrl_c\n"
        f"{NET}"
        "def net(*arguments, **sizes):\n"
        "    if Path('stop').exists():\n"
        "        press_ctrl_c()\n"  # while planning
        "    return tiny(*arguments, **sizes)\n"
    )
    root = picture_folder()
    options = ["--model", "stopping:net", "--epochs", "1", "--threads", "1"]
    assert call("train", root, *options, "--out", "kept") == 0
    Path("stop").touch()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a new process has it, whatever a test before left
    for arguments, says in [
        (
            ["train", root, *options],
            "Stopped. Training had not begun, and nothing was kept. Run the same command again.",
        ),
        (
            ["evaluate", "kept", "--trust-code"],
            "Stopped. The scores from before are unchanged. Run the same command again.",
        ),
        (
            ["predict", "kept", root, "--trust-code"],
            "Stopped. Answers that were printed are complete; the others were not kept. Run the same command again.",
        ),
        (
            ["optimize", "stopping:net", "--data", root],
            "Stopped. The engines from before are unchanged. Run the same command again.",
        ),
        (["train", "kept", "--more-epochs", "1"], "Stopped. Go on with: suanli train kept"),
        (["run", "kept", "--more-epochs", "1"], "Stopped. Go on with: suanli run kept"),
    ]:
        capsys.readouterr()
        assert call(*arguments) == 130
        assert capsys.readouterr().err.endswith(f"suanli: {says}\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_that_a_library_swallows_is_no_unexpected_error(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("swallowing.py").write_text(
        "from interrupts import send\n"
        "def net(*arguments, **sizes):\n"
        "    try:\n"
        f"        send({int(number)})\n"
        "    except BaseException:\n"
        "        raise AttributeError('partially initialized module')\n"  # as an import that was cut short does
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert call("train", "digits", "--model", "swallowing:net", "--epochs", "1", "--threads", "1") == 130
    assert capsys.readouterr().err.endswith("nothing was kept. Run the same command again.\n")


# --- memory and numbers -------------------------------------------------------------------------

# Room beyond what the process has mapped once everything is imported.
LIMITED = """
import resource
import suanli.verbs.run, suanli.data.datasets, torch
from suanli.training.recipes import small_images
mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
room = {room}
resource.setrlimit(resource.RLIMIT_AS, (mapped + room, mapped + room))
"""


@linux_only
def test_a_batch_that_does_not_fit_into_memory(
    picture_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # the limit counts what each thread only reserves, too
    root = picture_folder(each=100, size=(32, 32))
    Path("deep.py").write_text(  # little to compute, much to keep
        "from torch import nn\n"
        "class Block(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return x + super().forward(x)\n"
        "def block():\n"
        "    return Block(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU())\n"
        "def net(classes, in_channels, image_size):\n"
        "    blocks = nn.Sequential(*(block() for _ in range(24)))\n"
        "    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)]\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 32, 1), blocks, *ends)\n"
    )
    limit = LIMITED.format(room=1_000_000_000)
    options = ["train", root, "--model", "deep:net", "--epochs", "0.01"]
    plain = [*options, "--speedups", "none", "--out", "made"]
    before = files_below(tmp_path)
    code, stderr = ended(process(*plain, "--batch-size", "150", before=limit))
    assert code == 4, stderr
    assert_one_paragraph(stderr)
    fits = re.search(r"--batch-size (\d+) would fit", stderr)
    assert fits, stderr
    assert files_below(tmp_path) == before
    code, stderr = ended(process(*plain, "--batch-size", fits[1], before=limit))
    assert code == 0, stderr
    if "bfloat16" not in device.detect("cpu").fast_dtypes:
        pytest.skip("the last part: in float32 no way needs little enough, and this processor has no other precision")
    # Left to choose, suanli computes the whole batch in a way that needs less.
    code, stderr = ended(process(*options, "--batch-size", "150", "--out", "smaller", before=limit))
    assert code == 0, stderr
    saved_by = {"activation_checkpointing", "bf16"} & set(Run.open("smaller").summary["plan"]["speedups"])
    assert saved_by, stderr


@linux_only
def test_a_network_that_does_not_fit_into_memory(
    picture_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    root = picture_folder()
    Path("wide.py").write_text(  # one large piece: where many small ones take the last byte, libraries end the process
        "from torch import nn\n"
        "def net(classes, in_channels, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(432, 4_000_000), nn.Linear(4_000_000, classes))\n"
    )
    before = files_below(tmp_path)
    limit = LIMITED.format(room=500_000_000)
    code, stderr = ended(process("train", root, "--model", "wide:net", "--out", "made", before=limit))
    assert code == 4, stderr
    assert_one_paragraph(stderr)
    assert "smaller model" in stderr
    assert files_below(tmp_path) == before


def test_a_loss_that_becomes_nan(picture_folder: Folder, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    root = picture_folder()
    Path("late.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, inputs, classes):\n"
        "        super().__init__()\n"
        "        self.fc, self.seen = nn.Linear(inputs, classes), 0\n"
        "    def forward(self, x):\n"
        "        self.seen += self.training\n"
        "        return self.fc(x.flatten(1)) + (torch.nan if self.seen > 40 else 0)\n"
        "def net(classes, in_channels, image_size):\n"
        "    return Net(in_channels * image_size[0] * image_size[1], classes)\n"
    )
    options = [*tiny, "--model", "late:net", "--out", "run", "--epochs", "99", "--checkpoint-every-s", "0"]
    options += ["--speedups", "none"]  # another plan would try again with one speedup less
    assert call("train", root, *options) == 1
    stderr = capsys.readouterr().err
    assert_one_paragraph(stderr)
    step = re.search(r"The loss became nan at step (\d+)", stderr)
    assert step, stderr
    saved = checkpoint.read_newest(Path("run/checkpoints"))
    assert saved is not None
    assert saved.step == int(step[1]) - 1
    assert f"last good checkpoint is kept (step {saved.step})" in stderr
    assert all(t.isfinite().all() for t in saved.tensors.values() if t.is_floating_point())
    assert not Path("run/model").exists()
    assert json.loads(Path("run/summary.json").read_text())["status"] == "diverged"
    assert call("report", "run") == 0
    assert "diverged" in Path("run/report.html").read_text()


def test_weights_that_blow_up_are_noticed_with_their_step(
    picture_folder: Folder, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, "--lr", "1e38", "--set", "optimizer=sgd", "--set", "schedule=constant", "--out", "run"]
    assert call("train", picture_folder(), *options, "--set", "warmup_epochs=0", "--epochs", "9") == 1
    stderr = capsys.readouterr().err
    assert_one_paragraph(stderr)
    assert re.search(r"at step \d+", stderr)
    assert "No checkpoint" in stderr
    assert "--lr" in stderr
    assert call("report", "run") == 0


# --- what a hostile or clumsy user thinks of ----------------------------------------------------


def test_a_run_inside_its_own_data(
    picture_folder: Folder, tiny: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be one more class the next time."""
    root = picture_folder()
    refused("run", root, *tiny, "--out", root / "a", code=2, says=("be read as data", "--out outside"))
    monkeypatch.chdir(root)
    refused("train", ".", *tiny, code=2, says="be read as data")


def test_data_that_changes_while_it_is_prepared(
    picture_folder: Folder, refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that goes away between listing and reading is a bad input, and the next time is right."""
    from suanli.data import cache

    root = picture_folder()
    build = cache._build

    def meanwhile(*arguments: object) -> None:
        (root / "class0" / "000.png").unlink(missing_ok=True)
        build(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_build", meanwhile)
        assert call("prepare", root) == 3
    assert "class0/000.png: No such file" in capsys.readouterr().err
    assert call("prepare", root) == 0
    assert refused


NAMES = ["two words", 'it\'s "quoted"', "naïve 漢字", "🐈", "x" * 200, "-rf", "$(touch hacked)", "<b>&"]


def test_unusual_class_names(picture_folder: Folder, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    root = picture_folder(classes=len(NAMES), each=20)
    for i, name in enumerate(NAMES):
        (root / f"class{i}").rename(root / name)
    assert call("run", root, *tiny, "--out", "run", "--json") == 0
    capsys.readouterr()
    assert set(json.loads(Path("run/model/model.json").read_text())["classes"]) == set(NAMES)
    page = Path("run/report.html").read_text()
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert call("evaluate", "run") == 0
    assert call("predict", "run", root / "-rf", "--csv") == 0
    assert not Path("hacked").exists()


def test_class_names_from_a_table_stay_names(picture_folder: Folder, tiny: list[str], tmp_path: Path) -> None:
    root = picture_folder()
    names = {"class0": "../../outside", "class1": "/etc/x"}
    table = "".join(f"{p},{names[p.parent.name]}\n" for p in root.rglob("*.png"))
    (tmp_path / "t.csv").write_text("path,label\n" + table)
    assert call("run", "t.csv", *tiny, "--out", "run") == 0
    assert not (tmp_path.parent / "outside").exists()


@linux_only
def test_file_names_that_are_not_utf8(picture_folder: Folder, tiny: list[str]) -> None:
    root = picture_folder()
    odd = os.fsencode(root / "class0") + b"/\xff\xfe.png"
    os.rename(root / "class0" / "000.png", odd)
    os.rename(root / "class1", os.fsencode(root) + b"/cl\xe4ss")
    assert call("run", root, *tiny, "--out", "run") == 0
    assert call("predict", "run", os.fsdecode(odd), "--json") == 0


def test_links_in_a_circle(picture_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    root = picture_folder()
    (root / "class0" / "loop").symlink_to(root)
    (root / "class1" / "self.png").symlink_to("self.png")
    (root / "class1" / "gone.png").symlink_to("nowhere.png")
    assert call("prepare", root) == 0
    stderr = capsys.readouterr().err
    assert "links to a folder above" in stderr
    assert "2 broken links" in stderr


def test_an_ascii_environment_without_input(picture_folder: Folder, tiny: list[str]) -> None:
    """LANG=C, pipes, nothing to read."""
    root = picture_folder()
    (root / "class0").rename(root / "漢字")
    environment = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, stderr = ended(process("train", root, *tiny, "--out", "run", env=environment, stdin=subprocess.DEVNULL))
    assert code == 0, stderr
    code, stderr = ended(process("train", "\u6f22", env=environment))
    assert code == 2
    assert_one_paragraph(stderr)


def test_standard_input_that_is_closed(picture_folder: Folder, tiny: list[str]) -> None:
    assert call("train", picture_folder(), *tiny, "--out", "run") == 0
    script = f"{sys.executable} -m suanli predict run - --trust-code <&-"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 3, result.stderr
    assert_one_paragraph(result.stderr)
    assert "Standard input is closed" in result.stderr


def test_many_tiny_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "many").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    for c in range(2):
        (tmp_path / "many" / f"c{c}").mkdir()
        for i in range(4_000):  # PNG readers stop at the end mark: each file is another
            (tmp_path / "many" / f"c{c}" / f"{i}.png").write_bytes(content + b"%d %d" % (c, i))
    assert call("prepare", "many", "--json") == 0
    assert json.loads(capsys.readouterr().out)["check"]["total"] == 8_000


@pytest.mark.parametrize(("option", "value"), [("--batch-size", "1000000000"), ("--epochs", "0.001")])
def test_extreme_values_that_mean_something(option: str, value: str, picture_folder: Folder, tiny: list[str]) -> None:
    assert call("train", picture_folder(), *tiny, option, value, "--out", "run") == 0
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 1

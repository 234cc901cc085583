"""The wheel and the sdist: what `pip install .` gives, without the checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import suanli

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("__pycache__", ".egg-info")


def build(backend_call: str, source: Path) -> None:
    """What pip runs: the build backend in the folder of the source."""
    code = f"import setuptools.build_meta as backend; backend.{backend_call}"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=ignore)
    build("build_sdist('..')", source)
    with tarfile.open(folder / f"suanli-{suanli.__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"suanli-{suanli.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built from the source distribution, as an index's users get it."""
    folder = tmp_path_factory.mktemp("wheel")
    build(f"build_wheel({str(folder)!r})", sdist)
    with zipfile.ZipFile(next(folder.glob("suanli-*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src" / "suanli"
    wanted = {
        file.relative_to(source).as_posix()
        for file in source.rglob("*")
        if file.is_file() and not any(part in file.as_posix() for part in LEFT_OUT)
    }
    package = wheel / "suanli"
    assert {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()} == wanted


def test_the_metadata_names_licence_python_and_command(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    about = email.message_from_string((info / "METADATA").read_text())
    assert (about["Name"], about["Version"]) == ("suanli", suanli.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert any(line.startswith("torch") for line in about.get_all("Requires-Dist", []))
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "suanli = suanli.cli:main" in (info / "entry_points.txt").read_text()


def test_the_installed_package_trains_and_reports(wheel: Path, tmp_path: Path) -> None:
    """All in a folder without the checkout: package data, such as the report's templates, is found."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from suanli.cli import main; main(sys.argv[1:])"
        line = [sys.executable, "-I", "-c", code, str(wheel), *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").strip() == f"suanli {suanli.__version__}"
    run("run", "digits", "--epochs", "0.1", "--out", "digits", "--device", "cpu", "--speedups", "none")
    page = (tmp_path / "digits" / "report.html").read_text()
    assert "<style" in page
    assert str(ROOT) not in page

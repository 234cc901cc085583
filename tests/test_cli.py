"""The command line as a stranger meets it: results, errors, exit codes, pipes."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from PIL import Image

import suanli
from suanli.cli import CLUSTER_OPTIONS, app, main

VERBS = ("bench", "device", "prepare", "train", "evaluate", "predict", "report", "run")


def call(*arguments: str | Path) -> int:
    """Runs the command line in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def suanli_process(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "suanli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_has_the_arguments_of_its_function(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    only_here = {"as_json", "help", "csv"}  # how a result is shown
    only_here |= set(CLUSTER_OPTIONS) if verb in ("train", "run") else set()  # nothing is trained
    only_here |= {"scaling", "processes"} if verb == "bench" else set()
    only_here |= {"features", "out", "format", "annotations"} if verb == "predict" else set()  # how and where
    of_command = {p.name for p in command.params} - only_here
    if verb == "predict":  # with --url there is no model among them
        of_command |= {"model", "inputs"}
        of_command -= {"words"}
    of_function = set(inspect.signature(getattr(suanli, verb)).parameters)
    assert of_command == of_function


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert call(verb, "--help") == 0
        shown = capsys.readouterr().out
        assert "--json" in shown
    assert call("--help") == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]  # nothing is cut off
    assert call("--version") == 0
    assert capsys.readouterr().out == f"suanli {suanli.__version__}\n"


def test_help_is_in_sentences() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands.keys() >= {*VERBS, "compare", "runs", "export", "optimize", "serve"}
    for name, command in commands.items():
        texts = [command.help, *(p.help for p in command.params if getattr(p, "help", None))]
        for text in texts:
            assert re.fullmatch(r"(?!Of |For |Its )[A-Z].*\.", text), f"{name}: {text}"


def test_run_then_everything_else(picture_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = picture_folder(each=60)
    assert call("run", root, "--epochs", "3", "--json", "--out", "made") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["run"] == "made"
    assert told["seconds"] > 0
    assert 0.5 < told["scores"]["accuracy"] <= 1
    assert Path("made/report.html").stat().st_size > 10_000
    assert (
        json.loads(Path("made/model/model.json").read_text())["scores"]["test"]["accuracy"]
        == told["scores"]["accuracy"]
    )

    assert call("evaluate", "made", "--json") == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["scores"] == told["scores"]
    assert evaluation["intervals"].keys() == told["scores"].keys()
    assert evaluation["interval"] == evaluation["intervals"]["accuracy"]
    assert call("evaluate", "made", "--split", "val") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:12])) <= 80
    assert all(name in shown for name in ("95 % interval", "baselines:", *told["scores"]))
    assert call("report", "made", "--out", "elsewhere.html") == 0
    assert Path("elsewhere.html").exists()
    capsys.readouterr()
    assert call("predict", "made", root / "class0", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 60
    assert call("prepare", root) == 0
    assert "class1" in capsys.readouterr().out
    assert call("evaluate", "made", "--split", "exam") == 2


def test_a_pipe_gets_plain_lines(picture_folder: Callable[..., Path]) -> None:
    found = suanli_process("train", picture_folder(), "--epochs", "1")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Run: runs")
    assert "\x1b" not in found.stdout + found.stderr


def broken_folder(root: Path, kind: str) -> Path:
    root.mkdir()
    if kind == "one class":
        (root / "cat").mkdir()
        for i in range(5):
            Image.new("RGB", (9, 9), (i, i, i)).save(root / "cat" / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nowhere/at/all"], 3, "no file or folder nowhere/at/all"),
        (["train", "nowhere"], 2, "no file or folder nowhere, and no built-in data set"),
        (["train", "https://x.org/a.zip"], 3, "doesn't fetch URLs. Download the file"),
        (["train", "digitz"], 2, "Did you mean 'digits'"),
        (["train", "x" * 300], 3, "too long"),
        (["predict", "x" * 300, "x"], 3, "too long"),
        (["train", "digits", "--batch-size", "1"], 2, "can't learn from batches of 1"),
        (["train", "digits", "--epoch", "3"], 2, "--epoch"),
        (["train", "digits", "--epochs", "three"], 2, "--epochs"),
        (["train", "digits", "--epochs", "0"], 2, "'epochs' can't be 0"),
        (["train", "digits", "--model", "resnet8"], 2, "Did you mean"),
        (["train", "digits", "--set", "lr"], 2, "field=value"),
        (["train", "digits", "--set", "rate=1"], 2, "Unknown recipe field 'rate'"),
        (["train", "digits", "--device", "cuda:9"], 4, "cuda"),
        (["prepare", "empty"], 3, "empty"),
        (["prepare", "single"], 3, "class"),
        (["evaluate", "empty"], 3, "not a run directory"),
        (["predict", "empty", "x.png"], 3, "no model"),
        (["report", "empty"], 3, ""),
        (["fly"], 2, "fly"),
        ([], 2, ""),
    ],
)
def test_what_goes_wrong_has_a_code_and_a_way_out(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_folder(Path("empty"), "empty")
    broken_folder(Path("single"), "one class")
    assert call(*arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert not Path("runs").exists()


def test_an_error_is_one_json_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "nowhere/at/all", "--json") == 3
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 3
    assert told["fix"]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(suanli.UsageError):  # Python shows it
        main(["prepare", "digitz", "--debug"])
    assert call("prepare", "digitz") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_where_nothing_may_be_written(picture_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert call("train", picture_folder(), "--out", "file/run") == 4
    assert "Can't write" in capsys.readouterr().err
    assert call("prepare", picture_folder("others"), "--cache-dir", "file") == 4


def test_a_reader_that_leaves_early_is_no_error(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    suanli.run(root, epochs=1, out="made")
    script = f"{sys.executable} -m suanli predict made {root} --csv | head -n 1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.startswith("name,label")
    assert "Error" not in found.stderr
    assert found.returncode in (0, 141)


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys, suanli.cli; print([m for m in ('torch','numpy','pydantic','rich.progress') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "[]\n"


def test_completion_knows_the_verbs() -> None:
    environment = os.environ | {"_SUANLI_COMPLETE": "complete_bash", "COMP_WORDS": "suanli ev", "COMP_CWORD": "1"}
    found = suanli_process(env=environment)
    assert found.stdout.split() == ["evaluate"]

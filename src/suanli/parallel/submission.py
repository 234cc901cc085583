"""A training as a file for a cluster: an sbatch script for Slurm, or a TrainJob for Kubeflow Trainer.

The files are rendered from templates and meant to be read. Each process is `suanli train` with the same options, and
finds the others through the variables that srun or torchrun set. Only `submit` talks to a cluster, with the cluster's
own command.

Names and options may contain any character, and a shell or YAML must pass them on unchanged. So every text that a
template prints is quoted for the language of its file.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TypedDict

from suanli.core.errors import MachineError, UsageError, unknown
from suanli.core.run import is_run
from suanli.core.types import Json
from suanli.machine.device import cores, detect

# Every restart of a Slurm job counts, one at its time limit too. Within a pod only processes that end count.
RESTARTS = {"slurm": 20, "kubernetes": 3}
GRACE_S = 60  # before the time limit, for a checkpoint
WAIT_S = 60  # for the other processes once one has ended
NAME_LENGTH = 40  # a cluster appends to it, and allows 63 characters
MAX_ARGUMENTS, MAX_IMAGE_LENGTH = 124, 500  # of a TrainJob, in addition to torchrun's own
SUBMIT_TIMEOUT_S = 120  # for sbatch or kubectl


@dataclass(frozen=True, kw_only=True)
class Job:
    """Processes that train together on machines of a cluster."""

    name: str  # any: characters that a cluster doesn't allow are replaced
    arguments: tuple[str, ...]  # for `suanli train`
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_process: int = 1
    restarts: int = 3  # at most
    image: str | None = None  # for Kubernetes
    folder: str = "."  # where a Slurm job works


class EmittedJob(TypedDict):
    """What `suanli train --emit` prints with --json."""

    emitted: str  # the file's text
    kind: str
    submitted: str | None  # the cluster's answer; None: not submitted


def emit(
    options: Mapping[str, Json], *, kind: str | None, nodes: int = 1, image: str | None = None, submitting: bool = False
) -> EmittedJob:
    """Render the file for a training, and submit it if `submitting`.

    `options` are the options of the training that the user gave, by name. Raises UsageError where they make no job,
    and MachineError where it can't be submitted.
    """
    if kind is None:
        raise UsageError(
            "--nodes, --image and --submit are options of --emit.",
            fix="Add --emit slurm or --emit kubernetes. On this machine, --nproc starts several processes.",
        )
    if kind not in TEMPLATES:
        raise unknown("kind of cluster", kind, TEMPLATES)
    data, out = str(options["data"]), options.get("out")
    _refuse_lost_run(data, out, kind)
    count = _processes_per_node(options.get("nproc"))
    job = Job(
        name=Path(data if out is None else out).name,
        arguments=train_arguments(options),
        nodes=nodes,
        processes_per_node=count,
        gpus_per_node=count if _on_gpus(str(options.get("device", "auto"))) else 0,
        cpus_per_process=options.get("threads") or max(1, cores() // count),
        restarts=options.get("max_restarts", RESTARTS[kind]),
        image=image,
        folder=str(Path.cwd()),
    )
    if kind == "kubernetes":
        _refuse_for_kubernetes(image, job.arguments)
    text = render(kind, job)
    return EmittedJob(emitted=text, kind=kind, submitted=submit(kind, text) if submitting else None)


def _refuse_lost_run(data: str, out: Json, kind: str) -> None:
    """A restarted job must find its run."""
    if out is None and not is_run(data):
        raise UsageError(
            "--emit needs --out: a job that is restarted resumes the run that it finds there.",
            fix=f"Add it, such as --out runs/{cluster_name(Path(data).name)}.",
        )
    if kind == "kubernetes" and not PurePosixPath(out or data).is_absolute():
        raise UsageError(
            f"The run would be in {out or data!s} inside each container, and lost with it.",
            fix="Give a path on a volume that all of them mount, such as --out /runs/one.",
        )


def _processes_per_node(requested: Json) -> int:
    try:
        count = 1 if requested is None else int(requested)
    except ValueError:
        count = 0
    if count < 1:
        raise UsageError(
            f"--nproc can't be {requested!r} with --emit, since the machines of a cluster aren't known here.",
            fix="Give the number of processes per machine, usually its number of GPUs.",
        )
    return count


def _on_gpus(device: str) -> bool:
    if ":" in device:
        raise UsageError(
            f"--device {device} would be the same GPU for every process.", fix="Give --device cuda: one GPU for each."
        )
    return device == "cuda" or (device == "auto" and detect(device).type == "cuda")


def _refuse_for_kubernetes(image: str | None, arguments: Sequence[str]) -> None:
    if not image or len(image) > MAX_IMAGE_LENGTH:
        raise UsageError(
            "--emit kubernetes needs --image, the name of a container image with suanli in it.",
            fix="Build one with containers/Containerfile.",
        )
    if len(arguments) > MAX_ARGUMENTS:
        raise UsageError(
            f"A TrainJob can have {MAX_ARGUMENTS} arguments, not {len(arguments)}.", fix="Give fewer --set."
        )
    for argument in (image, *arguments):
        if any("\ud800" <= c <= "\udfff" for c in argument):  # bytes of a file name that aren't valid UTF-8
            raise UsageError(f"{argument!r} is not UTF-8.", fix="Rename it: Kubernetes accepts only UTF-8.")


def train_arguments(options: Mapping[str, Json]) -> tuple[str, ...]:
    """Options by name as arguments of `suanli train`, the subject first if there is one."""
    line = []
    for name, value in options.items():
        if name == "shard" and value is False:  # stated, or a resumed run would stay sharded
            line.append("--no-shard")
            continue
        if name in ("data", "nproc", "max_restarts") or value is None or value is False:
            continue  # the cluster starts the processes
        option = f"--{'set' if name == 'settings' else name.replace('_', '-')}"
        if value is True:
            line.append(option)
        else:
            line += [f"{option}={each}" for each in (value if isinstance(value, list | tuple) else [value])]
    if "data" not in options:
        return tuple(line)
    data = str(options["data"])
    return (*line, "--", data) if data.startswith("-") else (data, *line)


def cluster_name(name: str) -> str:
    """A name that every cluster allows (RFC 1035): up to 40 lower-case letters, digits and hyphens, a letter first."""
    allowed = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return (allowed if allowed[:1].isalpha() else f"suanli-{allowed}")[:NAME_LENGTH].strip("-")


def render(kind: str, job: Job) -> str:
    """The text of the file for a kind of cluster."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    file, quote = TEMPLATES[kind]
    templates = Environment(
        loader=PackageLoader("suanli.parallel"),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, int) else quote(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = {"name": cluster_name(job.name), "python": sys.executable, "grace_s": GRACE_S, "wait_s": WAIT_S}
    return templates.get_template(file).render(asdict(job) | values)


def quote_for_shell(text: str) -> str:
    """Quote as one word for bash, in one line of printable characters."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(c if c.isprintable() else _octal(c) for c in escaped)}'"


def _octal(character: str) -> str:
    """Three digits per byte, so that no character that follows can be taken for a digit of it."""
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogateescape"))


def quote_for_yaml(text: str) -> str:
    """Quote as in JSON, which YAML can read. But YAML needs some more characters escaped, and doesn't allow a pair of
    surrogates for one character."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))


TEMPLATES: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "slurm": ("slurm.sh", quote_for_shell),
    "kubernetes": ("trainjob.yaml", quote_for_yaml),
}
COMMANDS: Mapping[str, Sequence[str]] = {"slurm": ("sbatch",), "kubernetes": ("kubectl", "create", "-f", "-")}


def submit(kind: str, text: str) -> str:
    """Pass the text to the cluster's own command, and return its output. Raises MachineError where the command is
    missing, fails, or doesn't answer."""
    command = COMMANDS[kind]
    fix = f"Copy what --emit {kind} prints to a machine of the cluster, and submit it there."
    try:
        result = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", timeout=SUBMIT_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise MachineError(f"There is no command {command[0]} on this machine.", fix=fix) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{command[0]} can't be run: {error}.", fix=fix) from error
    if result.returncode:
        reason = result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}"
        raise MachineError(
            f"{' '.join(command)} failed: {reason}", fix="Fix that, or submit what --emit prints by hand."
        )
    return result.stdout.strip()

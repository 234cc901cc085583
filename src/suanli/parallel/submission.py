"""A training as a file for a cluster: an sbatch script for Slurm, or a TrainJob for Kubeflow Trainer.

The files are made from templates, and are meant to be read. Each process is `suanli train` with the same options, and
finds the others through the variables that srun or torchrun set. Only `submit` talks to a cluster, through its own
command.

What a user gives may hold any character, and a shell or YAML must pass it on unchanged. So every text that a template
prints is quoted for the language of its file.
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

from suanli.core.errors import MachineError, UsageError, unknown
from suanli.core.run import is_run
from suanli.core.types import Json
from suanli.machine.device import cores, detect

# A Slurm job is restarted for whatever reason: a time limit is one. Within a pod only processes that end count.
RESTARTS = {"slurm": 20, "kubernetes": 3}
GRACE_S = 60  # before the time limit, for a checkpoint
WAIT_S = 60  # for the other processes once one has ended
NAME_LENGTH = 40  # a cluster appends to it, and takes 63 characters
MOST_ARGUMENTS, LONGEST_IMAGE = 124, 500  # of a TrainJob, beside torchrun's own
ANSWER_S = 120  # for sbatch or kubectl


@dataclass(frozen=True, kw_only=True)
class Job:
    """Processes that train together on machines of a cluster."""

    name: str  # any: what a cluster doesn't take in a name is replaced
    arguments: tuple[str, ...]  # for `suanli train`
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_process: int = 1
    restarts: int = 3  # at most
    image: str | None = None  # for Kubernetes
    folder: str = "."  # where a Slurm job works


def emit(
    asked: Mapping[str, Json], *, kind: str | None, nodes: int = 1, image: str | None = None, submitting: bool = False
) -> dict[str, Json]:
    """What `suanli train --emit` gives: {"emitted": text, "kind": kind, "submitted": the cluster's answer or None}.

    `asked` are the options of the training that the user gave, by name. Raises UsageError where they make no job, and
    MachineError where it can't be submitted.
    """
    if kind is None:
        raise UsageError(
            "--nodes, --image and --submit are about the file that --emit makes.",
            fix="Add --emit slurm or --emit kubernetes. On this machine, --nproc starts several processes.",
        )
    if kind not in TEMPLATES:
        raise unknown("kind of cluster", kind, TEMPLATES)
    data, out = str(asked["data"]), asked.get("out")
    _refuse_lost(data, out, kind)
    count = _processes(asked.get("nproc"))
    job = Job(
        name=Path(data if out is None else out).name,
        arguments=train_arguments(asked),
        nodes=nodes,
        processes_per_node=count,
        gpus_per_node=count if _on_gpus(str(asked.get("device", "auto"))) else 0,
        cpus_per_process=asked.get("threads") or max(1, cores() // count),
        restarts=asked.get("max_restarts", RESTARTS[kind]),
        image=image,
        folder=str(Path.cwd()),
    )
    if kind == "kubernetes":
        _refuse_unfit(image, job.arguments)
    text = render(kind, job)
    return {"emitted": text, "kind": kind, "submitted": submit(kind, text) if submitting else None}


def _refuse_lost(data: str, out: Json, kind: str) -> None:
    """A job that starts again must find its run."""
    if out is None and not is_run(data):
        raise UsageError(
            "--emit needs --out: a job that is started again goes on with the run that it finds there.",
            fix=f"Add it, such as --out runs/{cluster_name(Path(data).name)}.",
        )
    if kind == "kubernetes" and not PurePosixPath(out or data).is_absolute():
        raise UsageError(
            f"The run would be in {out or data!s} inside of each container, and be gone with it.",
            fix="Give a path on a volume that all of them mount, such as --out /runs/one.",
        )


def _processes(wanted: Json) -> int:
    try:
        count = 1 if wanted is None else int(wanted)
    except ValueError:
        count = 0
    if count < 1:
        raise UsageError(
            f"--nproc can't be {wanted!r} with --emit, since the machines of a cluster aren't known here.",
            fix="Give the number of processes of each, usually that of its GPUs.",
        )
    return count


def _on_gpus(device: str) -> bool:
    if ":" in device:
        raise UsageError(
            f"--device {device} would be the same GPU for every process.", fix="Give --device cuda: a GPU for each."
        )
    return device == "cuda" or (device == "auto" and detect(device).type == "cuda")


def _refuse_unfit(image: str | None, arguments: Sequence[str]) -> None:
    if not image or len(image) > LONGEST_IMAGE:
        raise UsageError(
            "--emit kubernetes needs --image, the name of a container image with suanli in it.",
            fix="containers/Containerfile makes one.",
        )
    if len(arguments) > MOST_ARGUMENTS:
        raise UsageError(f"A TrainJob takes {MOST_ARGUMENTS} arguments, not {len(arguments)}.", fix="Give fewer --set.")
    for argument in (image, *arguments):
        if any("\ud800" <= c <= "\udfff" for c in argument):  # bytes of a name that Python couldn't read
            raise UsageError(f"{argument!r} is not UTF-8.", fix="Rename it: Kubernetes takes nothing else.")


def train_arguments(asked: Mapping[str, Json]) -> tuple[str, ...]:
    """Options by name as words for `suanli train`, the subject first if there is one."""
    line = []
    for name, value in asked.items():
        if name == "shard" and value is False:  # else a run would go on as it did
            line.append("--no-shard")
            continue
        if name in ("data", "nproc", "max_restarts") or value is None or value is False:
            continue  # who starts the processes is the cluster
        option = f"--{'set' if name == 'settings' else name.replace('_', '-')}"
        if value is True:
            line.append(option)
        else:
            line += [f"{option}={each}" for each in (value if isinstance(value, list | tuple) else [value])]
    if "data" not in asked:
        return tuple(line)
    data = str(asked["data"])
    return (*line, "--", data) if data.startswith("-") else (data, *line)


def cluster_name(name: str) -> str:
    """A name that every cluster takes (RFC 1035): up to 40 small letters, digits and hyphens, a letter first."""
    found = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return (found if found[:1].isalpha() else f"suanli-{found}")[:NAME_LENGTH].strip("-")


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


def shell_word(text: str) -> str:
    """As one word for bash, in one line of characters that can be seen."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(c if c.isprintable() else _octal(c) for c in escaped)}'"


def _octal(character: str) -> str:
    """Three digits a byte: no character that follows can belong to it."""
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogateescape"))


def yaml_text(text: str) -> str:
    """Quoted as JSON does it, which YAML can read. But YAML takes some characters only escaped, and no pair of
    surrogates for one character."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))


TEMPLATES: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "slurm": ("slurm.sh", shell_word),
    "kubernetes": ("trainjob.yaml", yaml_text),
}
COMMANDS: Mapping[str, Sequence[str]] = {"slurm": ("sbatch",), "kubernetes": ("kubectl", "create", "-f", "-")}


def submit(kind: str, text: str) -> str:
    """Hands the text to the cluster's own command, and gives what that said. Raises MachineError where the command is
    missing, refuses it, or doesn't answer."""
    command = COMMANDS[kind]
    fix = f"Take what --emit {kind} prints to a machine of the cluster, and submit it there."
    try:
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=ANSWER_S, check=False)
    except FileNotFoundError as error:
        raise MachineError(f"There is no command {command[0]} on this machine.", fix=fix) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{command[0]} can't be asked: {error}.", fix=fix) from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise MachineError(
            f"{' '.join(command)} refused: {said}", fix="Mend that, or submit what --emit prints by hand."
        )
    return done.stdout.strip()

"""A training as a file for a cluster: an sbatch script for Slurm, or a TrainJob for Kubeflow Trainer.

The text is a pure function of a `Job`, and is meant to be looked at. Nothing in it is more than what a person would
write by hand: each process is `suanli train` with the same options, and finds the others through the variables that
srun or torchrun set. Only `submit` talks to a cluster, through its own command.

What a user gives may hold any character. A shell or YAML must hand it on unchanged and execute none of it, so no such
value stands in a comment or in a line for sbatch; those get numbers, and names of letters, digits and hyphens.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from suanli import hardware
from suanli.console import plural
from suanli.errors import MachineError, UsageError, unknown
from suanli.rundir import is_run
from suanli.types import Json
from suanli.verdict import VERDICT

# A Slurm job's count, for whatever reason: a time limit is one. Within a pod only processes that end count.
RESTARTS = {"slurm": 20, "kubernetes": 3}
GRACE_S = 60  # before the time limit, for a checkpoint
WAIT_S = 60  # for the other processes once one has ended
NAME_LENGTH = 40  # what is made of a TrainJob is named after it, with more behind, in 63 characters
MOST_ARGUMENTS, LONGEST_IMAGE = 128, 500  # of a TrainJob
ANSWER_S = 120  # for sbatch or kubectl


@dataclass(frozen=True, kw_only=True)
class Job:
    """Processes that train together on machines of a cluster. What is None is left to the cluster."""

    name: str  # any; what a cluster doesn't take in a name is replaced
    arguments: tuple[str, ...]  # for `suanli train`
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_process: int = 1
    memory_gib: int | None = None  # of a node
    time_limit_s: int | None = None
    restarts: int = 3  # at most
    partition: str | None = None  # of Slurm
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
    if kind not in TEXTS:
        raise unknown("kind of cluster", kind, TEXTS)
    text = TEXTS[kind](job(asked, kind=kind, nodes=nodes, image=image))
    return {"emitted": text, "kind": kind, "submitted": submit(kind, text) if submitting else None}


def job(asked: Mapping[str, Json], *, kind: str, nodes: int, image: str | None) -> Job:
    """The job for a cluster of this kind. Raises UsageError."""
    data, out = str(asked["data"]), asked.get("out")
    if started := [name for name in ("hosts", "rendezvous") if asked.get(name)]:
        raise UsageError(f"--{started[0]} starts processes, and with --emit the cluster does.", fix="Give --nodes.")
    _refuse_lost(data, out, kind)
    count = _processes(asked.get("nproc"))
    threads = asked.get("threads")
    return Job(
        name=Path(data if out is None else out).name or data,
        arguments=arguments(asked),
        nodes=nodes,
        processes_per_node=count,
        gpus_per_node=count if _on_gpus(str(asked.get("device", "auto"))) else 0,
        cpus_per_process=threads or max(1, hardware.cores() // count),
        restarts=asked.get("max_restarts", RESTARTS[kind]),
        image=image,
        folder=str(Path.cwd()),
    )


def _refuse_lost(data: str, out: Json, kind: str) -> None:
    """A job that starts again must find its run."""
    if out is None and not is_run(data):
        raise UsageError(
            "--emit needs --out: a job that is started again goes on with the run that it finds there.",
            fix=f"Add it, such as --out runs/{label(Path(data).name)}.",
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
    return device == "cuda" or (device == "auto" and hardware.detect(device).type == "cuda")


def arguments(asked: Mapping[str, Json]) -> tuple[str, ...]:
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


def label(name: str) -> str:
    """A name that every cluster takes (RFC 1035): up to 40 small letters, digits and hyphens, a letter first. Names
    that differ stay different."""
    found = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    found = found if found[:1].isalpha() else f"suanli-{found}".rstrip("-")
    if found == name and len(found) <= NAME_LENGTH:
        return found
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=3).hexdigest()
    return f"{found[: NAME_LENGTH - len(digest) - 1].rstrip('-')}-{digest}"


def _size(job: Job, machine: str) -> str:
    return f"{plural(job.nodes, machine)}, each with {plural(job.processes_per_node, 'process', 'processes')}"


# --- Slurm ---


def slurm(job: Job) -> str:
    """An sbatch script: one task for each process. Raises UsageError for a name that no partition has."""
    if job.partition is not None and not re.fullmatch(r"[\w.,-]+", job.partition, re.ASCII):
        raise UsageError(f"No partition is called {job.partition!r}.", fix="`sinfo` lists them.")
    name = label(job.name)
    options = {
        "job-name": name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes_per_node,
        "cpus-per-task": job.cpus_per_process,
        "gpus-per-node": job.gpus_per_node or None,
        "mem": job.memory_gib and f"{job.memory_gib}G",
        "time": job.time_limit_s
        and f"{job.time_limit_s // 3600}:{job.time_limit_s // 60 % 60:02}:{job.time_limit_s % 60:02}",
        "partition": job.partition,
        "requeue": "",
        "signal": f"TERM@{GRACE_S}",  # to the processes; the script must outlive it
        "open-mode": "append",
        "output": f"{name}-%j.out",
    }
    given = "\n".join(f"#SBATCH --{k}{'=' if v else ''}{v}" for k, v in options.items() if v is not None)
    train = [sys.executable or "python3", "-m", "suanli", "train", *job.arguments]
    step = ["srun", "--kill-on-bad-exit=1", f"--wait={WAIT_S}", f"--cpus-per-task={job.cpus_per_process}", *train]
    return f"""#!/bin/bash
# suanli trains on {_size(job, "node")}.
#
# To submit this file, which has submitted nothing by itself:    sbatch FILE
# What sbatch is told there has precedence over what is below:   sbatch --partition=NAME --time=8:00:00 FILE
# Working directory, data and run must be on storage that all nodes share.
#
{given}

restarts={job.restarts}  # at most, for whatever reason

cd -- {quoted(job.folder)} || exit 3

# {GRACE_S} s before the time limit, and when others have precedence, every process gets SIGTERM and saves a checkpoint.
# However the processes end, the same command goes on from the newest checkpoint. Only where that can't help (wrong
# options, damaged data, a full disk) they leave word of it here. Exit codes don't tell: with the others, srun also ends
# the one that knows.
export {VERDICT}="$PWD/.suanli-$SLURM_JOB_ID.json"
rm -f -- "${VERDICT}"

{" ".join(map(quoted, step))}
code=$?

if [ -e "${VERDICT}" ]; then
  word=$(cat -- "${VERDICT}")
  rm -f -- "${VERDICT}"
  case $word in
    *'"kind": "Interrupted"'*) code=130 ;;
    *) printf '%s\\n' "$word"; exit 1 ;;
  esac
fi
case $code in
  0 | 2 | 3 | 5) exit $code ;;  # without a word, 4 is a process that has lost the others
esac
if [ "${{SLURM_RESTART_COUNT:-0}}" -ge "$restarts" ]; then
  echo "Exit code $code, after $restarts restarts."
  exit $code
fi
echo "Exit code $code: the job is put back into the queue."
scontrol requeue "$SLURM_JOB_ID" || exit $code
"""


def quoted(word: str) -> str:
    """As one word for bash, in one line of characters that can be seen."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(c if c.isprintable() else _octal(c) for c in escaped)}'"


def _octal(character: str) -> str:
    """Three digits a byte: no character that follows can belong to it."""
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogateescape"))


# --- Kubernetes ---


def kubernetes(job: Job) -> str:
    """A TrainJob of Kubeflow Trainer: a pod for each node, in which torchrun starts the processes. Raises UsageError
    for what a TrainJob can't hold."""
    arguments = [f"--max-restarts={job.restarts}", "--module", "suanli", "train", *map(_unexpanded, job.arguments)]
    _refuse_unfit(job.image, arguments)
    resources: dict[str, Json] = {"cpu": str(job.cpus_per_process * job.processes_per_node)}
    if job.memory_gib:
        resources["memory"] = f"{job.memory_gib}Gi"
    if job.gpus_per_node:
        resources["nvidia.com/gpu"] = str(job.gpus_per_node)
    spec: dict[str, Json] = {
        "runtimeRef": {"name": "torch-distributed"},
        "trainer": {
            "image": job.image,
            "command": ["torchrun"],
            "args": arguments,
            "numNodes": job.nodes,
            "numProcPerNode": job.processes_per_node,
            # Both: with one alone, some versions of the operator start one process.
            "resourcesPerNode": {"requests": resources, "limits": resources},
        },
    }
    if job.time_limit_s:
        spec["activeDeadlineSeconds"] = job.time_limit_s
    made = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": label(job.name)},
        "spec": spec,
    }
    lines = "\n".join(yaml(made))
    return f"""# suanli trains on {_size(job, "pod")}.
#
# To submit this file, which has submitted nothing by itself:   kubectl create -f FILE
# Kubeflow Trainer must be installed there. Its runtime torch-distributed, or the one that you name instead, must mount
# the volume with the run, and with the data. Where pods have ended, the file created again goes on with the same run.
{lines}
"""


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


def _unexpanded(argument: str) -> str:
    """Kubernetes puts a variable's value for $(NAME), and $ for $$."""
    return argument.replace("$", "$$")


def yaml(value: Json, indent: str = "") -> Iterator[str]:
    """Lines of YAML for mappings, lists, texts and whole numbers. Texts are quoted as JSON does it, which YAML can
    read; but YAML takes no pair of surrogates for a character, and some characters only escaped."""
    pairs = [(f"{k}:", v) for k, v in value.items()] if isinstance(value, dict) else [("-", v) for v in value]
    for before, inner in pairs:
        if isinstance(inner, dict | list):
            yield f"{indent}{before}"
            yield from yaml(inner, f"{indent}  ")
        else:
            text = "".join(map(_visible, json.dumps(inner, ensure_ascii=False)))
            yield f"{indent}{before} {text}"


def _visible(character: str) -> str:
    return character if character.isprintable() else f"\\U{ord(character):08x}"


TEXTS: Mapping[str, Callable[[Job], str]] = {"slurm": slurm, "kubernetes": kubernetes}
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

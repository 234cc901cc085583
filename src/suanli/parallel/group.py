"""The processes that train one network together: the rank of this one, and how it communicates with the others.

The engine is torch.distributed. Rank and size come from the environment variables that torchrun, Slurm's srun or an
operator of Kubernetes set, and from nothing else, so any of them may start the processes.

A collective is a call that every process must make, in the same order. Training steps are collectives, and functions
whose docstring says so. All else (measuring, planning, forecasting) is local, because processes that measure don't
make the same number of steps.

Small values travel through the store as JSON, tensors through the process group. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from suanli.core import console
from suanli.core.errors import MachineError, UsageError, first_line
from suanli.core.types import Json
from suanli.machine import process_environment
from suanli.machine.cpus import cores

STORE_TIMEOUT = timedelta(hours=2)  # one process may plan, decode or download while the others wait for it
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # torch's own; `watchdog` notices earlier
POLL_S = 0.05  # of the store, for processes that haven't joined yet
T = TypeVar("T")
ALIGNMENT = 2  # shares of a batch begin at multiples of it: augmentations that blend images pair neighbours


@dataclass(frozen=True, kw_only=True)
class ProcessPlace:
    """The rank of a process among those that were started together."""

    rank: int
    size: int  # of the world
    local_rank: int
    local_size: int | None  # processes on this machine; None: unknown
    restarts: int = 0  # of the whole group so far


def process_place(environment: Mapping[str, str] = os.environ) -> ProcessPlace | None:
    """From the variables of torchrun or of a Slurm step; None: this process is alone.

    Raises UsageError where a variable is missing or not a number.
    """
    try:
        if "WORLD_SIZE" in environment:
            local_size = environment.get("LOCAL_WORLD_SIZE")
            return _check_rank(
                ProcessPlace(
                    rank=int(environment["RANK"]),
                    size=int(environment["WORLD_SIZE"]),
                    local_rank=int(environment.get("LOCAL_RANK", 0)),
                    local_size=None if local_size is None else int(local_size),
                    restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
                )
            )
        if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return _check_rank(
                ProcessPlace(
                    rank=int(environment["SLURM_PROCID"]),
                    size=int(environment["SLURM_STEP_NUM_TASKS"]),
                    local_rank=int(environment["SLURM_LOCALID"]),
                    local_size=_slurm_tasks_here(environment),
                    restarts=int(environment.get("SLURM_RESTART_COUNT", 0)),
                )
            )
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"The variables that say which process this is are incomplete ({error}).",
            fix="Start the processes with --nproc, torchrun or srun, which set all of them; or unset WORLD_SIZE.",
        ) from error
    return None


def _check_rank(place: ProcessPlace) -> ProcessPlace:
    if not 0 <= place.rank < place.size:
        raise ValueError(f"rank {place.rank} of {place.size}")
    return place


def _slurm_tasks_here(environment: Mapping[str, str]) -> int | None:
    """ "2(x3),1" lists the tasks of each node."""
    counts: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = entry.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1) if count else []
    node = int(environment.get("SLURM_NODEID", -1))
    return counts[node] if 0 <= node < len(counts) else None


def _slurm_master(environment: Mapping[str, str]) -> dict[str, str]:
    """Address and port of the first process: the first node, and a port derived from the job's number, so that two
    jobs on one node don't collide."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    result = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if result.returncode or not result.stdout.split():
        raise MachineError(
            f"scontrol can't list the nodes of {nodes!r}: {result.stderr.strip()}.", fix="Set MASTER_ADDR."
        )
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment["SLURM_STEP_ID"])
    return {"MASTER_ADDR": result.stdout.split()[0], "MASTER_PORT": str(20_000 + (job * 7 + step) % 10_000)}


@dataclass(eq=False)
class Group:
    """The processes that train together, from the point of view of one. With one process, every collective is the
    identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    store: Store | None = None
    shares: tuple[float, ...] = ()  # of a batch, one for each process; empty: all equal
    in_joint_step: bool = False  # all processes compute the same step now, so batch norms communicate
    _exchanges: int = field(default=0, repr=False)  # of values through the store, so far

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    # --- the shares of a batch ---

    def batch_share(self, count: int, alignment: int = ALIGNMENT) -> slice:
        """Which examples of a batch of `count` this process computes. Raises UsageError where a process would have
        none."""
        ends = self.batch_ends(count, alignment)
        return slice(ends[self.rank], ends[self.rank + 1])

    def batch_ends(self, count: int, alignment: int = ALIGNMENT) -> list[int]:
        """Where each process's share of `count` examples begins, and `count`. Shares begin at multiples of `alignment`
        where `count` allows it."""
        if count < self.size:
            raise too_many_processes(self.size, count)
        shares = self.shares or (1 / self.size,) * self.size
        unit = alignment if count >= alignment * self.size else 1
        units = count // unit
        ends = np.floor(np.cumsum((0.0, *shares)) / sum(shares) * units + 0.5).astype(int)
        for i in range(1, self.size + 1):  # each process gets at least one unit
            ends[i] = min(max(ends[i], ends[i - 1] + 1), units - (self.size - i))
        return [*(int(end) * unit for end in ends[:-1]), count]

    def even_share(self, count: int) -> slice:
        """Which of `count` items in order this process handles; may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    # --- collectives ---

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """A collective: the sum over all processes, in place."""
        if not self.is_alone:
            dist.all_reduce(values)
        return values

    def max(self, *values: float) -> list[float]:
        """A collective: the largest of each value over all processes."""
        if self.is_alone:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return [float(v) for v in largest]

    def gather_rows(self, rows: np.ndarray, first: int, count: int) -> np.ndarray:
        """A collective: the rows (n, …) of all processes as one array (count, …). Those of this process begin at row
        `first`."""
        if self.is_alone:
            return rows
        total = torch.zeros(count, *rows.shape[1:], dtype=torch.from_numpy(rows[:0]).dtype)
        if len(rows):
            total[first : first + len(rows)] = torch.from_numpy(rows)
        dist.all_reduce(total)  # at most one term of each sum isn't zero, so nothing is rounded
        return total.numpy()

    def barrier(self) -> None:
        """A collective: wait until all processes have made this call."""
        self.gather(None)

    def finish(self) -> None:
        """The last collective: no process ends before all have what they wait for. The first process, which may host
        the store, ends last."""
        self.barrier()
        if self.store is not None:
            self.store.set(f"left/{self.rank}", "")
            if self.is_first:
                self.store.wait([f"left/{rank}" for rank in range(self.size)])

    def gather(self, value: T) -> list[T]:
        """A collective: the values of all processes, by rank. They travel as JSON."""
        if self.store is None:
            return [value]
        self._exchanges += 1
        self.store.set(f"suanli/{self._exchanges}/{self.rank}", json.dumps(value))
        keys = [f"suanli/{self._exchanges}/{rank}" for rank in range(self.size)]
        return [json.loads(self.store.get(key)) for key in keys]

    def broadcast(self, value: Json) -> Json:
        """A collective: the value of the first process. It travels as JSON."""
        if self.store is None:
            return value
        self._exchanges += 1
        key = f"suanli/{self._exchanges}"
        if self.is_first:
            self.store.set(key, json.dumps(value))
        return json.loads(self.store.get(key))

    @contextmanager
    def joint_step(self) -> Iterator[None]:
        """Inside the block the network communicates: every process computes the same step now."""
        before, self.in_joint_step = self.in_joint_step, not self.is_alone
        try:
            yield
        finally:
            self.in_joint_step = before


def too_many_processes(processes: int, examples: int) -> UsageError:
    """The error for fewer examples in a batch than there are processes."""
    return UsageError(
        f"A batch of {examples} can't be shared by {processes} processes.",
        fix=f"Use at most {examples} processes, or a larger --batch-size.",
    )


ALONE = Group()
_current = ALONE


def current_group() -> Group:
    """The group of this process: ALONE before `join_group`, and where it was started alone."""
    return _current


def join_group(device: str) -> Group:
    """Connect to the processes that were started together with this one, and return the group; ALONE where there are
    none. `device` is torch's name of the device that this process computes on. Later calls return the same group.
    Raises MachineError where the processes can't be reached."""
    global _current
    place = process_place()
    if place is None or _current is not ALONE:
        return _current
    if device == "mps" and place.size > 1:
        raise MachineError("Several processes can't share an Apple GPU.", fix="Use --device cpu.")
    address = _set_master_address(place)
    try:
        store = _init_process_group(device)
    except (ValueError, RuntimeError, dist.DistError) as error:
        raise MachineError(
            f"Process {place.rank} of {place.size} can't reach the others at {address}: {first_line(error, 200)}",
            fix="Check that every host reaches that address and port, and that nothing else uses the port.",
        ) from error
    facts = PrefixStore("facts", store)
    facts.set_timeout(STORE_TIMEOUT)
    _current = Group(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=place.local_rank,
        local_size=place.local_size or 1,
        restarts=place.restarts,
        store=facts,
    )
    if not _current.is_first:
        console.mute()
    return _current


def _set_master_address(place: ProcessPlace) -> str:
    """Set the variables that torch reads, from Slurm's where those are missing. Returns address and port of the first
    process."""
    master: dict[str, str] = {}
    if "MASTER_ADDR" not in os.environ and "SLURM_STEP_ID" in os.environ:
        master = _slurm_master(os.environ)
    os.environ.update({"RANK": str(place.rank), "WORLD_SIZE": str(place.size)})
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.setdefault(name, master.get(name, ""))
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _init_process_group(device: str) -> Store:
    """Start torch's process group, and return its store."""
    store: Store
    store, rank, size = next(iter(rendezvous("env://", timeout=STORE_TIMEOUT)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = PrefixStore(_agree_on_attempt(store, rank, size), store)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    return store


def _agree_on_attempt(store: Store, rank: int, size: int) -> str:
    """A name for this start of the processes, agreed through the store. torchrun uses one store for all starts, which
    still has the addresses of processes that are gone; its agents count restarts separately, so their number isn't the
    same everywhere."""
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answers/{own}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    for other in range(1, size):
        while not store.check([f"{own}/{other}"]):
            if store.check([f"asks/{other}"]):  # perhaps from a process that is gone; then its successor asks soon
                store.set(f"answers/{store.get(f'asks/{other}').decode()}", own)
            time.sleep(POLL_S)
    return own


def threads_per_process(group: Group) -> int:
    """CPU threads for operations in this process: what the launcher has set, else its share of the cores."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if (count := process_environment.of_user(name) or "").isdecimal():
            return max(1, int(count))
    return max(1, cores() // group.local_size)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error of a collective means that another process is gone."""
    # gloo has no class of its own for this.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def leave_group() -> None:
    """End the process group, after the last collective of every process."""
    global _current
    if _current is not ALONE:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    _current = ALONE

"""The processes that train one network together: who this one is, and what it asks of the others.

The engine is torch.distributed. Who a process is comes from the variables that torchrun, Slurm's srun or an
operator of Kubernetes set; nothing else is read, so whoever starts the processes may do it.

A collective is a call that every process must make, in the same order. Only a training step and what says so in its
docstring is one; all else (measuring, planning, forecasting) computes alone, because processes that measure
don't make the same number of steps.

Small facts travel through the store as JSON, tensors through the process group. Nothing is pickled.
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

import numpy as np
import torch
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from suanli.core import console
from suanli.core.errors import MachineError, UsageError, first_line
from suanli.core.types import Json
from suanli.machine.device import cores

STORE_TIMEOUT = timedelta(hours=2)  # one process may plan, decode or download while the others wait for it
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # torch's own; `watchdog` notices earlier
POLL_S = 0.05  # of the store, for processes that have not come yet
ALIGNED = 2  # shares of a batch begin at multiples of it: augmentations that blend pictures pair neighbours


@dataclass(frozen=True, kw_only=True)
class ProcessPlace:
    """Where a process stands among those that were started together."""

    rank: int
    size: int  # of the world
    local_rank: int
    local_size: int | None  # processes on this machine; None: unknown
    restarts: int = 0  # of the whole group so far


def process_place(environment: Mapping[str, str] = os.environ) -> ProcessPlace | None:
    """From the variables of torchrun or of a step of Slurm; None: this process is alone.

    Raises UsageError where a variable is missing or no number.
    """
    try:
        if "WORLD_SIZE" in environment:
            local_size = environment.get("LOCAL_WORLD_SIZE")
            return _checked(
                ProcessPlace(
                    rank=int(environment["RANK"]),
                    size=int(environment["WORLD_SIZE"]),
                    local_rank=int(environment.get("LOCAL_RANK", 0)),
                    local_size=None if local_size is None else int(local_size),
                    restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
                )
            )
        if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return _checked(
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


def _checked(found: ProcessPlace) -> ProcessPlace:
    if not 0 <= found.rank < found.size:
        raise ValueError(f"rank {found.rank} of {found.size}")
    return found


def _slurm_tasks_here(environment: Mapping[str, str]) -> int | None:
    """ "2(x3),1" lists the tasks of each node."""
    counts: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = entry.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1) if count else []
    node = int(environment.get("SLURM_NODEID", -1))
    return counts[node] if 0 <= node < len(counts) else None


def _slurm_master(environment: Mapping[str, str]) -> dict[str, str]:
    """Address and port on which the first process is found: the first node, and a port from the job's number, so
    that two jobs on one node don't meet."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout.split():
        raise MachineError(
            f"scontrol can't tell the nodes of {nodes!r}: {listed.stderr.strip()}.", fix="Set MASTER_ADDR."
        )
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment["SLURM_STEP_ID"])
    return {"MASTER_ADDR": listed.stdout.split()[0], "MASTER_PORT": str(20_000 + (job * 7 + step) % 10_000)}


@dataclass(eq=False)
class Group:
    """The processes that train together, as one of them sees them. Alone, every collective is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    store: Store | None = None
    shares: tuple[float, ...] = ()  # of a batch, one for each process; empty: all alike
    in_joint_step: bool = False  # inside a training step: batch norms ask the others
    _exchanges: int = field(default=0, repr=False)  # facts exchanged so far

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    # --- the shares of a batch ---

    def batch_share(self, count: int) -> slice:
        """The places of a batch of `count` that this process computes. Raises UsageError where some process would
        have none."""
        ends = self.batch_ends(count)
        return slice(ends[self.rank], ends[self.rank + 1])

    def batch_ends(self, count: int) -> list[int]:
        """Where each process's part of `count` begins, and `count`. Parts begin at even places where they can."""
        if count < self.size:
            raise too_many_processes(self.size, count)
        shares = self.shares or (1 / self.size,) * self.size
        aligned = ALIGNED if count >= ALIGNED * self.size else 1
        places = count // aligned
        ends = np.floor(np.cumsum((0.0, *shares)) / sum(shares) * places + 0.5).astype(int)
        for i in range(1, self.size + 1):  # nobody without work
            ends[i] = min(max(ends[i], ends[i - 1] + 1), places - (self.size - i))
        return [*(int(end) * aligned for end in ends[:-1]), count]

    def even_share(self, count: int) -> slice:
        """Of `count` things in order, those that this process does; it may be none."""
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
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [float(v) for v in found]

    def gather_rows(self, rows: np.ndarray, first: int, count: int, width: int) -> np.ndarray:
        """A collective: the (n, K) float32 rows of every process, here those from place `first` on, as (count, K)."""
        if self.is_alone:
            return rows
        found = torch.zeros(count, width)
        if len(rows):
            found[first : first + len(rows)] = torch.from_numpy(rows)
        dist.all_reduce(found)  # each place has one term that isn't zero: nothing is rounded
        return found.numpy()

    def barrier(self) -> None:
        """A collective: until all are here."""
        self.gather(None)

    def finish(self) -> None:
        """A collective, and the last one: nobody goes before all have what they wait for. The first process may hold
        the store."""
        self.barrier()
        if self.store is not None:
            self.store.set(f"left/{self.rank}", "")
            if self.is_first:
                self.store.wait([f"left/{rank}" for rank in range(self.size)])

    def gather(self, value: Json) -> list[Json]:
        """A collective: what every process said, by rank."""
        if self.store is None:
            return [value]
        self._exchanges += 1
        self.store.set(f"suanli/{self._exchanges}/{self.rank}", json.dumps(value))
        keys = [f"suanli/{self._exchanges}/{rank}" for rank in range(self.size)]
        return [json.loads(self.store.get(key)) for key in keys]

    def broadcast(self, value: Json) -> Json:
        """A collective: what the first process said."""
        if self.store is None:
            return value
        self._exchanges += 1
        key = f"suanli/{self._exchanges}"
        if self.is_first:
            self.store.set(key, json.dumps(value))
        return json.loads(self.store.get(key))

    @contextmanager
    def joint_step(self) -> Iterator[None]:
        """Inside, the network asks the other processes: every process computes the same step now."""
        before, self.in_joint_step = self.in_joint_step, not self.is_alone
        try:
            yield
        finally:
            self.in_joint_step = before


def too_many_processes(processes: int, examples: int) -> UsageError:
    """For fewer examples in a batch than there are processes."""
    return UsageError(
        f"A batch of {examples} can't be shared by {processes} processes.",
        fix=f"Use at most {examples} processes, or a larger --batch-size.",
    )


ALONE = Group()
_current = ALONE


def current_group() -> Group:
    """The group of this process: ALONE before `join` and where nobody started others."""
    return _current


def join_group(device: str) -> Group:
    """Meets the others that were started together with this process, and gives the group; ALONE where there are
    none. `device` is torch's name of the one that this process computes on. Later calls give the same group. Raises
    MachineError where they can't be met."""
    global _current
    here = process_place()
    if here is None or _current is not ALONE:
        return _current
    if device == "mps" and here.size > 1:
        raise MachineError("Several processes can't share an Apple GPU.", fix="Use --device cpu.")
    environment = dict(os.environ)
    if "MASTER_ADDR" not in environment and "SLURM_STEP_ID" in environment:
        environment |= _slurm_master(environment)
    os.environ.update({"RANK": str(here.rank), "WORLD_SIZE": str(here.size)})
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.setdefault(name, environment.get(name, ""))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=STORE_TIMEOUT)))
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = PrefixStore(_agree_on_attempt(store, rank, size), store)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    except (ValueError, RuntimeError, dist.DistError) as error:
        raise MachineError(
            f"Process {here.rank} of {here.size} can't meet the others at {address}: {first_line(error, 200)}",
            fix="Check that every host reaches that address and port, and that nothing else uses the port.",
        ) from error
    _current = Group(
        rank=rank,
        size=size,
        local_rank=here.local_rank,
        local_size=here.local_size or 1,
        restarts=here.restarts,
        store=PrefixStore("facts", store),
    )
    if rank:
        console.mute()
    _current.store.set_timeout(STORE_TIMEOUT)  # type: ignore[union-attr]
    return _current


def _agree_on_attempt(store: Store, rank: int, size: int) -> str:
    """A name for this start of the processes. torchrun keeps one store for all starts, which still has the addresses of
    processes that are gone; and its agents count restarts each by itself, so that number isn't the same for all."""
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answers/{own}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    for other in range(1, size):
        while not store.check([f"{own}/{other}"]):
            if store.check([f"asks/{other}"]):  # perhaps by a process that is gone; then the next one asks soon
                store.set(f"answers/{store.get(f'asks/{other}').decode()}", own)
            time.sleep(POLL_S)
    return own


def threads_per_process(group: Group) -> int:
    """Of operations on the CPU in this process: what who started it has set, else its share of the cores."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if os.environ.get(name, "").isdecimal():
            return max(1, int(os.environ[name]))
    return max(1, cores() // group.local_size)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error of a collective says that another process is gone."""
    # gloo has no class of its own for it.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def leave_group() -> None:
    """The process group ends: after the last collective of every process."""
    global _current
    if _current is not ALONE:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    _current = ALONE

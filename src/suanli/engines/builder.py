"""Builds and loads candidates, each in a sandbox of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from suanli.core.errors import pip_install
from suanli.core.types import Device, Engine, Placement
from suanli.engines.candidates import Candidate
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.engines.subject import Subject

CALIBRATION = "calibration"  # a folder of examples


@dataclass(frozen=True, kw_only=True)
class EngineBuilder:
    subject: Subject
    device: Device
    work: Path  # a folder for the engines' files
    threads: int  # all that there are
    graph: Path | None  # the ONNX graph
    no_graph: str | None  # why there is none

    def why_not(self, engine: Engine, precision: str) -> str | None:
        """Why the engine can't be built in this precision; None: it can be tried."""
        if reason := engine.why_not(self.device, precision):
            return reason
        packages = (*engine.packages, *(engine.build_packages if precision == "int8" else ()))
        if missing := missing_packages(packages):
            return missing
        if engine.needs == "onnx" and self.graph is None:
            return f"there is no ONNX graph: {self.no_graph}"
        if engine.needs == "model" and self.subject.model is None:
            return "there is only an ONNX graph, no PyTorch network"
        if precision != "float32" and self.subject.origin == "made up":
            return "a lower precision can't be evaluated on random inputs"
        if precision == "int8" and self.subject.calibration is None:
            return "there are no examples to calibrate with"
        return None

    def build(self, engine: Engine, candidate: Candidate, limit_s: float) -> tuple[Candidate, Sandbox]:
        """The candidate with its times and size, and the sandbox in which it is loaded, for the caller to close.

        It is built in one process and loaded in another, so that memory and load time are those that a user will see.
        """
        folder = engine_folder(self.work, candidate)
        folder.mkdir()
        with start_sandbox(self.work) as sandbox:
            reply = sandbox.ask(
                min(limit_s, 3600.0),
                "build",
                engine=engine.name,
                precision=candidate.precision,
                inputs=self._describe_inputs(candidate.kept),
                folder=str(folder),
                placement=self._placement(self.threads),
            )
        sandbox = start_sandbox(self.work)
        try:
            load_s = self.load(sandbox, candidate, self.threads, limit_s)
        except BaseException:
            sandbox.close()
            raise
        size_bytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        return replace(candidate, build_s=reply["took_s"], load_s=load_s, size_bytes=size_bytes), sandbox

    def load(self, sandbox: Sandbox, candidate: Candidate, threads: int, limit_s: float) -> float:
        """The seconds that loading took."""
        reply = sandbox.ask(
            min(max(limit_s, 10.0), 600.0),
            "load",
            engine=candidate.engine,
            precision=candidate.precision,
            folder=str(engine_folder(self.work, candidate)),
            placement=self._placement(threads),
        )
        return float(reply["took_s"])

    def memory_bytes(self, sandbox: Sandbox) -> int:
        """The peak memory of a sandbox's process."""
        return int(sandbox.ask(60, "memory", placement=self._placement(self.threads))["bytes"])

    def rank_layers(self, limit_s: float) -> list[str]:
        """Names of layers, the one that int8 hurts most first. Raises SandboxError where that can't be measured."""
        if importlib.util.find_spec("onnxruntime") is None:
            raise SandboxError("not installed: onnxruntime")
        task = self.subject.task
        with start_sandbox(self.work) as sandbox:
            reply = sandbox.ask(
                limit_s,
                "rank_layers",
                inputs=self._describe_inputs(),
                task={"name": task.name, "classes": task.classes, "settings": task.settings},
                placement=self._placement(self.threads),
            )
        return [name for name, _ in reply["layers"]]

    def _describe_inputs(self, kept: Sequence[str] = ()) -> dict[str, object]:
        calibration = self.work / CALIBRATION
        return {
            "model": None if self.subject.model is None else str(self.subject.model),
            "onnx": None if self.graph is None else str(self.graph),
            "calibration": str(calibration) if calibration.exists() else None,
            "kept": list(kept),
            "batches": self.subject.examples.batches,
        }

    def _placement(self, threads: int) -> dict[str, object]:
        return asdict(Placement(device=self.device, threads=threads, trust_code=self.subject.trust_code, tuning=True))


def make_builder(
    subject: Subject, device: Device, work: Path, *, engines: Iterable[Engine], threads: int, export_limit_s: float
) -> EngineBuilder:
    """Writes examples for calibration into `work`, and the ONNX graph where an engine that can run here reads one:
    exporting takes longer than building some engines."""
    if subject.calibration is not None:
        subject.calibration.save(work / CALIBRATION)
    graph, no_graph = subject.graph, None
    if graph is None and _reads_graph(engines, device):
        graph, no_graph = _export_graph(subject, work, export_limit_s)
    return EngineBuilder(subject=subject, device=device, work=work, threads=threads, graph=graph, no_graph=no_graph)


def _reads_graph(engines: Iterable[Engine], device: Device) -> bool:
    return any(
        engine.why_not(device, precision) is None and missing_packages(engine.packages) is None
        for engine in engines
        if engine.needs == "onnx"
        for precision in engine.precisions
    )


def _export_graph(subject: Subject, work: Path, limit_s: float) -> tuple[Path | None, str | None]:
    """The graph, or None and the reason."""
    if missing := missing_packages(("onnx", "onnxscript")):
        return None, missing
    assert subject.model is not None
    path = work / "model.onnx"
    with start_sandbox(work) as sandbox:
        try:
            sandbox.ask(limit_s, "export", model=str(subject.model), path=str(path), trust_code=subject.trust_code)
        except SandboxError as error:
            return None, str(error)
    return path, None


def start_sandbox(work: Path) -> Sandbox:
    return Sandbox(work / "scratch")


def engine_folder(work: Path, candidate: Candidate) -> Path:
    """Where the candidate's files are."""
    kept = f"-{len(candidate.kept)}" if candidate.kept else ""
    return work / f"{candidate.engine}-{candidate.precision}{kept}"


def missing_packages(packages: Iterable[str]) -> str | None:
    """Which of these distributions aren't installed, with the command that installs them."""
    missing = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return f"not installed: {', '.join(missing)} ({pip_install('suanli[engines]')})" if missing else None

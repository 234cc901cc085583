"""The command line: one subcommand a verb, each a thin skin over the function of the same name.

Standard output carries the verb's result: a text for people, or with --json exactly one JSON
object. Everything else goes to standard error. Nothing heavy is imported until a verb needs it.
"""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suanli.core.console import is_muted
from suanli.core.errors import Interrupted, LostProcess, SuanliError, UsageError
from suanli.core.garbage import pause_collector
from suanli.machine import process_environment
from suanli.parallel import fatal

if TYPE_CHECKING:
    from suanli.core.run import Run

app = typer.Typer(
    name="suanli",
    help="suanli (算力, computing power): data in, a trained, measured, optimised model out.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# --- options that several verbs share ---

Data = Annotated[str, typer.Argument(metavar="DATA", help="A built-in name, folder, archive, table file or .npz.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Model = Annotated[str | None, typer.Option(help="A built-in name, package.module:function or timm:NAME.")]
Recipe = Annotated[str | None, typer.Option(help="A shipped recipe; without it, the one that suits the data.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples of one step, over all processes.")]
Speedups = Annotated[str, typer.Option(help="auto, none, or names separated by commas.")]
Engine = Annotated[str, typer.Option(help="auto (what optimize chose), reference, or an engine's name.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe; repeatable."),
]
InputColumn = Annotated[str | None, typer.Option(help="Column of a table with the text, or the file's path.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a table with the label.")]
GroupColumn = Annotated[str | None, typer.Option(help="Column with the patient, speaker, …: no two splits share one.")]
GroupPattern = Annotated[
    str | None, typer.Option(metavar="REGEX", help="For files: its (…) takes the patient, speaker, … from the path.")
]
TimeColumn = Annotated[str | None, typer.Option(help="Column with a date or number: the latest are the test split.")]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of undecodable inputs that is accepted.")]
DataDir = Annotated[Path | None, typer.Option(help="Where downloads live (or SUANLI_DATA).")]
CacheDir = Annotated[Path | None, typer.Option(help="Where prepared data lives (or SUANLI_CACHE).")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the code that a saved model names.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


# --- verbs ---


@app.command("device", help="Show this machine, what torch can use of it, what it reaches, and what is missing.")
def _device(
    context: typer.Context,
    probe: Annotated[bool, typer.Option("--probe", help="Measure what the device reaches (under 20 s), once.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure it anew.")] = False,
    device: DeviceName = "auto",
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.device import device as describe
        from suanli.verbs.device import table

        report = describe(**_options(context))
        result.values = report.to_json()
        result.render = lambda: table(report)


@app.command("prepare", help="Check a data set and decode it into the cache.")
def _prepare(
    context: typer.Context,
    data: Data,
    recipe: Recipe = None,
    settings: Settings = None,
    input_column: InputColumn = None,
    label_column: LabelColumn = None,
    group_column: GroupColumn = None,
    group_pattern: GroupPattern = None,
    time_column: TimeColumn = None,
    max_bad: MaxBad = 0.01,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.prepare import prepare, summary

        prepared = prepare(**_options(context))
        result.values = prepared.to_json() | {"check": prepared.findings}
        result.render = lambda: summary(prepared)


# Options of `train` and `run`.
Epochs = Annotated[float | None, typer.Option(help="Passes over the training data.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same machine, same result.")]
Weights = Annotated[Path | None, typer.Option(help="Start from these weights (.safetensors).")]
TargetAccuracy = Annotated[float | None, typer.Option(help="Train the least that is known to reach it (0 to 1).")]
TimeBudget = Annotated[str | None, typer.Option(help="Train the best that fits: 90s, 5m, 1.5h.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: measured, then cached.")]
Processes = Annotated[str | None, typer.Option("--nproc", help="Processes that share each batch: a number, or auto.")]
Balance = Annotated[bool, typer.Option("--balance", help="Shares of a batch follow each process's speed.")]
Shard = Annotated[
    bool | None,
    typer.Option("--shard/--no-shard", help="Each process holds a part of the network; default: as the run did."),
]
MaxRestarts = Annotated[int, typer.Option(min=0, help="How often several processes restart after one died.")]
HangTimeout = Annotated[float, typer.Option(min=1, help="Seconds without a step until several processes restart.")]
RunOut = Annotated[Path | None, typer.Option(help="The run directory; default: runs/<data>-<n>.")]
MoreEpochs = Annotated[float | None, typer.Option(help="Continue a finished run for so long.")]
CheckpointEvery = Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")]
Track = Annotated[list[str] | None, typer.Option(help="tensorboard, mlflow or wandb; repeatable.")]
Emit = Annotated[str | None, typer.Option(help="Train nothing; print a file for a cluster: slurm or kubernetes.")]
Submit = Annotated[bool, typer.Option("--submit", help="With --emit: submit that file, too.")]
Nodes = Annotated[int, typer.Option(min=1, help="With --emit: machines, each with --nproc processes.")]
Image = Annotated[str | None, typer.Option(help="With --emit kubernetes: a container image with suanli.")]
CLUSTER_OPTIONS = ("emit", "submit", "nodes", "image")  # of train, for a file instead of a training


def _training(verb: str) -> Callable[..., None]:
    """The command `train`, or `run`, which takes the same options."""

    def command(
        context: typer.Context,
        data: Annotated[str, typer.Argument(metavar="DATA", help="A data set, or an interrupted run to go on with.")],
        model: Model = None,
        weights: Weights = None,
        recipe: Recipe = None,
        epochs: Epochs = None,
        batch_size: BatchSize = None,
        lr: LearningRate = None,
        seed: Seed = None,
        settings: Settings = None,
        target_accuracy: TargetAccuracy = None,
        time_budget: TimeBudget = None,
        device: DeviceName = "auto",
        speedups: Speedups = "auto",
        threads: Threads = None,
        nproc: Processes = None,
        balance: Balance = False,
        shard: Shard = None,
        max_restarts: MaxRestarts = 3,
        hang_timeout_s: HangTimeout = 300.0,
        out: RunOut = None,
        more_epochs: MoreEpochs = None,
        checkpoint_every_s: CheckpointEvery = 60.0,
        track: Track = None,
        emit: Emit = None,
        submit: Submit = False,
        nodes: Nodes = 1,
        image: Image = None,
        input_column: InputColumn = None,
        label_column: LabelColumn = None,
        group_column: GroupColumn = None,
        group_pattern: GroupPattern = None,
        time_column: TimeColumn = None,
        max_bad: MaxBad = 0.01,
        data_dir: DataDir = None,
        cache_dir: CacheDir = None,
        trust_code: TrustCode = False,
        as_json: AsJson = False,
    ) -> None:
        with _result(as_json) as result:
            if emit or submit or nodes != 1 or image:
                _emit(result, verb, context)
            elif verb == "run":
                _run(result, _options(context, *CLUSTER_OPTIONS))
            else:
                _train(result, _options(context, *CLUSTER_OPTIONS))

    return command


def _train(result: _Result, options: dict[str, Any]) -> None:
    with pause_collector():
        from suanli.verbs.train import train
    gc.freeze()  # modules stay, so no later collection needs to look through them

    run = train(**options)
    if is_muted():  # another process of the same training prints the result
        return
    scores = {f"val_{name}": value for name, value in _last_validation(run).items()}
    result.values = _describe(run) | {"scores": scores}
    result.render = lambda: f"Run: {run.path}\nNext: suanli evaluate {run.path}"


def _run(result: _Result, options: dict[str, Any]) -> None:
    with pause_collector():
        from suanli.core import registry
        from suanli.verbs.run import run
    gc.freeze()

    made = run(**options)
    if is_muted():
        return
    result.values = _describe(made) | {"scores": made.scores}
    metric = registry.load("tasks", made.recipe.task).metric
    score = metric.format(made.scores[metric.name])
    lines = {"Run": made.path, "Model": made.model_path, "Report": made.path / "report.html"}
    text = "".join(f"\n{name + ':':<8}{path}" for name, path in lines.items())
    result.render = lambda: f"Test {metric.name}: {score}{text}"


def _describe(run: Run) -> dict[str, Any]:
    return {"run": str(run.path), "status": run.summary["status"], "epochs": run.summary["epochs"]}


def _last_validation(run: Run) -> dict[str, float]:
    """Scores of the weights that were kept."""
    scores = [m["scores"] for m in run.metrics if m.get("split") == "val"]
    if run.recipe.early_stop is None:
        return scores[-1] if scores else {}
    return max(scores, key=lambda s: next(iter(s.values())), default={})


def _emit(result: _Result, verb: str, context: typer.Context) -> None:
    from suanli.core.console import say
    from suanli.parallel.submission import emit

    if verb != "train":
        raise UsageError("--emit is for suanli train.", fix="Evaluate and report when the run is there.")
    cluster = {name: context.params[name] for name in CLUSTER_OPTIONS}
    asked = {k: v for k, v in context.params.items() if _is_given(context, k) and k not in (*cluster, "as_json")}
    emitted = emit(
        asked, kind=cluster["emit"], nodes=cluster["nodes"], image=cluster["image"], submitting=cluster["submit"]
    )
    result.values = {**emitted}
    result.render = lambda: emitted["emitted"].rstrip("\n")
    if emitted["submitted"] is not None:
        say(emitted["submitted"])


app.command("train", help="Train a model into a run directory.")(_training("train"))


@app.command("evaluate", help="Evaluate the model of a run.")
def _evaluate(
    context: typer.Context,
    run: RunDir,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Evaluate on other data with the same classes.")] = None,
    device: DeviceName = "auto",
    augmented_views: Annotated[bool, typer.Option(help="Also score with test-time augmentation.")] = True,
    cache_dir: CacheDir = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.evaluate import evaluate, table

        evaluation = evaluate(**_options(context))
        values: dict[str, Any] = evaluation.to_json()
        for examples in (values["mistakes"], values["samples"]):
            for example in examples:
                del example["preview"]  # the report's
        if split != "test":
            values["scores"] = {f"{split}_{name}": value for name, value in values["scores"].items()}
        result.values = values | {"run": str(run)}
        result.render = lambda: table(evaluation)


@app.command("predict", help="Answer for files, folders or standard input.")
def _predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL INPUT...", help="A run or its model/ folder; then files, folders, patterns, or - (stdin)."
        ),
    ],
    url: Annotated[
        str | None, typer.Option(help="Ask this server instead, and name no MODEL: http://127.0.0.1:8000.")
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="How many entries of an answer that ranks, such as classes, to show.")
    ] = 5,
    engine: Engine = "auto",
    device: DeviceName = "auto",
    trust_code: TrustCode = False,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values.")] = False,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        if csv and as_json:
            raise UsageError("--csv and --json exclude each other.", fix="Choose one.")
        from suanli.verbs.predict import as_csv, predict, table

        model, inputs = (words[0], words[1:]) if url is None else (None, words)
        if not inputs:
            raise UsageError("There is nothing to predict.", fix="Name files, folders, a quoted pattern, or -.")
        answers = predict(model, inputs, top=top, engine=engine, device=device, trust_code=trust_code, url=url)
        result.values = {"model": model or url, "predictions": [p.to_json() for p in answers]}
        result.render = lambda: as_csv(answers) if csv else table(answers)
        if answers and all(p.error for p in answers):
            result.exit_code = 3


NOT_SCALED = ("epochs", "threads", "time_budget_s", "price_per_hour")  # options that --scaling does not take


@app.command("bench", help="Measure what each change of the plan brings; --scaling: processes.")
def _bench(
    context: typer.Context,
    data: Data,
    model: Model = None,
    recipe: Recipe = None,
    epochs: Annotated[float | None, typer.Option(help="Of the training that is planned.")] = None,
    batch_size: BatchSize = None,
    settings: Settings = None,
    device: DeviceName = "auto",
    speedups: Speedups = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads of the full plan; default: measured.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each measurement; default: what time allows.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; each times every variant once.")] = 5,
    time_budget_s: Annotated[float | None, typer.Option(help="Seconds for all measurements together.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of this machine, in any currency.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; default: runs/<data>-bench-<n>.")] = None,
    input_column: InputColumn = None,
    label_column: LabelColumn = None,
    group_column: GroupColumn = None,
    group_pattern: GroupPattern = None,
    time_column: TimeColumn = None,
    max_bad: MaxBad = 0.01,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    scaling: Annotated[bool, typer.Option("--scaling", help="Measure 1, 2, … processes on a batch instead.")] = False,
    processes: Annotated[str | None, typer.Option(help="With --scaling: 1,2,4; default: powers of two.")] = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        if scaling:
            _refuse_given(context, NOT_SCALED, "with --scaling")
            _bench_processes(result, _options(context, "scaling", *NOT_SCALED))
        else:
            _refuse_given(context, ("processes",), "without --scaling")
            _bench_speedups(result, _options(context, "scaling", "processes"))


def _bench_speedups(result: _Result, options: dict[str, Any]) -> None:
    from suanli.verbs.bench import PlanRefused, bench, table

    try:
        measured = bench(**options)
        result.values = measured.to_json()
    except PlanRefused as error:  # the figures are shown all the same
        measured = error.result
        result.fail(error, measured.to_json())
    result.render = lambda: table(measured)


def _bench_processes(result: _Result, options: dict[str, Any]) -> None:
    from suanli.verbs.bench_scaling import bench_scaling, table

    measured = bench_scaling(**options)
    result.values = measured.to_json()
    result.render = lambda: table(measured)


@app.command("optimize", help="Find the fastest engine for a trained model that still gives the right answers.")
def _optimize(
    context: typer.Context,
    subject: Annotated[
        str,
        typer.Argument(metavar="SUBJECT", help="A run, a model/ folder, an .onnx file, or package.module:function."),
    ],
    goal: Annotated[str, typer.Option("--for", help="latency, throughput, size or energy.")] = "latency",
    tolerance: Annotated[
        float | None, typer.Option(help="Loss of the primary metric that is accepted, such as 0.005.")
    ] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="95 of 100 single answers must be quicker.")] = None,
    time_budget: Annotated[str, typer.Option(help="For all of it: 90s, 5m, 1.5h.")] = "3m",
    engines: Annotated[str | None, typer.Option(help="Names separated by commas; default: all.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="For calibration and evaluation: labelled data, a folder of pictures, .npz files."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Of a function's network (.safetensors).")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels of an ONNX file's input: 224, or 224x160.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of each channel, white is 1: 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="Of each channel: 0.229,0.224,0.225.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the engines of an ONNX file or a function go.")] = None,
    device: DeviceName = "auto",
    cache_dir: CacheDir = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.optimize import TooSlow, optimize, table

        options = _options(context) | {"mean": _parse_numbers("--mean", mean), "std": _parse_numbers("--std", std)}
        try:
            optimized = optimize(**options)
            result.values = optimized.to_json()
        except TooSlow as error:  # the figures are shown all the same
            optimized = error.result
            result.fail(error, optimized.to_json())
        result.render = lambda: table(optimized)


@app.command("export", help="Write a trained model as a plain file, for use without suanli.")
def _export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory or its model/ folder.")],
    to: Annotated[str, typer.Option("--to", help="onnx, openvino, pt2 or safetensors (weights alone).")],
    out: Annotated[Path | None, typer.Option(help="The file or folder; default: <run>.<form>, here.")] = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.export import export, summarize

        exported = export(run, to=to, out=out, trust_code=trust_code)
        result.values = {"run": str(run)} | exported.to_json()
        result.render = lambda: summarize(exported)


@app.command("serve", help="Answer requests over HTTP and gRPC, and on a web page.")
def _serve(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="A run, a model/ folder, or a folder of models (NAME/ or NAME/1/).")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="For HTTP; 0: a free one.")] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="For gRPC too; usual is 8001.")] = None,
    p99_ms: Annotated[
        float | None, typer.Option("--p99-ms", help="The longest that a request may take; others are refused at once.")
    ] = None,
    engine: Engine = "auto",
    device: DeviceName = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine; default: as optimize chose.")] = None,
    max_body_mb: Annotated[float, typer.Option(help="Of one request.")] = 64,
    max_image_megapixels: Annotated[float, typer.Option(help="Of one picture.")] = 50,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Clients must send the key in this file; default: $SUANLI_API_KEY, if set.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate (PEM), for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    shutdown_delay_s: Annotated[
        float, typer.Option(min=0, help="Seconds between 'not ready' and no more connections, for load balancers.")
    ] = 0,
    log: Annotated[str, typer.Option(help="json, text, none, or auto: text on a terminal.")] = "auto",
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log every request, too.")] = False,
    trust_code: TrustCode = False,
) -> None:
    from suanli.verbs.serve import serve

    serve(**_options(context))


@app.command("report", help="Write the run's report, one HTML page.")
def _report(
    run: RunDir,
    out: Annotated[Path | None, typer.Option(help="Where to write it; default: <run>/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.report import report

        path = report(run, out=out)
        result.values = {"run": str(run), "report": str(path)}
        result.render = lambda: f"Report: {path}"


app.command("run", help="Prepare, train, evaluate and report in one go.")(_training("run"))


# --- results and errors ---


class _Result:
    values: dict[str, Any]
    render: Callable[[], Any]  # what a person sees: text, or something that rich prints
    exit_code = 0

    def fail(self, error: SuanliError, figures: dict[str, Any]) -> None:
        """Report an error together with the figures that it comes with."""
        failure = {"error": error.message, "fix": error.fix, "exit_code": error.exit_code}
        self.values, self.exit_code = figures | failure, error.exit_code
        print(f"suanli: {error}", file=sys.stderr)


@contextmanager
def _result(as_json: bool) -> Iterator[_Result]:
    """Prints what the verb filled in and, with --json, how long it took."""
    started = time.perf_counter()
    result = _Result()
    yield result
    if is_muted():  # another process of the same training prints the result
        return
    if as_json:
        values = result.values | {"seconds": time.perf_counter() - started}
        print(json.dumps(values, ensure_ascii=False, default=str))
    else:
        output = result.render()
        if isinstance(output, str):
            print(output)
        else:
            from rich.console import Console

            Console(highlight=False).print(output)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _options(context: typer.Context, *without: str) -> dict[str, Any]:
    """The arguments of the verb's function: all options but those of the command line itself and `without`."""
    options = {k: v for k, v in context.params.items() if k not in ("as_json", *without)}
    if "settings" in options:
        options["settings"] = _parse_settings(options["settings"])
    return options


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user wrote the option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    if not settings:
        return {}
    from suanli.core.settings import parse_assignment

    return dict(parse_assignment(s) for s in settings)


def _refuse_given(context: typer.Context, names: Sequence[str], how: str) -> None:
    """Raises UsageError for an option of bench that makes no sense with --scaling, or without."""
    for name in names:
        if _is_given(context, name):
            raise UsageError(f"--{name.replace('_', '-')} can't be used {how}.", fix="Leave it out.")


def _parse_numbers(option: str, text: str | None) -> list[float] | None:
    """ "0.5,0.4,0.3" as numbers."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} takes numbers separated by commas, not {text!r}.", fix="Such as 0.5,0.4,0.3."
        ) from error


@app.callback(invoke_without_command=True)
def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from suanli import __version__

        print(f"suanli {__version__}")
        raise typer.Exit


INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt
KEPT = {  # what a verb that was stopped leaves; others: nothing
    "optimize": "The engines from before are unchanged.",
    "serve": "",
}
MISSING = {  # what to name where an argument is missing
    "data": "Name the data: a folder, archive, table or built-in name, such as {command} digits.",
    "run": "Name a run, such as {command} runs/digits-1.",
    "subject": "Name a trained run, such as {command} runs/digits-1.",
    "words": "Name a run and what to predict, such as {command} runs/digits-1 photo.png.",
    "to": "Name the format: --to onnx, openvino, pt2 or safetensors.",
}


def main(arguments: list[str] | None = None) -> None:
    """The entry point: runs a verb and exits with its code."""
    process_environment.set_variables()
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal can't show
    # Accepted anywhere on the line: people add it to the command that has just failed.
    debug = "--debug" in arguments
    if fatal.is_supervised():
        fatal.exit_when_reported()
    code = _main([a for a in arguments if a != "--debug"], debug)
    if any(name in os.environ for name in (fatal.REPORT_VARIABLE, "WORLD_SIZE", "SLURM_STEP_ID")):
        # The launcher may send SIGTERM while this process is ending anyway.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        group = sys.modules.get("suanli.parallel.group")
        if code == 0 and group is not None and not fatal.is_reported():  # or it could wait for a process that is gone
            group.leave_group()  # or NCCL warns of open connections
    gc.freeze()  # or ending looks for garbage in all that torch has loaded: 0.2 s
    sys.exit(code)


def _main(arguments: list[str], debug: bool) -> int:
    # SIGTERM acts like Ctrl-C, so that half-written files are removed. Training handles both in its own way.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not arguments:
        app(["--help"], standalone_mode=False, prog_name="suanli")
        return 2
    try:
        code = int(app(arguments, standalone_mode=False, prog_name="suanli") or 0)
        if code != INTERRUPTED or fatal.is_supervised():
            return code
        message, fix = "Stopped.", KEPT.get(arguments[0], "Nothing was kept.")
    except SuanliError as error:
        if debug:
            raise
        if fatal.is_supervised() and (_report_to_launcher(error) or isinstance(error, Interrupted)):
            return 130 if isinstance(error, Interrupted) else 0
        message, fix, code = error.message, error.fix, error.exit_code
    except typer.TyperException as error:  # a command line that can't be parsed
        message, fix, code = *_explain_command_line(error), 2
    except typer.Abort:  # the end of standard input
        message, fix, code = "Stopped.", "", INTERRUPTED
    except typer.Exit as error:
        return error.exit_code
    except (BrokenPipeError, SystemExit) as error:
        # The reader of a pipe (head) has closed it, which is no error. Where typer notices it first, it exits.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # people get a sentence, not a traceback
        if debug:
            raise
        if fatal.is_supervised() and _report_to_launcher(error):
            return 0
        message, fix, code = _explain_unexpected(error)
    if "--json" in arguments:
        print(json.dumps({"error": message, "fix": fix, "exit_code": code}, ensure_ascii=False))
    print(f"suanli: {message} {fix}".rstrip(), file=sys.stderr)
    return code


def _explain_command_line(error: typer.TyperException) -> tuple[str, str]:
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    command = "suanli" if context is None else context.command_path
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if parameter is not None and parameter.name in MISSING and message.startswith("Missing"):
        message = MISSING[parameter.name].format(command=command)
    if not message.endswith((".", "?")):
        message += "."
    return message, f"See {command} --help."


def _report_to_launcher(error: Exception) -> bool:
    """In one of several processes: report an error that no restart fixes. Gives whether the launcher knows of one."""
    if isinstance(error, SuanliError) and not isinstance(error, LostProcess):
        return fatal.report(error)
    return fatal.is_reported()


def _explain_unexpected(error: Exception) -> tuple[str, str, int]:
    from suanli.machine.device import is_out_of_memory

    if is_out_of_memory(error):
        return "Memory ran out.", "End other programs, or choose smaller inputs or a smaller model.", 4
    if isinstance(error, OSError):  # a name that is too long, a file that may not be read
        where = str(error.filename or "")
        cut = f"{where[:100]}…" if len(where) > 100 else where
        return f"{error.strerror or error}: {cut}.", "Check that path and who may use it.", 3
    return f"{type(error).__name__}: {error}.", "This error was not expected; --debug shows where it happened.", 1


if __name__ == "__main__":
    main()

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from suanli.core.console import is_muted, stop_progress
from suanli.core.errors import Interrupted, LostProcess, SuanliError, UsageError
from suanli.core.garbage import pause_collector
from suanli.machine import process_environment
from suanli.parallel import fatal

if TYPE_CHECKING:
    from suanli.core.run import Run
    from suanli.engines.predictor import Prediction
    from suanli.verbs.embed import Embedding

app = typer.Typer(
    name="suanli",
    help="suanli (算力, computing power) turns data into a trained, measured and optimised model.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# --- options that several verbs share ---

Data = Annotated[
    str,
    typer.Argument(metavar="DATA", help="A built-in data set, a folder, archive, table or .npz, or a file of boxes."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Model = Annotated[
    str | None, typer.Option(help="Train this network: a built-in name, package.module:function or timm:NAME.")
]
Recipe = Annotated[str | None, typer.Option(help="Use this built-in recipe; default: the one that suits the data.")]
BatchSize = Annotated[int | None, typer.Option(help="Use this many examples in a step, over all processes.")]
Speedups = Annotated[str, typer.Option(help="Use these speedups: auto, none, or names separated by commas.")]
Engine = Annotated[str, typer.Option(help="Use this engine: auto (what optimize chose), reference, or a name.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set any field of the recipe; repeatable."),
]
Tiles = Annotated[
    int | None,
    typer.Option(
        metavar="PX", help="Cut images into overlapping tiles of this side, for small objects in large images."
    ),
]
InputColumn = Annotated[
    str | None, typer.Option(help="Read the text, or the path of the file, from this column of a table.")
]
LabelColumn = Annotated[str | None, typer.Option(help="Read the label from this column of a table.")]
Target = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Learn this column of a table from all its other columns.")
]
GroupColumn = Annotated[
    str | None, typer.Option(help="Read the group (patient, speaker, …) from this column; no group is in two splits.")
]
GroupPattern = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Take the group (patient, …) from the path of each file: the part in (…)."),
]
TimeColumn = Annotated[
    str | None, typer.Option(help="Read a date or number from this column; the latest rows are the test split.")
]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Accept up to this share of examples that can't be decoded.")]
DataDir = Annotated[Path | None, typer.Option(help="Keep downloads here; default: $SUANLI_DATA, or the cache.")]
CacheDir = Annotated[Path | None, typer.Option(help="Cache data here; default: $SUANLI_CACHE, or ~/.cache/suanli.")]
DeviceName = Annotated[str, typer.Option("--device", help="Compute on this device: auto, cpu, cuda, cuda:1 or mps.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Allow a saved model to run the code that it names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]


# --- verbs ---


@app.command("device", help="Show this machine, how fast it is, and what is missing.")
def _device(
    context: typer.Context,
    probe: Annotated[bool, typer.Option("--probe", help="Measure how fast the device is (under 20 s), once.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, even if the figures are cached.")] = False,
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
    tiles: Tiles = None,
    settings: Settings = None,
    input_column: InputColumn = None,
    label_column: LabelColumn = None,
    target: Target = None,
    group_column: GroupColumn = None,
    group_pattern: GroupPattern = None,
    time_column: TimeColumn = None,
    max_bad: MaxBad = 0.01,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write some training images with their labels into FOLDER.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.prepare import prepare, summary

        prepared = prepare(**_options(context))
        result.values = prepared.to_json() | {"check": prepared.findings}
        result.render = lambda: summary(prepared)


# Options of `train` and `run`.
Epochs = Annotated[float | None, typer.Option(help="Train for this many passes over the training data.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Set the peak learning rate.")]
Seed = Annotated[
    int | None, typer.Option(help="Set the random seed of initialisation, order, augmentation and dropout.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Start from these weights: imagenet, timm:NAME, hf:ORG/NAME, a run, or a .safetensors file.",
    ),
]
TargetAccuracy = Annotated[
    float | None, typer.Option(help="Use the cheapest training measured to reach this accuracy (0 to 1).")
]
TimeBudget = Annotated[str | None, typer.Option(help="Use the largest training that fits this time: 90s, 5m, 1.5h.")]
Threads = Annotated[int | None, typer.Option(help="Use this many CPU threads; default: measured, then cached.")]
Processes = Annotated[
    str | None, typer.Option("--nproc", help="Split each batch between this many processes: a number, or auto.")
]
Balance = Annotated[bool, typer.Option("--balance", help="Give faster processes larger shares of a batch.")]
Shard = Annotated[
    bool | None,
    typer.Option("--shard/--no-shard", help="Shard the network over the processes, or not; default: as in the run."),
]
MaxRestarts = Annotated[
    int, typer.Option(min=0, help="Restart at most this many times if one of several processes dies.")
]
HangTimeout = Annotated[
    float, typer.Option(min=1, help="Restart all processes after this many seconds without a step.")
]
RunOut = Annotated[Path | None, typer.Option(help="Write the run into this folder; default: runs/<data>-<n>.")]
MoreEpochs = Annotated[float | None, typer.Option(help="Continue a finished run for this many epochs.")]
MovedTo = Annotated[
    Path | None, typer.Option("--data", "--moved-to", help="Name the new place of a run's data, if it was moved.")
]
CheckpointEvery = Annotated[float, typer.Option(min=0, help="Set the seconds between checkpoints.")]
Track = Annotated[list[str] | None, typer.Option(help="Send metrics to tensorboard, mlflow or wandb; repeatable.")]
Emit = Annotated[str | None, typer.Option(help="Train nothing, and print a file for a cluster: slurm or kubernetes.")]
Submit = Annotated[bool, typer.Option("--submit", help="With --emit, submit that file, too.")]
Nodes = Annotated[int, typer.Option(min=1, help="With --emit, use this many machines, each with --nproc processes.")]
Image = Annotated[str | None, typer.Option(help="With --emit kubernetes, use this container image, with suanli in it.")]
NumberOfFolds = Annotated[
    str | None, typer.Option(metavar="K", help="Cross-validate with K folds: 5, or 5x3 to repeat it three times.")
]
CLUSTER_OPTIONS = ("emit", "submit", "nodes", "image")  # of train, for a file instead of a training


def _training(verb: str) -> Callable[..., None]:
    """The command `train`, or `run`, which takes the same options."""

    def command(
        context: typer.Context,
        data: Annotated[
            str,
            typer.Argument(metavar="DATA", help="A data set (as for prepare), or an interrupted run, to resume it."),
        ],
        model: Model = None,
        weights: Weights = None,
        recipe: Recipe = None,
        epochs: Epochs = None,
        batch_size: BatchSize = None,
        lr: LearningRate = None,
        seed: Seed = None,
        tiles: Tiles = None,
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
        moved_to: MovedTo = None,
        checkpoint_every_s: CheckpointEvery = 60.0,
        track: Track = None,
        emit: Emit = None,
        submit: Submit = False,
        nodes: Nodes = 1,
        image: Image = None,
        input_column: InputColumn = None,
        label_column: LabelColumn = None,
        target: Target = None,
        group_column: GroupColumn = None,
        group_pattern: GroupPattern = None,
        time_column: TimeColumn = None,
        folds: NumberOfFolds = None,
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
    scores = {f"val_{name}": value for name, value in run.validation_scores.items()}
    result.values = _describe(run) | {"scores": scores}
    if options["folds"] is not None:
        result.values["cross_validation"] = run.cross_validation
    folds = f"{_cross_validation(run)}\n" if options["folds"] is not None else ""
    result.render = lambda: f"{folds}Run: {run.path}\nNext: suanli evaluate {run.path}"


def _run(result: _Result, options: dict[str, Any]) -> None:
    with pause_collector():
        from suanli.verbs.run import run
    gc.freeze()

    made = run(**options)
    if is_muted():
        return
    result.values = _describe(made) | {"scores": made.scores}
    if options["folds"] is not None:
        result.values["cross_validation"] = made.cross_validation
    lines = {"Run": made.path, "Model": made.model_path, "Report": made.path / "report.html"}
    text = "".join(f"\n{name + ':':<8}{path}" for name, path in lines.items())
    if options["folds"] is not None:
        text = f"\n{_cross_validation(made)}{text}"
    result.render = lambda: f"Test {_primary(made, made.scores)}{text}"


def _cross_validation(run: Run) -> str:
    return f"Cross-validation {_primary(run, run.cross_validation)}"


def _primary(run: Run, scores: Mapping[str, float]) -> str:
    return f"{run.metric.name.replace('_', ' ')}: {run.metric.format(scores[run.metric.name])}"


def _describe(run: Run) -> dict[str, Any]:
    return {"run": str(run.path), "status": run.summary["status"], "epochs": run.summary["epochs"]}


def _emit(result: _Result, verb: str, context: typer.Context) -> None:
    from suanli.core.console import say
    from suanli.parallel.submission import emit

    if verb != "train":
        raise UsageError("--emit works with suanli train only.", fix="Evaluate and report once the run is finished.")
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


@app.command("evaluate", help="Evaluate a trained model.")
def _evaluate(
    context: typer.Context,
    run: RunDir,
    split: Annotated[str, typer.Option(help="Evaluate on this split: test, val or train.")] = "test",
    data: Annotated[
        Path | None,
        typer.Option(help="Evaluate on other data with the same classes, or name the new place of moved data."),
    ] = None,
    device: DeviceName = "auto",
    augmented_views: Annotated[bool, typer.Option(help="Also give the score with test-time augmentation.")] = True,
    folds: NumberOfFolds = None,
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
                example.pop("saliency", None)
        if evaluation.split != "test":
            values["scores"] = {f"{evaluation.split}_{name}": value for name, value in values["scores"].items()}
        result.values = values | {"run": str(run)}
        result.render = lambda: table(evaluation)


@app.command("predict", help="Answer files, folders or standard input: classes, values, boxes.")
def _predict(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL INPUT...",
            help="A run or its model/ folder; then files, folders, patterns, texts, or - for standard input.",
        ),
    ],
    url: Annotated[
        str | None, typer.Option(help="Ask this server instead, and name no MODEL: http://127.0.0.1:8000.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Show at most this many entries of each answer; default: 5 classes, and all boxes."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Decide by this probability, such as that from which a box is shown."),
    ] = None,
    engine: Engine = "auto",
    device: DeviceName = "auto",
    trust_code: TrustCode = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values, with the probability of every class.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Give the answers as csv, jsonl, coco (results) or yolo."),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --format coco, use the ids of this annotation file.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write each image with its answer drawn on it into FOLDER.")
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write what each answer rests on: a saliency map, or weighted words."),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Give the embedding of each input in place of its answer.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Write here: --features .npy, .parquet or .csv; --format a file or folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        if csv and as_json:
            raise UsageError("--csv and --json exclude each other.", fix="Choose one.")
        from suanli.verbs.predict import DRAWN, iterate, open_answerer, table

        model, inputs = (words[0], words[1:]) if url is None else (None, words)
        if not inputs:
            fix = "Name the model first: suanli predict RUN INPUT… (files, folders, a quoted pattern, texts, or -)."
            raise UsageError("There is nothing to predict.", fix=fix)
        if features:
            _refuse_given(context, PREDICT_OPTIONS, "with --features")
            _embed(result, model, inputs, out, csv=csv, as_json=as_json, device=device, trust_code=trust_code)
            return
        options: dict[str, Any] = {"engine": engine, "device": device, "trust_code": trust_code, "url": url}
        form = _choose_format(context, format, csv=csv, as_json=as_json)
        most = sys.maxsize if form == "csv" else top
        answerer = open_answerer(model, top=most, threshold=threshold, explain=explain is not None, **options)
        folders = {} if draw is None else {DRAWN: draw}
        if form is None:
            listed = list(_counted(result, iterate(answerer, inputs, folders=folders, saliencies=explain)))
            result.values = {"model": model or url, "predictions": [p.to_json() for p in listed]}
            result.render = lambda: table(listed)
            return
        from suanli.core.registry import load
        from suanli.verbs.predict import Output, summarize

        output = Output(load("answer_formats", form), answerer, out, annotations)
        answers = _counted(result, iterate(answerer, inputs, folders=folders | output.folders, saliencies=explain))
        if out is None:
            result.render = lambda: output.lines(answers)
            return
        written = output.write(answers)
        result.values = {"model": model or url, **written}
        result.render = lambda: summarize(written)


PREDICT_OPTIONS = ("url", "top", "threshold", "engine", "explain", "format", "annotations", "draw")


def _choose_format(context: typer.Context, form: str | None, *, csv: bool, as_json: bool) -> str | None:
    """None: a table, or JSON. Raises UsageError for options that don't go together."""
    if form is None and not csv:
        _refuse_given(context, ("out", "annotations"), "without --features or --format")
        return None
    if csv and form not in (None, "csv"):
        raise UsageError(f"--csv and --format {form} exclude each other.", fix="Choose one.")
    if as_json and not _is_given(context, "out"):
        raise UsageError("--format and --json exclude each other.", fix="Choose one, or write into a file: --out.")
    return form or "csv"


def _embed(
    result: _Result, model: str | None, inputs: list[str], out: Path | None, *, csv: bool, as_json: bool, **options: Any
) -> None:
    """The embeddings of `predict --features`: into a file, or printed."""
    from suanli.verbs import embed
    from suanli.verbs._embedding_files import check_target, summarize, write_embeddings

    if out is not None and csv:
        raise UsageError(
            "--out and --csv exclude each other.", fix="Name a file that ends in .csv, or leave --out out."
        )
    target = None if out is None else check_target(out)
    found = _counted(result, embed.iterate(model, inputs, **options))
    if target is not None:
        written = write_embeddings(found, target)
        result.values = {"model": model, **written.to_json()}
        result.render = lambda: summarize(written)
    elif as_json:
        result.values = {"model": model, "embeddings": [one.to_json() for one in found]}
    else:
        result.render = lambda: embed.csv_lines(found) if csv else embed.lines(found)


Answered = TypeVar("Answered", "Prediction", "Embedding")


def _counted(result: _Result, answers: Iterator[Answered]) -> Iterator[Answered]:
    """The same, and the exit code where none of the inputs could be read."""
    worked = failed = False
    for answer in answers:
        worked, failed = worked or answer.error is None, failed or answer.error is not None
        yield answer
    if failed and not worked:
        result.exit_code = 3


NOT_SCALED = ("epochs", "threads", "time_budget_s", "price_per_hour")  # options that --scaling does not take


@app.command("bench", help="Measure the gain of each speedup, or (--scaling) of processes.")
def _bench(
    context: typer.Context,
    data: Data,
    model: Model = None,
    recipe: Recipe = None,
    epochs: Annotated[float | None, typer.Option(help="Plan for a training of this many epochs.")] = None,
    batch_size: BatchSize = None,
    settings: Settings = None,
    device: DeviceName = "auto",
    speedups: Speedups = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Use this many CPU threads in the full plan; default: measured.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Train this many steps for each measurement; default: what time allows.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measure in this many rounds, every variant once in each.")] = 5,
    time_budget_s: Annotated[
        float | None, typer.Option(help="Take at most this many seconds for all measurements together.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Give the price of this machine per hour, in any currency.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the run into this folder; default: runs/<data>-bench-<n>.")
    ] = None,
    input_column: InputColumn = None,
    label_column: LabelColumn = None,
    target: Target = None,
    group_column: GroupColumn = None,
    group_pattern: GroupPattern = None,
    time_column: TimeColumn = None,
    max_bad: MaxBad = 0.01,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Measure the speed of 1, 2, … processes that share each batch.")
    ] = False,
    processes: Annotated[
        str | None,
        typer.Option(help="With --scaling, measure these numbers of processes: 1,2,4; default: powers of two."),
    ] = None,
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


@app.command("optimize", help="Find the fastest inference engine whose answers are still right.")
def _optimize(
    context: typer.Context,
    subject: Annotated[
        str,
        typer.Argument(metavar="SUBJECT", help="A run, a model/ folder, an .onnx file, or package.module:function."),
    ],
    goal: Annotated[str, typer.Option("--for", help="Optimize for latency, throughput, size or energy.")] = "latency",
    tolerance: Annotated[
        float | None, typer.Option(help="Accept this loss of the primary metric, such as 0.005.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Require a p95 latency of one example below this many milliseconds.")
    ] = None,
    time_budget: Annotated[str, typer.Option(help="Take at most this time for everything: 90s, 5m, 1.5h.")] = "3m",
    engines: Annotated[str | None, typer.Option(help="Try these engines, separated by commas; default: all.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Use this for calibration and evaluation: labelled data, a folder of images, or .npz files."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Load these weights into the network of a function (.safetensors).")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Set the input size of an ONNX file in pixels: 224, or 224x160.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Subtract this from each channel, where white is 1: 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Then divide each channel by this: 0.229,0.224,0.225.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the engines of an ONNX file or a function into this folder.")
    ] = None,
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
    to: Annotated[
        str,
        typer.Option(
            "--to", help="Write this format: onnx, openvino, pt2, litert (.tflite), or safetensors (weights alone)."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write to this file or folder; default: <run>.<format>, here.")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Give what the network returns: logits without a softmax, boxes of which none is left out."
        ),
    ] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.export import export, summarize

        exported = export(run, to=to, out=out, raw=raw, trust_code=trust_code)
        result.values = {"run": str(run)} | exported.to_json()
        result.render = lambda: summarize(exported)


@app.command("serve", help="Serve a model over HTTP and gRPC, and on a web page.")
def _serve(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="A run, a model/ folder, or a folder of models (NAME/ or NAME/1/).")
    ],
    host: Annotated[
        str, typer.Option(help="Listen on this address; 0.0.0.0 means all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Listen for HTTP on this port; 0 means any free port.")] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="Also listen for gRPC on this port, usually 8001.")] = None,
    p99_ms: Annotated[
        float | None,
        typer.Option(
            "--p99-ms",
            help="Set the latency limit of a request in milliseconds; requests that would exceed it are rejected.",
        ),
    ] = None,
    engine: Engine = "auto",
    device: DeviceName = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Give the engine this many CPU threads; default: as optimize chose.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(help="Reject requests larger than this many megabytes.")] = 64,
    max_image_megapixels: Annotated[float, typer.Option(help="Reject images larger than this many megapixels.")] = 50,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Require the API key in this file; default: $SUANLI_API_KEY, if set.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Serve https with this certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Use this private key with the certificate (PEM).")] = None,
    shutdown_delay_s: Annotated[
        float, typer.Option(min=0, help="On shutdown, report 'not ready' for this many seconds, for load balancers.")
    ] = 0,
    log: Annotated[str, typer.Option(help="Write the log as json, text, none, or auto (text on a terminal).")] = "auto",
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Also log every request.")] = False,
    trust_code: TrustCode = False,
) -> None:
    from suanli.verbs.serve import serve

    serve(**_options(context))


@app.command("convert", help="Convert a .pth, .pt or .bin file to safetensors safely.")
def _convert(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that torch.save wrote.")],
    key: Annotated[
        str | None, typer.Option(help="Take the tensors of this dictionary in it, such as state_dict or model.ema.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file; default: the same name with .safetensors, beside it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.convert import convert, summary

        converted = convert(file, key=key, out=out)
        result.values = converted.to_json()
        result.render = lambda: summary(converted)


@app.command("report", help="Write the report of a run as one HTML page.")
def _report(
    run: RunDir,
    out: Annotated[Path | None, typer.Option(help="Write to this file; default: <run>/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.report import report

        path = report(run, out=out)
        result.values = {"run": str(run), "report": str(path)}
        result.render = lambda: f"Report: {path}"


@app.command("runs", help="List runs, with data, model, score, training time and state.")
def _runs(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[FOLDER]...", help="Folders with runs, or runs; default: runs/.")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="Sort by time (the newest first), name, score (the best first) or training time.")
    ] = "time",
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.verbs.runs import runs, table

        found = runs(*folders or (), sort=sort)
        result.values = {"runs": [one.to_json() for one in found]}
        result.render = lambda: table(found)


@app.command("compare", help="Compare runs: recipe, data, scores, learning curves and cost.")
def _compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two run directories or more.")],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the comparison as one offline HTML page.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    with _result(as_json) as result:
        from suanli.reporting.comparison_views import text
        from suanli.verbs.compare import compare

        comparison = compare(*runs, html=html)
        result.values = comparison.to_json() | ({} if html is None else {"html": str(html)})
        result.render = lambda: text(comparison)


app.command("run", help="Prepare, train, evaluate and report in one go.")(_training("run"))


# --- results and errors ---

PIPE_WIDTH = 240  # characters of a line that doesn't go to a terminal


class _Result:
    values: dict[str, Any]
    render: Callable[[], Any]  # what a person sees: text, lines, or something that rich prints
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
        elif isinstance(output, Iterator):
            for line in output:
                print(line)
        else:
            from rich.console import Console

            # Lines of a pipe or a file are not broken: people search them.
            wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
            Console(highlight=False, width=wide).print(output)
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
            f"{option} takes numbers separated by commas, not {text!r}.", fix="For example: 0.5,0.4,0.3."
        ) from error


@app.callback(invoke_without_command=True)
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version of suanli and exit.", is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from suanli import __version__

        print(f"suanli {__version__}")
        raise typer.Exit


INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt
KEPT = {  # what a verb that was stopped leaves, and how to go on
    "prepare": "No half-prepared data was kept; downloads go on where they stopped. Run the same command again.",
    "train": "Training had not begun, and nothing was kept. Run the same command again.",
    "run": "The run keeps what was finished: suanli runs lists it, and suanli run RUN goes on with it.",
    "evaluate": "The scores from before are unchanged. Run the same command again.",
    "predict": "Answers that were printed are complete; the others were not kept. Run the same command again.",
    "optimize": "The engines from before are unchanged. Run the same command again.",
    "export": "No file was written. Run the same command again.",
    "convert": "No file was written. Run the same command again.",
    "bench": "No figures were kept. Run the same command again, with a smaller --time-budget-s if it took too long.",
    "report": "The report from before is unchanged. Run the same command again.",
    "serve": "",
}
NOTHING_KEPT = "Nothing was changed. Run the same command again."
MISSING = {  # what to name where an argument is missing
    "data": "Name the data: a folder, archive, table or built-in name, such as {command} digits.",
    "run": "Name a run, such as {command} runs/digits-1.",
    "runs": "Name two runs or more, such as {command} runs/digits-1 runs/digits-2.",
    "subject": "Name a trained run, such as {command} runs/digits-1.",
    "words": "Name a run and what to predict, such as {command} runs/digits-1 photo.png.",
    "file": "Name a file, such as {command} model.pth.",
    "to": "Name the format: --to onnx, openvino, pt2, litert or safetensors.",
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
    interrupted = _take_signals()
    if not arguments:
        app(["--help"], standalone_mode=False, prog_name="suanli")
        return 2
    try:
        code = int(app(arguments, standalone_mode=False, prog_name="suanli") or 0)
        if code != INTERRUPTED or fatal.is_supervised():
            return code
        message, fix = "Stopped.", KEPT.get(arguments[0], NOTHING_KEPT)
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
    if code != INTERRUPTED and interrupted():  # a library swallowed Ctrl-C, as in an import, and then failed
        message, fix, code = "Stopped.", KEPT.get(arguments[0], NOTHING_KEPT), INTERRUPTED
    stop_progress()
    if "--json" in arguments:
        print(json.dumps({"error": message, "fix": fix, "exit_code": code}, ensure_ascii=False))
    print(f"suanli: {message} {fix}".rstrip(), file=sys.stderr)
    return code


def _take_signals() -> Callable[[], bool]:
    """Lets SIGTERM act like Ctrl-C. Gives a function that says whether one of them has come."""
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, such as by nohup
            signal.signal(signal.SIGINT, interrupt)
    return lambda: bool(came)


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

"""What `optimize` makes of an ONNX file: a graph to build engines from, and examples that it takes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.core.console import say
from suanli.core.errors import DataError, UsageError
from suanli.core.registry import names
from suanli.core.schema import Schema
from suanli.core.types import AnyPath, Recipe
from suanli.data.preprocess.tensors import SUFFIXES, find_files, read_shapes
from suanli.data.suffixes import IMAGE_SUFFIXES
from suanli.engines import onnx_import
from suanli.engines.onnx_import import ImportedGraph, OnnxFile, PictureOptions
from suanli.engines.onnx_probe import INTEGERS, Answers, GraphProbe
from suanli.engines.onnx_signature import Signature, TensorType, format_inputs, has_channels_first, read_signature
from suanli.training.prepare import DataOptions
from suanli.verbs import _examples
from suanli.verbs._examples import ChosenExamples

MEASURED = 16  # examples whose answers show what outputs are like
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".xml")  # that may hold the labels of pictures beside them


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    data: AnyPath | None
    cache_dir: AnyPath | None
    pictures: PictureOptions


def resolve_graph(path: Path, options: GraphOptions) -> tuple[ImportedGraph, ChosenExamples]:
    """The graph, with its task, and the examples. Raises UsageError, DataError and DamagedFile."""
    file = onnx_import.load(path)
    if file.is_exported:
        graph = onnx_import.import_exported(file, options.pictures)
        arrays = _holds_arrays(options.data, list(graph.preprocess.inputs))
    elif file.is_picture_classifier and not _holds_arrays(options.data, [file.signature.inputs[0].name]):
        graph, arrays = onnx_import.import_pictures(file, options.pictures), False
    else:
        return _resolve_by_signature(file, options)
    return _choose(file, graph, options, arrays=arrays)


def _choose(
    file: OnnxFile, graph: ImportedGraph, options: GraphOptions, *, arrays: bool
) -> tuple[ImportedGraph, ChosenExamples]:
    """Examples for a graph with a task; without data they are random."""
    data, batches = options.data, graph.batches
    task, inputs = graph.task, graph.preprocess.inputs
    if data is None:
        _examples.warn_of_made_up()
        return graph, _examples.make_up(inputs, batches=batches)
    folder = Path(data).expanduser()
    if arrays:
        return graph, _examples.choose_arrays(folder, inputs, batches=batches)
    if not task.annotation or _is_unlabelled(folder):
        if str(data) in names("datasets") or not folder.exists():
            raise DataError(
                f"{data} is labelled data, but the outputs of {file.path} are not classes.",
                fix="Give a folder of images, or .npz files with arrays named like the inputs.",
            )
        return graph, _examples.choose_inputs(folder, graph.preprocess, batches=batches)
    source = DataOptions.of(data, data_dir=None, cache_dir=options.cache_dir, preprocess=graph.preprocess.to_json())
    recipe = Recipe(name="imported", task=task.name)
    labelled = _examples.prepare_labelled(source, recipe, task.classes if graph.has_class_names else ())
    if len(labelled.classes) != len(task.classes):
        raise DataError(
            f"{file.path} has {len(task.classes)} classes, the data {len(labelled.classes)}.",
            fix="Give data with the same classes.",
        )
    graph = replace(graph, task=replace(task, classes=labelled.classes))
    return graph, _examples.choose_labelled(labelled, batches=batches)


# --- by the signature ---


def _resolve_by_signature(file: OnnxFile, options: GraphOptions) -> tuple[ImportedGraph, ChosenExamples]:
    """The graph is tried out for what its signature doesn't say."""
    signature, pictures = file.signature, options.pictures
    arrays = _holds_arrays(options.data)
    if pictures.any and (arrays or not signature.takes_pictures):
        raise UsageError(
            f"--size, --mean and --std are for images, and {file.path} takes {format_inputs(signature.inputs)}.",
            fix="Leave them out; arrays are taken as they are.",
        )
    with GraphProbe() as probe:
        probe.open(file.path, signature)
        sizes, ranks = probe.find_sizes(_known_sizes(options, signature, arrays=arrays))
        file = replace(file, signature=signature.with_ranks(ranks))
        batches = signature.may_batch and probe.can_batch(sizes)
        if signature.takes_pictures and not arrays and (pictures.any or options.data is not None):
            height, width = _picture_sides(signature.inputs[0], sizes)
            graph = onnx_import.import_pictures(
                file, replace(pictures, size=pictures.size or (height, width)), batches=batches
            )
            made_up = graph.preprocess.inputs
            say(f"{file.path}: images become {height}x{width}" + ("" if batches else ", one at a time"))
        else:
            graph = onnx_import.import_tensors(file, batches=batches)
            made_up = _fill_sizes(graph, signature, sizes)
        random = _examples.make_up(made_up, batches=batches)
        graph = onnx_import.choose_task(file, graph, _measure(probe, graph, random))
        if options.data is None:
            _examples.warn_of_made_up()
            shapes = ", ".join(f"{t.name} {t.dtype} {t.at(sizes)}" for t in signature.inputs)
            say(f"{file.path}: random inputs of {shapes}")
            return graph, random
        graph, chosen = _choose(file, graph, options, arrays=arrays)
        if not graph.task.annotation:  # spreads of real answers, instead of those to noise
            graph = onnx_import.choose_task(file, graph, _measure(probe, graph, chosen))
    return graph, chosen


def _measure(probe: GraphProbe, graph: ImportedGraph, chosen: ChosenExamples) -> Answers:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(graph.model.SerializeToString())
        chosen.examples.first(MEASURED).save(Path(folder) / "examples")
        probe.open(path, read_signature(path, graph.model))
        return probe.measure(Path(folder) / "examples")


def _fill_sizes(graph: ImportedGraph, signature: Signature, sizes: Mapping[str, int]) -> Schema:
    """The columns of the graph's inputs with these open sizes, for random inputs."""
    schema = {}
    for tensor in signature.inputs:
        column, shape = graph.preprocess.inputs[tensor.name], tensor.at(sizes)
        leading = len(shape) - len(column.shape)
        schema[tensor.name] = replace(column, shape=shape[leading:], limit=INTEGERS)
    return schema


def _known_sizes(options: GraphOptions, signature: Signature, *, arrays: bool) -> dict[str, int]:
    """The open sizes that the user's options or the first of the arrays say."""
    if options.pictures.size is not None:
        first = 2 if has_channels_first(signature.inputs[0]) else 1
        sides = (signature.inputs[0].shape or ())[first : first + 2]
        return {side: n for side, n in zip(sides, options.pictures.size, strict=True) if isinstance(side, str)}
    if not arrays or options.data is None:
        return {}
    path = Path(options.data).expanduser()
    shapes = read_shapes(find_files(path)[0] if path.is_dir() else path, [tensor.name for tensor in signature.inputs])
    sizes: dict[str, int] = {}
    for tensor in signature.inputs:
        shape, sides = shapes.get(tensor.name, ()), tensor.shape or ()
        if len(shape) == len(sides) and not signature.may_batch:
            sizes |= {side: n for side, n in zip(sides, shape, strict=True) if isinstance(side, str)}
        elif signature.may_batch and len(shape) in (len(sides), len(sides) - 1):
            inner = shape[len(shape) - len(sides) + 1 :]
            sizes |= {side: n for side, n in zip(sides[1:], inner, strict=True) if isinstance(side, str)}
    return sizes


def _picture_sides(source: TensorType, sizes: Mapping[str, int]) -> tuple[int, int]:
    shape = source.at(sizes)
    height, width = shape[2:] if has_channels_first(source) else shape[1:3]
    return height, width


# --- what the data is ---


def _holds_arrays(data: AnyPath | None, inputs: Sequence[str] = ()) -> bool:
    """Whether it is arrays for a graph: an .npy or .npz file, or a folder of such files. Where `inputs` are given, an
    .npz file has to have one of them, since labelled pictures come in such files, too."""
    if data is None or str(data) in names("datasets"):
        return False
    path = Path(data).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        return any(file.suffix.lower() in SUFFIXES for file in files) and not _has_pictures(files)
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    return not inputs or path.suffix.lower() != ".npz" or any(name in inputs for name in read_shapes(path, inputs))


def _has_pictures(files: Sequence[Path]) -> bool:
    return any(file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES for file in files)


def _is_unlabelled(folder: Path) -> bool:
    """Whether it is a folder with pictures, no folder for a class and no table beside them."""
    if not folder.is_dir():
        return False
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__"))]
    return _has_pictures(entries) and not any(e.is_dir() or e.suffix.lower() in TABLES for e in entries)

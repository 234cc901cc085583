"""Answers as files that other programs read. Each format is a file of `answer_formats/`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeAlias

from suanli.core.console import warn
from suanli.core.errors import BadInput, UsageError
from suanli.core.paths import safe_name
from suanli.core.storage import atomic_file, raise_storage_errors
from suanli.core.types import Preprocess, Raw
from suanli.engines.predictor import Prediction

LONGEST = 60  # characters of each part of a file's name: 255 bytes are the limit, and a letter may have three

Classes: TypeAlias = Sequence[str]  # all that an answer may have, in the order of the model's outputs
Answered: TypeAlias = "tuple[Prediction, Raw | BadInput | None]"  # with what was read, where that was kept


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """Either one text for all answers, or a file for each."""

    name: str
    title: str  # for people
    kinds: tuple[str, ...] = ()  # of answers that it has room for; empty: any
    # The lines of a text. The path is of a file of annotations whose ids are used; None: there is none.
    lines: Callable[[Iterable[Prediction], Classes, Path | None], Iterator[str]] | None = None
    takes_annotations: bool = False
    # The suffix and the content of the file of one answer. Raises BadInput.
    file: Callable[[Prediction, Raw, type[Preprocess], Classes], tuple[str, bytes]] | None = None
    folder: str = ""  # below that which the user names, in which these files are
    beside: Callable[[Classes], Mapping[str, bytes]] = field(default=lambda _: {})  # more files, by name

    def check(self, kind: str) -> None:
        """Raises UsageError for a kind of answers that it has no room for."""
        if self.kinds and kind not in self.kinds:
            raise UsageError(
                f"The format {self.name} is for answers of the kind {' or '.join(self.kinds)}; these are of the kind "
                f"{kind}.",
                fix="Choose another: csv and jsonl take any.",
            )


def check_folder(path: Path, inputs: object) -> Path:
    """A new or empty folder for files. Raises UsageError for one that holds anything, so that no file of the user's is
    replaced, and for one inside of `inputs`, which would become inputs themselves."""
    path = path.expanduser()
    with raise_storage_errors(path):
        if os.path.lexists(path) and not path.is_dir():
            raise UsageError(f"{path} is no folder.", fix="Name a new or empty one.")
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} isn't empty, and no file in it is replaced.", fix="Name a new or empty folder.")
    for one in inputs if isinstance(inputs, list | tuple) else [inputs]:
        if isinstance(one, str | os.PathLike) and _is_inside(path, os.fspath(one)):
            raise UsageError(f"{path} is inside of the inputs in {one}.", fix="Name a folder elsewhere.")
    return path


def _is_inside(path: Path, of: str | bytes) -> bool:
    try:
        return path.resolve().is_relative_to(Path(os.fsdecode(of)).expanduser().resolve())
    except (OSError, ValueError, RuntimeError):  # a text, which is no path
        return False


def check_file(path: Path) -> Path:
    """A new file. Raises UsageError for one that exists."""
    path = path.expanduser()
    with raise_storage_errors(path):
        if os.path.lexists(path):
            raise UsageError(f"{path} exists.", fix="Choose a new --out, or remove it.")
    return path


def write_files(
    answers: Iterable[Answered], form: AnswerFormat, folder: Path, kind: type[Preprocess], classes: Classes
) -> Iterator[Answered]:
    """Writes a file for each answer, before it passes it on. Its path below the folder is the input's name: see
    `FileNames`."""
    names, render = FileNames(), form.file
    assert render is not None, form.name
    for name, content in form.beside(classes).items():
        _write(folder / name, content)
    for prediction, raw in answers:
        if prediction.answer is not None and raw is not None and not isinstance(raw, BadInput):
            try:
                suffix, content = render(prediction, raw, kind, classes)
            except BadInput as error:
                warn(f"{prediction.name}: {error.message}")
            else:
                _write(folder / form.folder / names.take(prediction.name, suffix), content)
        yield prediction, raw


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as stream:
        stream.write(content)


def write_lines(lines: Iterable[str], path: Path) -> None:
    """The file appears when it is whole."""
    with atomic_file(path) as stream:
        for line in lines:
            stream.write(f"{line}\n".encode(errors="backslashreplace"))


class FileNames:
    """Names of files for inputs, each once, and valid on any system.

    A relative name keeps its folders; of an absolute one, or one that leads out of the folder, only the last part
    stays. Where two inputs would get one name, the later one gets a number: photo-2.jpg.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, name: str, suffix: str) -> Path:
        path = PurePath(name)
        parts = path.parts[:-1] if not path.is_absolute() and ".." not in path.parts else ()
        # Without dots, so that no folder has the name of a file.
        folders = [safe_name(part.replace(".", "-"), "folder", longest=LONGEST) for part in parts]
        stem = safe_name(path.stem, "input", longest=LONGEST)
        number, found = 1, Path(*folders, f"{stem}{suffix}")
        while str(found).casefold() in self._taken:
            number += 1
            found = Path(*folders, f"{stem}-{number}{suffix}")
        self._taken.add(str(found).casefold())
        return found

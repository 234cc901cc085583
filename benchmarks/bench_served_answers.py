"""Checks that a server answers each file as `suanli predict` does: label by label, probability by probability.

The pictures of a data set are written as files. The server gets them in requests of many files, and from many clients
at once with one file each, which gives batches of all sizes. `suanli predict --url` is the client.

    python benchmarks/bench_served_answers.py RUN ../shared/data/cifar10.zip --out records/…  [--images 1000]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import Record
from servers import served
from suanli.data.suffixes import IMAGE_SUFFIXES
from suanli.engines.predictor import Prediction
from suanli.machine import device
from suanli.verbs._remote import Server

CLIENTS = 32


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path, help="a zip of pictures")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = Record("served_answers", args.out, device.detect("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        files = pictures(args.data, Path(folder), args.images)
        alone = predicted([str(args.run), *map(str, files)])
        with served(args.run) as (port, _):
            url = f"http://127.0.0.1:{port}"
            together = predicted(["--url", url, *map(str, files)])
            one_by_one = from_many(url, files)
    for way, answers in (("files together", together), (f"{CLIENTS} clients, a file each", one_by_one)):
        same = sum(a["label"] == b["label"] for a, b in zip(alone, answers, strict=True))
        apart = max(
            abs(a["probabilities"][name] - b["probabilities"].get(name, 0.0))
            for a, b in zip(alone, answers, strict=True)
            for name in list(a["probabilities"])[:1]
        )
        record.say(f"{way}: {same} of {len(alone)} labels are the same; probabilities differ by at most {apart:.2g}")
        if same < len(alone):
            record.say("MISSED: every label is to be the same")
    record.close({})


def pictures(data: Path, folder: Path, count: int) -> list[Path]:
    """Pictures of a zip, evenly spread, as files."""
    with zipfile.ZipFile(data) as archive:
        names = [n for n in archive.namelist() if n.lower().rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
        names = names[:: max(1, len(names) // count)][:count]
        files = [folder / f"{i:05d}.{name.rsplit('.', 1)[-1]}" for i, name in enumerate(names)]
        for file, name in zip(files, names, strict=True):
            file.write_bytes(archive.read(name))
    return files


def predicted(words: list[str]) -> list[dict]:  # type: ignore[type-arg]
    command = [sys.executable, "-m", "suanli", "predict", *words, "--top", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout)["predictions"])


def from_many(url: str, files: list[Path]) -> list[dict]:  # type: ignore[type-arg]
    def ask(file: Path) -> Prediction:
        return Server(url).predict([file.name], [file.read_bytes()], top=3)[0]

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [answer.to_json() for answer in pool.map(ask, files)]


if __name__ == "__main__":
    main()

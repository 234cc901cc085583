"""Images per second that reach the model: suanli's cache compared with an ordinary DataLoader.

Both deliver each image of the data set once per epoch, as normalised float32 batches of the same size on the CPU. The
peer does what tutorials do: a Dataset opens each file with Pillow, resizes, crops and converts it, again in every
epoch, with 0 and with 2 worker processes. suanli starts with an empty cache in each round, so its first epoch includes
listing, checking and decoding.

    python benchmarks/bench_input.py DATA.zip [--rounds 5] [--size 128] [--out records/…/input.json]

Sides alternate within each round; ratios are taken within a round. No training happens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from suanli.core.console import hide_progress
from suanli.data.loader import Feed
from suanli.machine.device import detect, environment
from suanli.verbs.prepare import prepare

BATCH = 64
EPOCHS = 3
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
SPREAD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class PillowFolder(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, root: Path, size: int) -> None:
        self.files = sorted(p for p in root.rglob("*") if p.is_file())
        names = sorted({p.parent.name for p in self.files})
        self.labels = [names.index(p.parent.name) for p in self.files]
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[index]) as opened:
            image = opened.convert("RGB")
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(255)
        return (tensor - MEAN) / SPREAD, self.labels[index]


def pillow_epochs(root: Path, size: int, workers: int) -> Iterator[tuple[int, float]]:
    """Images and seconds of each epoch."""
    loader = DataLoader(PillowFolder(root, size), batch_size=BATCH, shuffle=True, num_workers=workers)
    for _ in range(EPOCHS):
        started, count = time.perf_counter(), 0
        for inputs, _ in loader:
            assert inputs.dtype == torch.float32
            count += len(inputs)
        yield count, time.perf_counter() - started


def suanli_epochs(archive: Path, size: int, *, resident: bool) -> Iterator[tuple[int, float]]:
    device = detect("cpu")
    with tempfile.TemporaryDirectory() as cache, hide_progress():
        started = time.perf_counter()
        prepared = prepare(archive, settings={"preprocess.size": size}, cache_dir=cache)
        feeds = [Feed(s, device, resident=resident) for s in prepared.splits.values()]
        for _ in range(EPOCHS):
            count = 0
            for feed in feeds:
                for cached, _, _ in feed.batches(iter(torch.randperm(len(feed)).split(BATCH))):
                    inputs = prepared.preprocess.to_model(cached)["image"]
                    assert inputs.dtype == torch.float32
                    count += len(inputs)
            yield count, time.perf_counter() - started
            started = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a zip of class folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(args.data) as archive:
            archive.extractall(unpacked)
        sides: dict[str, Callable[[], Iterator[tuple[int, float]]]] = {
            "pillow, 0 workers": lambda: pillow_epochs(Path(unpacked), args.size, 0),
            "pillow, 2 workers": lambda: pillow_epochs(Path(unpacked), args.size, 2),
            "suanli, resident": lambda: suanli_epochs(args.data, args.size, resident=True),
            "suanli, mapped": lambda: suanli_epochs(args.data, args.size, resident=False),
        }
        rates: dict[str, list[list[float]]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name, epochs in sides.items():
                rates[name].append([count / seconds for count, seconds in epochs()])
                print(f"round {number + 1}  {name:18}", "  ".join(f"{r:8,.0f}" for r in rates[name][-1]), flush=True)
    result = {
        "what": "images per second of each epoch (columns) in each round (rows)",
        "data": args.data.name,
        "size_px": args.size,
        "batch": BATCH,
        "rates": rates,
        "ratios": {f"{s} / best pillow": ratios(rates, s) for s in ("suanli, resident", "suanli, mapped")},
        "environment": environment(detect("cpu")),
        "disk_free_bytes": shutil.disk_usage(".").free,
    }
    for name, by_epoch in result["ratios"].items():
        for epoch, (low, middle, high) in by_epoch.items():
            print(f"{name}, {epoch}: {middle:.2f} ({low:.2f} to {high:.2f})")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def ratios(rates: dict[str, list[list[float]]], side: str) -> dict[str, tuple[float, float, float]]:
    """Compared with the faster of the two peers in the same round: minimum, median, maximum."""
    result = {}
    for epoch, title in ((0, "first epoch"), (1, "second epoch"), (2, "third epoch")):
        values = [
            rates[side][r][epoch] / max(rates["pillow, 0 workers"][r][epoch], rates["pillow, 2 workers"][r][epoch])
            for r in range(len(rates[side]))
        ]
        result[title] = (min(values), statistics.median(values), max(values))
    return result


if __name__ == "__main__":
    main()

"""Run directories as training and evaluation leave them, for the tests of the report."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from suanli.core.schema import Geometry, example_of
from suanli.core.types import Recipe
from suanli.tasks.classification import Classification

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
TEXTS = [
    "A quiet, patient film that trusts its audience; I left the cinema happier than I had entered it.",
    "Two hours of my life that I will not get back.",
    "演员很好，故事很差。",
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def png(pixels: np.ndarray) -> dict[str, str]:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return {"media_type": "image/png", "base64": base64.b64encode(stream.getvalue()).decode()}


def text_preview(text: str) -> dict[str, str]:
    return {"media_type": "text/plain", "base64": base64.b64encode(text.encode()).decode()}


def evaluation(split: str, classes: list[str], truth: np.ndarray, odds: np.ndarray, previews: list[Any]) -> Any:
    """An evaluation file from real probabilities."""
    task = Classification(classes=tuple(classes))
    predictions, targets = {"probabilities": odds.astype(np.float32)}, {"class": truth}
    records = task.records(predictions, targets)
    errors, geometry = task.errors(records), Geometry.unchanged((8, 8))
    worst = [int(i) for i in np.argsort(-errors, kind="stable")[:12] if errors[i]]
    examples = [
        {
            "name": f"{split}/{classes[truth[i]]}/{i:04d}.png",
            "expected": asdict(task.describe_target(example_of(targets, i), geometry)),
            "answer": asdict(task.answer(example_of(predictions, i), geometry, top=20)),
            "error": float(errors[i]),
            "view": asdict(geometry),
            "preview": previews[i],
        }
        for i in (*worst, *range(min(24, len(truth))))
    ]
    accuracy = task.scores(records)["accuracy"]
    scores = {
        "accuracy": accuracy,
        "top5": 0.986,
        "balanced_accuracy": 0.855,
        "macro_f1": 0.913,
        "calibration_error": 0.031,
        "log_loss": 0.274,
    }
    return task.evaluate(records) | {
        "split": split,
        "count": len(truth),
        "headline": "accuracy",
        "unit": "fraction",
        "higher_is_better": True,
        "scores": scores,
        "units": {name: task.unit_of(name) for name in scores},
        "interval": [accuracy - 0.02, min(1.0, accuracy + 0.02)],
        "intervals": {"macro_f1": [0.891, 0.934], "log_loss": [0.231, 0.322]},
        "with_augmentation": {"views": 4, "scores": {"accuracy": min(1.0, accuracy + 0.008)}},
        "mistakes": examples[: len(worst)],
        "samples": examples[len(worst) :],
        "seconds": 0.8,
    }


def in_older_form(evaluation: Any) -> Any:
    """As versions wrote it that knew classification only."""
    older = {key: value for key, value in evaluation.items() if key not in ("unit", "units", "higher_is_better")}
    for key in ("mistakes", "samples"):
        older[key] = [
            {
                "name": one["name"],
                "true": one["expected"]["values"]["label"],
                "predicted": one["answer"]["values"]["label"],
                "probability": one["answer"]["values"]["probability"],
                "true_probability": one["answer"]["values"]["probabilities"].get(one["expected"]["values"]["label"]),
                "preview": one["preview"],
            }
            for one in evaluation[key]
        ]
    return older


def ages_run(path: Path, task: str = "ages") -> Path:
    """Of a task that isn't installed: numbers in years are predicted, and a lower score is better."""
    metric = {"headline": "mean_absolute_error", "unit": "years", "higher_is_better": False}
    answers = [("31.5", "30", 1.5), ("44", "44", 0.0)]
    examples = [
        {
            "name": f"face{i}.png",
            "expected": {"kind": "value", "text": true, "values": {"value": float(true)}},
            "answer": {"kind": "value", "text": answer, "values": {"value": float(answer)}},
            "error": error,
            "view": {"size": [8, 8], "scale": [0.1, 0.1], "shift": [0, 0]},
            "preview": png(np.zeros((8, 8))),
        }
        for i, (answer, true, error) in enumerate(answers)
    ]
    scores = {"mean_absolute_error": 3.4216, "r2": -0.21}
    write(path / "recipe.json", {"model": "resnet18", "task": task})
    counts = {"train": {"0 to 20": 50, "20 to 40": 70}, "test": {"0 to 20": 5, "20 to 40": 7}}
    write(path / "data.json", {"name": "faces", "classes": [], "counts": counts})
    remarks = ["ranges of targets without training examples: 60 to 80"]
    write(path / "check.json", {"total": 132, "imbalance": None, "empty_classes": [], "remarks": remarks})
    lines = [{"step": i, "epoch": i, "split": "val", "scores": {"mean_absolute_error": 12 / i}} for i in (1, 2, 3)]
    write_lines(path / "metrics.jsonl", lines)
    scored = metric | {
        "split": "test",
        "count": 12,
        "scores": scores,
        "units": {"mean_absolute_error": "years", "r2": "fraction"},
        "intervals": {"mean_absolute_error": [3.1, 3.75], "r2": [-0.4, 0.1]},
        "interval": [3.1, 3.75],
        "mistakes": examples[:1],
        "samples": examples,
    }
    write(path / "evaluation" / "test.json", scored)
    return path


def boxes_entry(preview: Any, **more: Any) -> Any:
    """A picture of 200 x 100 pixels that was resized to 50 x 50 with its sides kept: 12.5 rows stay empty above."""
    true = {"boxes": [{"box": [20, 10, 60, 90], "label": "ant"}]}
    answered = {"boxes": [{"box": [24, 10, 60, 80], "label": "ant", "probability": 0.9}]}
    return {
        "name": "ants.png",
        "expected": {"kind": "boxes", "text": "1 ant", "values": true},
        "answer": {"kind": "boxes", "text": "1 ant 90%", "values": answered},
        "error": 0.2,
        "view": {"size": [50, 50], "scale": [0.25, 0.25], "shift": [12.5, 0]},
        "preview": preview,
    } | more


def digits_run(path: Path) -> Path:
    """Real pictures, real predictions of a naive Bayes classifier, plausible curves."""
    from sklearn.datasets import load_digits
    from sklearn.naive_bayes import GaussianNB

    digits = load_digits()
    classes = [str(i) for i in range(10)]
    pictures, truth = digits.images / 16 * 255, digits.target
    odds = GaussianNB(var_smoothing=0.05).fit(digits.data[:1437], truth[:1437]).predict_proba(digits.data)
    previews = [png(picture) for picture in pictures]
    ranges = {"train": slice(0, 1257), "val": slice(1257, 1437), "test": slice(1437, 1797)}
    environment = {
        "command": ["suanli", "run", "digits", "--set", "epochs=20", "--out", "runs/digits 1"],
        "time": "2026-03-01T08:05:00+00:00",
        "device": {"name": "AMD EPYC 9R14", "torch_name": "cpu", "memory_bytes": 16_000_000_000},
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "python": "3.11.7",
        "versions": {"suanli": "0.1.0", "torch": "2.13.0", "numpy": "2.4.1", "timm": None},
    }
    write(path / "environment.json", environment)
    write(path / "recipe.json", Recipe(name="small", augment=("crop(padding=1)",), epochs=20).model_dump(mode="json"))
    counts = {
        split: {name: int((truth[rows] == i).sum()) for i, name in enumerate(classes)} for split, rows in ranges.items()
    }
    data = {"name": "digits", "kind": "image", "source": "digits", "licence": "CC BY 4.0", "classes": classes}
    write(path / "data.json", data | {"counts": counts, "input_shape": [1, 8, 8], "digest": "5e1fa0c29b7d4410"})
    write(path / "check.json", digits_check())
    write_lines(path / "metrics.jsonl", digits_metrics())
    measurement = {"metric": "examples_per_s", "value": 8412.0, "unit": "1/s", "spread": 120.0, "count": 20}
    more = {"scores": {}, "variant": "channels_last+bfloat16", "device": "cpu", "versions": {}, "recipe": "0f"}
    write_lines(path / "ledger.jsonl", [measurement | more | {"time": "2026-03-01T08:05:40+00:00"}])
    write(path / "summary.json", digits_summary())
    (path / "model").mkdir()
    write(path / "model" / "model.json", {})
    for split in ("val", "test"):
        rows = ranges[split]
        scored = evaluation(split, classes, truth[rows], odds[rows], previews[rows])
        write(path / "evaluation" / f"{split}.json", scored)
    return path


def digits_check() -> Any:
    return {
        "total": 1800,
        "bad": [
            {"name": "train/3/0007.png", "reason": "cut short after 112 of 230 bytes"},
            {"name": "train/8/0102.png", "reason": "empty file"},
        ],
        "bad_share": 0.0011,
        "duplicates_across_splits": [
            {"names": ["train/1/0040.png", "test/1/0007.png"], "splits": ["train", "test"]},
            {"names": ["train/5/0311.png", "val/5/0020.png"], "splits": ["train", "val"]},
        ],
        "duplicates_within": [{"names": ["train/0/1.png", "train/0/9.png"], "split": "train"}],
        "label_conflicts": [{"names": ["train/3/88.png", "train/9/12.png"], "labels": ["3", "9"]}],
        "counts": {"bad": 2, "duplicates_across_splits": 2, "duplicates_within": 37, "label_conflicts": 1},
        "traits": {"grey": 1790, "palette": 8},
        "sizes": {"min": [8, 8], "median": [8, 8], "max": [16, 12], "distinct": 3},
        "imbalance": 1.1,
        "empty_classes": [],
        "notes": ["2 files that are no pictures were skipped: readme.txt, Thumbs.db"],
    }


def digits_metrics() -> list[Any]:
    random, lines = np.random.default_rng(0), []
    for step in range(1, 401):
        epoch, wave = step / 20, random.normal(0, 0.06)
        warm = min(step / 40, (400 - step) / 360)
        line = {"step": step, "epoch": epoch, "loss": 2.2 * math.exp(-epoch / 4) + 0.12 + wave * math.exp(-epoch / 9)}
        lines.append(line | {"lr": 0.1 * warm, "examples_per_s": 8400 + 300 * random.normal(), "seconds": step / 90})
        if step % 20 == 0:
            scores = {"accuracy": 0.985 - 0.8 * math.exp(-epoch / 2.5) + random.normal(0, 0.004)}
            seen = {"step": step, "epoch": epoch, "split": "val", "scores": scores}
            lines.append(seen | {"loss": 2.1 * math.exp(-epoch / 4) + 0.16, "seconds": step / 90})
    return lines


def digits_summary() -> Any:
    return {
        "status": "finished",
        "steps": 400,
        "epochs": 20.0,
        "parameters": 312_458,
        "seconds": {"prepare": 1.9, "train": 18.4, "evaluate": 0.8, "total": 22.6},
        "examples_per_s": 8412.0,
        "peak_memory_bytes": 412_000_000,
        "limited_by": "computing",
        "forecast": {"train_seconds": 16.9, "memory_bytes": 430_000_000, "disk_bytes": 6_200_000},
    }


def write_lines(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_run(path: Path) -> Path:
    """Another kind of data through the same page."""
    classes, random = ["negative", "positive"], np.random.default_rng(1)
    truth = random.integers(0, 2, 200)
    odds = random.dirichlet([2, 2], 200) * 0.5 + np.eye(2)[truth] * 0.5
    previews = [text_preview(TEXTS[i % 3] * (1 + 8 * (i % 5 == 0))) for i in range(200)]
    write(path / "recipe.json", {"model": "text_cnn"})
    data = {"name": "reviews", "kind": "text", "source": "reviews.tsv", "classes": classes}
    write(path / "data.json", data | {"counts": {"train": {"negative": 900, "positive": 100}}})
    write(path / "check.json", {"total": 1000, "imbalance": 9.0, "empty_classes": ["neutral"]})
    write(path / "evaluation" / "test.json", evaluation("test", classes, truth, odds, previews))
    return path


def many_classes_run(path: Path, k: int = 1000) -> Path:
    classes, random = [f"n{i:05d} 类别 {i}" for i in range(k)], np.random.default_rng(2)
    truth = np.arange(2 * k) % k
    odds = random.dirichlet(np.full(k, 0.01), 2 * k) * 0.8 + np.eye(k)[truth] * 0.2
    write(path / "recipe.json", {"model": "resnet50"})
    counts = {"train": {name: int(n) for name, n in zip(classes, random.integers(5, 1300, k), strict=True)}}
    write(path / "data.json", {"name": "big", "classes": classes, "counts": counts})
    write(path / "evaluation" / "test.json", evaluation("test", classes, truth, odds, [None] * (2 * k)))
    return path


def hostile_run(path: Path) -> Path:
    """Every name and text in it tries to run as code, to break the markup or to widen the page."""
    k, long = 4, "x" * 400
    classes = [HOSTILE, "{{ 7 * 7 }}", "\u202egnp.cod", long]
    truth = np.arange(40) % k
    odds = np.random.default_rng(3).dirichlet(np.ones(k), 40)
    previews = [text_preview(HOSTILE), {"media_type": "text/html", "base64": "PHNjcmlwdD4="}, text_preview(long)]
    scored = evaluation("test", classes, truth, odds, [previews[i % 3] for i in range(40)])
    for one in scored["mistakes"] + scored["samples"]:
        one["name"] = HOSTILE
    numbers = [math.nan, math.inf, 1e300, 1e99, -1.0, None]
    boxes = [{"box": [n, 0, n, 1], "label": HOSTILE, "probability": n} for n in numbers]
    drawn = {"kind": "boxes", "text": HOSTILE, "values": {"boxes": boxes}}
    views = [{"size": [n, 1], "scale": [1, n], "shift": [0, 0]} for n in numbers]
    scored["samples"] += [boxes_entry(png(np.zeros((2, 2))), answer=drawn, view=view) for view in views]
    strange = {"kind": HOSTILE, "text": long, "values": {HOSTILE: long}}
    scored["samples"].append(boxes_entry(None, answer=strange, expected=strange))
    write(path / "evaluation" / "test.json", scored)
    write(path / "recipe.json", {"model": HOSTILE, "model_args": {HOSTILE: [long]}, long: HOSTILE})
    counts = {"train": dict.fromkeys(classes, 3)}
    write(
        path / "data.json", dict.fromkeys(["name", "kind", "source", "licence", "digest"], HOSTILE) | {"counts": counts}
    )
    names = {"names": [HOSTILE, long], "splits": ["train", HOSTILE], "labels": [HOSTILE, long]}
    check = {f"duplicates_{key}": [names] for key in ("across_splits", "within")} | {"label_conflicts": [names]}
    bad = [{"name": HOSTILE, "reason": HOSTILE}, {"name": long, "reason": long}]
    more = {"traits": {HOSTILE: 3}, "empty_classes": [HOSTILE, long], "notes": [HOSTILE, long]}
    write(path / "check.json", check | more | {"bad": bad})
    device = {"name": HOSTILE, "torch_name": long}
    command = ["suanli", "run", HOSTILE, long]
    versions = {HOSTILE: HOSTILE, long: long}
    write(path / "environment.json", {"command": command, "time": HOSTILE, "device": device, "versions": versions})
    line = {"metric": HOSTILE, "unit": long, "variant": HOSTILE, "device": long, "recipe": long, "time": HOSTILE}
    write_lines(path / "ledger.jsonl", [line | {"value": math.inf, "count": 10**40, "scores": {}, "versions": {}}])
    write_lines(path / "metrics.jsonl", [{"step": 1, "split": "val", "scores": {HOSTILE: 0.5}}])
    return path


def hostile_engines(path: Path) -> None:
    """Names that try to run as code, numbers that are missing or far too large."""
    long, nan, inf, huge = "x" * 400, float("nan"), float("inf"), 1e300
    numbers = [0.5, nan, inf, -inf, huge, -huge, 1e99, 1e29, -1.0, 0.0, 1e-300, 5e-324, None]
    candidates = []
    for n in numbers:
        sizes = [(1, 2), (64, 1), (1, 10**40), (10**40, 2), (-1, 2), (0, 2), (None, 2)]
        speeds = [{"batch": b, "threads": t, "calls": 3} | dict.fromkeys(PACES, n) for b, t in sizes]
        every = dict.fromkeys(["score", "drift", "build_s", "load_s", "size_bytes", "memory_bytes"], n)
        every |= {"difference": dict.fromkeys(["median", "low", "high"], n), "speeds": speeds, "best": n == 0.5}
        candidates.append(every | {"engine": HOSTILE, "precision": long, "state": "accepted"})
        candidates.append(
            every | {"engine": long, "state": HOSTILE, "precision": long, "reason": HOSTILE, "kept": [HOSTILE]}
        )
    candidates.append({"engine": HOSTILE, "state": HOSTILE, "reason": long})
    search = dict.fromkeys(["tolerance", "budget_s", "seconds"], huge)
    search |= {"goal": HOSTILE, "graph": HOSTILE, "labelled": True, "examples": 10**40, "of_examples": 10**40}
    search |= {"candidates": candidates, "chosen": candidates[0]}
    machine = {"device": HOSTILE, "cores": 10**40}
    write(path / "model" / "engines" / "engines.json", {"headline": HOSTILE, "machine": machine, "found": search})


PACES = ["p50_s", "p95_s", "p99_s", "joules"]

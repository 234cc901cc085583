"""What a run and a bench leave about speed, for the tests of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_runs import HOSTILE, digits_check, write

CEILINGS = {
    "device": "AMD EPYC 9R14",
    "torch_name": "cpu",
    "threads": 2,
    "fingerprint": "5e1fa0c29b7d4410aa01",
    "time": "2026-03-01T08:05:00+00:00",
    "seconds": 11.8,
    "matmul_flops": {"float32": 1.9e11, "bfloat16": 4.1e11, "float16": None},
    "conv_flops": {"float32": 2.1e11, "bfloat16": 3.6e11},
    "absent": {"float8_e4m3fn": "no such instructions"},
    "memory_bytes_per_s": 1.5e10,
    "host_to_device_bytes_per_s": None,
    "all_reduce_bytes_per_s": None,
    "launch_s": 2e-6,
    "graph_launch_s": None,
    "jpeg_images_per_s": 900.0,
    "disk_read_bytes_per_s": 2e9,
    "spread": {"matmul_flops.float32": 0.03},
    "waiting": 0.0,
    "steady": True,
}
LAYERS = [  # speednet, 128 pictures of 32 px, bfloat16, as measured on two cores
    ("groups.0.0", "Conv2d", 1_700_462_592, 13_790_720, 6.13e-3),
    ("groups.0.1", "MaxPool2d", 0, 9_715_712, 2.48e-3),
    ("activation", "GELU", 0, 11_808_768, 2.43e-3),
    ("groups.1.0", "Conv2d", 1_061_683_200, 5_566_464, 2.36e-3),
    ("whitening", "Whitening", 70_852_608, 6_691_440, 2.15e-3),
    ("groups.2.0", "Conv2d", 924_844_032, 2_555_904, 1.89e-3),
    ("(model)", "SpeedNet", 0, None, 1.61e-3),
    ("groups.0.4", "Conv2d", 530_841_600, 3_704_832, 1.37e-3),
    ("groups.1.4", "Conv2d", 462_422_016, 1_679_360, 1.02e-3),
    ("groups.2.4", "Conv2d", 339_738_624, 884_736, 6.9e-4),
    ("groups.0.6", "GELU", 0, 3_686_400, 4.3e-4),
    ("groups.0.2", "BatchNorm2d", 0, 3_686_528, 1.95e-4),
    ("head", "Linear", 327_680, 37_888, 1.1e-4),
    ("…", "12 more", 0, None, 1.2e-3),
]


def roofline(ceilings: Any = CEILINGS) -> Any:
    names = ("name", "kind", "flops", "bytes", "seconds")
    about = {"device": "AMD EPYC 9R14", "dtype": "bfloat16", "batch": 128, "flops_per_example": 39_774_784.0}
    return about | {"ceilings": ceilings, "layers": [dict(zip(names, one, strict=True)) for one in LAYERS]}


def plan() -> Any:
    trials = [
        ("+bf16", True, "1.42 times as fast (spread 0.03, 5 rounds)", 1.42, 0.03, 5, 0.004),
        ("+channels_last", True, "1.21 times as fast (spread 0.02, 5 rounds)", 1.21, 0.02, 5, 0.0),
        ("+fused_optimizer", False, "0.98 times as fast (spread 0.02, 5 rounds)", 0.98, 0.02, 5, 0.0),
        ("+float16", False, "outputs differ by 0.31, more than the 0.02 that it may", None, None, 0, 0.31),
        ("threads=1", False, "0.63 times as fast (spread 0.05, 3 rounds)", 0.63, 0.05, 3, None),
        ("+graphs", True, "1.31 times as fast (spread 0.02, 5 rounds)", 1.31, 0.02, 5, 0.0),
        ("-bf16 +tf32", False, "not possible on a CPU", None, None, 0, None),
    ]
    names = ("change", "kept", "reason", "ratio", "spread", "rounds", "error")
    return {
        "device": "cpu",
        "speedups": ["channels_last", "bf16"],
        "threads": 2,
        "dropped": {"fused_optimizer": "measured 2 % slower here", "compile": "would cost 45 s and win 3 s"}
        | {"graphs": "it failed in training: memory ran out"},
        "origin": "measured",
        "seconds": 3.2,
        "trials": [dict(zip(names, one, strict=True)) | {"step_s": 0.2} for one in trials],
    }


def diagnosis() -> Any:
    shares = {"input": 0.05, "copy": None, "forward": 0.31, "backward": 0.52, "optimizer": 0.04}
    return {
        "shares": shares | {"communication": None, "host": 0.02, "idle": 0.06},
        "step_s": 0.21,
        "steps": 25,
        "limited_by": "computing",
        "verdict": "limited by computing: 83 % of the step is the forward and backward pass",
        "remedy": "a smaller network or smaller pictures early in training would make a step cheaper",
        "applied": ["bf16", "channels_last"],
        "gain_at_most": 1.3,
    }


def plan_changes() -> Any:
    message = "other programs use the cores: going on with 1 thread, 1.6 times as fast"
    return [{"step": 80, "said": message, "speedups": ["channels_last", "bf16"]}]


def fallbacks() -> Any:
    message = "memory ran out; going on from step 100 without graphs"
    return [{"step": 120, "said": message, "speedups": ["channels_last", "bf16"]}]


def figures(speed: float, ratio: float, wait: str, **more: Any) -> Any:
    return {
        "examples_per_s": {"median": speed, "half_iqr": speed * 0.017},
        "ratio": {"median": ratio, "half_iqr": 0.0 if ratio == 1 else 0.02 * ratio},
        f"{wait}_ms_p50": 5e5 / speed,
        f"{wait}_ms_p95": 5.3e5 / speed,
        "peak_memory_bytes": 900_000_000,
        "share_of_ceiling": speed / 2400,
        "joules_per_example": None,
        "examples_per_price": None,
        **more,
    }


def bench() -> Any:
    measured = [
        ("plain PyTorch", [], 700, 1.0, 0.612, None, None),
        ("+ channels_last", ["channels_last"], 880, 1.26, 0.611, (-0.001, -0.012, 0.010), None),
        ("+ bf16", ["bf16"], 1490, 2.13, 0.615, (0.003, -0.009, 0.014), None),
        ("+ fused_optimizer", ["fused_optimizer"], 1475, 2.11, 0.614, (0.002, -0.010, 0.013), None),
        ("+ int4_weights", ["int4_weights"], 2100, 3.0, 0.551, (-0.061, -0.072, -0.050), "accuracy falls 6.1 points"),
        ("+ resident", ["resident"], 1980, 2.83, 0.612, (0.0, -0.011, 0.011), None),
        ("+ graphs", ["graphs"], None, None, None, None, "needs an NVIDIA GPU"),
    ]
    variants = []
    for name, speedups, speed, ratio, accuracy, difference, refused in measured:
        variant: dict[str, Any] = {"name": name, "speedups": speedups, "threads": 2, "refused": refused}
        variant |= {"failed": name == "+ graphs", "again": None, "train": None, "evaluate": None}
        if speed is not None and ratio is not None:
            variant["train"] = figures(speed, ratio, "step")
            if name != "+ resident":
                variant["evaluate"] = figures(3.4 * speed, 1.05 * ratio, "batch")
        variant["scores"] = {"accuracy": accuracy, "log_loss": 1.1}
        variant["difference"] = difference and dict(zip(("median", "low", "high"), difference, strict=True))
        variants.append(variant)
    return {
        "device": "AMD EPYC 9R14",
        "batch_size": 500,
        "rounds": 5,
        "steps": 100,
        "planned_steps": 120,
        "validation_examples": 1000,
        "headline": "accuracy",
        "tolerance": 0.005,
        "price_per_hour": None,
        "ceiling_flops": {"float32": 1.9e11},
        "plan": plan(),
        "rungs": variants,
    }


def bench_run(path: Path) -> Path:
    """As `suanli bench` leaves it: no model, no metrics."""
    environment = {
        "command": ["suanli", "bench", "cifar10.zip"],
        "time": "2026-03-01T08:05:00+00:00",
        "device": {"name": "AMD EPYC 9R14", "torch_name": "cpu", "memory_bytes": 16_000_000_000},
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "versions": {"suanli": "0.2.0", "torch": "2.13.0"},
    }
    write(path / "environment.json", environment)
    write(path / "recipe.json", {"model": "speednet", "task": "classification", "batch_size": 500})
    counts = {"train": {"cat": 5000, "dog": 5000}, "val": {"cat": 500, "dog": 500}}
    write(path / "data.json", {"name": "cifar10", "kind": "image", "classes": ["cat", "dog"], "counts": counts})
    write(path / "check.json", digits_check())
    write(path / "bench.json", bench())
    return path


def hostile_speed(path: Path) -> None:
    """Names that want to run, numbers that are none or beyond all bounds."""
    long, nan, inf, huge = "x" * 400, float("nan"), float("inf"), 1e300
    text = dict.fromkeys(["change", "reason", "name", "kind", "verdict", "remedy", "dropped", "said"], HOSTILE)
    numbers = [nan, inf, -inf, huge, -huge, 1e99, -1.0, 0.0, 1e-300, 5e-324, None]
    trials = [text | {"kept": n == 1e99, "ratio": n, "spread": n, "error": n, "step_s": n} for n in numbers]
    shares = {HOSTILE: nan, long: huge, "forward": inf, "backward": -1.0}
    diagnosis = text | {"shares": shares, "step_s": huge, "steps": 10**40, "limited_by": long, "gain_at_most": inf}
    write(
        path / "summary.json",
        {
            "status": HOSTILE,
            "limited_by": long,
            "plan": {
                "device": HOSTILE,
                "speedups": [HOSTILE, long],
                "dropped": {HOSTILE: long, long: HOSTILE},
                "origin": HOSTILE,
                "seconds": nan,
                "trials": trials,
            },
            "diagnosis": diagnosis | {"applied": [HOSTILE, long]},
            "fallbacks": [text, {"said": long, "speedups": [HOSTILE, long]}],
            "plan_changes": [{"step": 3, "said": HOSTILE}, {"said": long}],
            "seconds": {HOSTILE: 3, long: 2},
        },
    )
    counts = [*numbers, 1, 2**62]
    layers = [text | {"flops": a, "bytes": b, "seconds": c} for a in counts for b in counts for c in (1e-3, 5e-324)]
    layers += [text | {"flops": 1, "bytes": 1, "seconds": n} for n in (nan, inf, None, -1.0)]
    peaks = {"float32": 1e99, "bfloat16": nan, HOSTILE: 1e-300}
    ceilings = CEILINGS | {"matmul_flops": peaks, "conv_flops": peaks, "memory_bytes_per_s": 1e-9}
    roofline = {"device": HOSTILE, "dtype": HOSTILE, "batch": 1, "ceilings": ceilings, "layers": layers}
    write(path / "roofline.json", roofline)
    spreads = [{"median": n, "half_iqr": n} for n in numbers]
    variants = []
    for spread in spreads:
        n = spread["median"]
        every = figures(1.0, 1.0, "step") | figures(1.0, 1.0, "batch") | {"examples_per_s": spread, "ratio": spread}
        every = {key: value if isinstance(value, dict) else n for key, value in every.items()}
        variant = {"name": HOSTILE, "speedups": [long], "threads": 10**40, "failed": False}
        variant |= {"train": every, "evaluate": every, "scores": {HOSTILE: n}, "again": None}
        variants.append(variant | {"refused": long, "difference": dict.fromkeys(["median", "low", "high"], huge)})
        variants.append(variant | {"name": long, "refused": None, "difference": dict.fromkeys(["low", "high"], n)})
    about = {"headline": HOSTILE, "device": HOSTILE, "tolerance": huge, "rungs": variants}
    about |= dict.fromkeys(["batch_size", "rounds", "steps", "planned_steps", "validation_examples"], 10**40)
    write(path / "bench.json", about | {"plan": {"device": HOSTILE, "speedups": [HOSTILE]}})

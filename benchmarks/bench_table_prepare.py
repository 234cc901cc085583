"""What `suanli prepare` needs for a large table: time and memory of a whole process.

    python benchmarks/bench_table_prepare.py FOLDER --rows 5000000 --out records/…

The CSV is made first, from a fixed seed, and kept in FOLDER: 13 numbers of many digits, 8 whole numbers of which some
are missing, 7 categories of up to 5,000 values, a date, and a target of two classes. The cache is empty. Memory is the
peak of what the process has resident.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from measured import run_measured
from record import Record, arguments, start
from suanli.core.console import duration, size

BLOCK = 100_000  # rows that are made at a time
SIZES = (2, 5, 12, 50, 200, 1000, 5000)  # values of the categories


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    args = parser.parse_args()
    record = Record("table_prepare", args.out, start(args))
    args.data.mkdir(parents=True, exist_ok=True)
    table = args.data / f"rows{args.rows}.csv"
    if not table.exists():
        write_table(table, args.rows)
    with tempfile.TemporaryDirectory(dir=args.data) as cache:
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "SUANLI_CACHE": cache, "TMPDIR": cache}
        command = [sys.executable, "-m", "suanli", "prepare", str(table), "--target", "target"]
        measured = run_measured(command, environment)
    for line in measured.errors.splitlines():
        record.say(f"  {line}")
    record.say(
        f"{args.rows:,} rows of 30 columns, {size(table.stat().st_size)}: {duration(measured.seconds)}, at most "
        f"{size(measured.memory_bytes)}"
    )
    record.close({"rows": args.rows, "seconds": measured.seconds, "memory_bytes": measured.memory_bytes})


def write_table(path: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    names = [f"n{i}" for i in range(13)] + [f"w{i}" for i in range(8)] + [f"c{i}" for i in range(7)]
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(",".join([*names, "day", "target"]) + "\n")
        for begin in range(0, rows, BLOCK):
            count = min(BLOCK, rows - begin)
            numbers = random.normal(size=(count, 13))
            whole = random.integers(0, 1000, (count, 8))
            columns = [[repr(value) for value in numbers[:, i].tolist()] for i in range(13)]
            missing = random.random((count, 8)) < 0.05
            for i in range(8):
                pairs = zip(whole[:, i].tolist(), missing[:, i].tolist(), strict=True)
                columns.append(["" if gone else str(value) for value, gone in pairs])
            columns += [[f"v{value}" for value in random.integers(0, limit, count).tolist()] for limit in SIZES]
            days = np.datetime64("2020-01-01") + random.integers(0, 1500, count)
            columns.append([str(day) for day in days])
            columns.append(["yes" if value > 0 else "no" for value in (numbers[:, 0] + random.normal(size=count))])
            stream.writelines(",".join(row) + "\n" for row in zip(*columns, strict=True))
    partial.rename(path)


if __name__ == "__main__":
    main()

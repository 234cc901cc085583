"""The cost of sharing a batch: 2 processes with one thread each, compared with one process with 2 threads, on 2 cores.

Both sides train `resnet18` on the same batches of real pictures at 64 px, in whole steps that include the input: it is
what `suanli bench --scaling` measures. All groups are started first and alternate, so that each round gives a ratio of
images per second. With more cores, each process has an equal part of them.

    python benchmarks/bench_scaling.py ../shared/data --out records/…  [--rounds 15] [--batch-size 64] [--speedups none]

`--out` also gets the run with its report, which shows where the time of a step goes. `scaling_model.py` reads its
scaling.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from record import Record, arguments, start
from suanli.machine.device import cores
from suanli.training.scaling_records import Scaling
from suanli.verbs.bench_scaling import bench_scaling
from subjects import SUBJECTS

FLOOR = 0.95  # of one process's images per second
SIZE = 64  # px


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, help="of a block; default: a second and a half")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--speedups", default="none", help="of both sides: none, auto, or names")
    args = parser.parse_args()
    device = start(args)
    record = Record("scaling", args.out, device)
    subject = SUBJECTS["resnet18"]
    with tempfile.TemporaryDirectory() as folder:
        result = bench_scaling(
            args.data if args.data.is_file() else args.data / subject.file,
            processes="1,2",
            recipe=subject.recipe,
            model="resnet18",
            batch_size=args.batch_size,
            settings={**subject.settings, "preprocess.size": SIZE},
            device=args.device,
            speedups=args.speedups,
            steps=args.steps,
            rounds=args.rounds,
            out=(args.out or Path(folder)) / "run",
            cache_dir=args.cache,
        )
    report(record, result.scaling)


def report(record: Record, scaling: Scaling) -> None:
    for one in scaling.sizes:
        rate = one.images_per_s
        record.say(
            f"{one.processes} process(es) x {one.threads} thread(s): {rate.median:8.1f} images/s "
            f"(± {rate.half_iqr:.1f}), {1e3 * one.step_s:.1f} ms a step: {1e3 * one.compute_s:.1f} computing, "
            f"{1e3 * one.wait_s:.1f} waiting, {1e3 * one.exposed_s:.1f} communication exposed"
        )
    one, two = scaling.sizes
    what = f"2 processes x {two.threads} / 1 process x {one.threads}"
    ratio = two.speedup
    floor = FLOOR if one.threads == cores() == 2 else None  # the figure is about two cores
    figure = record.figure(what, ratio.median, ratio.half_iqr, ratio.count, floor=floor)
    record.say(scaling.verdict.sentences)
    record.close({"ratio": figure, "scaling": scaling.to_json()})


if __name__ == "__main__":
    main()

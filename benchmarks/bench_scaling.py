"""What it costs that processes share a batch: 2 of them with a thread each against one with 2 threads, on 2 cores.

Both sides train `resnet18` on the same batches of real pictures at 64 px, whole steps, input included: it is what
`suanli bench --scaling` measures. The groups are all started first and take turns, so that each round gives one ratio
of images per second. With more cores, each process has an equal part of them.

    python benchmarks/bench_scaling.py ../shared/data --out records/…  [--rounds 15] [--batch-size 64] [--speedups none]

`--out` also gets the run with its report: where the step's time goes. `scaling_model.py` reads its scaling.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from record import Record, arguments, start
from suanli.machine.device import cores
from suanli.verbs._bench_scaling import Scaling, bench_scaling
from subjects import SUBJECTS

FLOOR = 0.95  # of one process's images per second
SIZE = 64  # px


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, help="of a block; default: a second and a half")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--speedups", default="none", help="of both sides: none, auto, or names")
    given = parser.parse_args()
    device = start(given)
    record = Record("scaling", given.out, device)
    subject = SUBJECTS["resnet18"]
    with tempfile.TemporaryDirectory() as folder:
        found = bench_scaling(
            given.data if given.data.is_file() else given.data / subject.file,
            processes="1,2",
            recipe=subject.recipe,
            model="resnet18",
            batch_size=given.batch_size,
            settings={**subject.settings, "preprocess.size": SIZE},
            device=given.device,
            speedups=given.speedups,
            steps=given.steps,
            rounds=given.rounds,
            out=(given.out or Path(folder)) / "run",
            cache_dir=given.cache,
        )
    figures(record, found)


def figures(record: Record, found: Scaling) -> None:
    for one in found.sizes:
        rate = one.images_per_s
        record.say(
            f"{one.processes} process(es) x {one.threads} thread(s): {rate.median:8.1f} images/s "
            f"(± {rate.half_iqr:.1f}), {1e3 * one.step_s:.1f} ms a step: {1e3 * one.compute_s:.1f} computing, "
            f"{1e3 * one.wait_s:.1f} waiting, {1e3 * one.exposed_s:.1f} communication exposed"
        )
    one, two = found.sizes
    what = f"2 processes x {two.threads} / 1 process x {one.threads}"
    ratio = two.speedup
    known = one.threads == cores() == 2  # the figure is about two cores
    compared = record.figure(what, ratio.median, ratio.half_iqr, ratio.count, floor=FLOOR if known else None)
    record.say(str(found.values["verdict"]["said"]))
    record.close({"ratio": compared, "scaling": found.to_json()})


if __name__ == "__main__":
    main()

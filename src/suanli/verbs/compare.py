"""compare: what differs between runs, and which of them is better."""

from __future__ import annotations

from pathlib import Path

from suanli.core.errors import UsageError
from suanli.core.storage import atomic_file
from suanli.core.types import AnyPath
from suanli.reporting.comparison import Comparison, compare_runs

FILE_NAME = "compare.html"


def compare(*runs: AnyPath, html: AnyPath | None = None) -> Comparison:
    """Compare runs with the first of them: recipe, data, plan, machine, scores, learning curves and cost.

    Where two runs were evaluated on the same examples, the difference of their scores is a paired one, with its 95 %
    interval; where not, the comparison says why and gives the difference of independent figures. `html` writes it as
    one page that opens offline (into a folder, as `compare.html`). Raises UsageError for fewer than two runs, DataError
    where no run is, DamagedFile for a file of a run that can't be used, StorageError where the page can't be written.
    """
    if len(runs) < 2:
        raise UsageError("There is nothing to compare.", fix="Name two runs or more, the first to compare with.")
    comparison = compare_runs(runs)
    if html is not None:
        from suanli.reporting.comparison_views import render

        target = Path(html).expanduser()
        page = render(comparison)
        with atomic_file(target / FILE_NAME if target.is_dir() else target) as stream:
            stream.write(page.encode(errors="backslashreplace"))
    return comparison

"""The run directory: numbered, locked, readable after a crash."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from suanli.core.errors import DamagedFile, DataError, RunBusy, StorageError, UsageError
from suanli.core.run import Run
from suanli.core.types import Plan, Recipe, Trial


def create(name: str = "digits", out: Path | None = None) -> Run:
    return Run.create(name, out, Recipe(lr=0.5), {"name": name}, {"command": []})


def test_numbers_follow_each_other() -> None:
    assert [create().path.name for _ in range(3)] == ["digits-1", "digits-2", "digits-3"]
    assert create("a b/../c").path == Path("runs/a-b-..-c-1")


def test_processes_at_the_same_time_get_different_runs() -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(create().path)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(paths)) == 8


def test_an_occupied_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not an empty directory"):
        create(out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    create(out=tmp_path / "new" / "deep")
    with pytest.raises(UsageError, match="suanli train"):
        create(out=tmp_path / "new" / "deep")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Can't write"):
        create(out=tmp_path / "file" / "run")


def test_the_recipe_comes_back() -> None:
    assert create().recipe == Recipe(lr=0.5)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        Run.open(tmp_path)


def test_a_recipe_of_another_version() -> None:
    run = create()
    run.write("recipe.json", {"lr": "fast", "gears": 5})
    with pytest.raises(DamagedFile, match="not a recipe of this version"):
        _ = run.recipe


def test_a_line_cut_short_is_skipped() -> None:
    run = create()
    run.log(step=1, loss=0.5)
    run.log(step=2, loss=0.25)
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 3, "lo')
    assert [m["step"] for m in run.metrics] == [1, 2]


def test_a_notebook_shows_a_small_table(trained_on_pictures: Path) -> None:
    run = Run(trained_on_pictures / "made")
    assert run.scores_split == "val"
    assert repr(run).endswith(f"made', finished, validation accuracy {100 * run.scores['accuracy']:.2f}%)")
    table = run._repr_html_()
    for part in ("<td", "pictures", "speednet", "finished", "validation accuracy"):
        assert part in table
    nothing, hostile = Run("nowhere"), create(name="x")
    assert repr(nothing) == "Run('nowhere')"
    assert "can&#x27;t be read" in nothing._repr_html_()
    hostile.write("data.json", {"name": "<script>"})
    assert "<script>" not in hostile._repr_html_()


def test_a_plan_shows_its_trials() -> None:
    trial = Trial(change="+bf16", kept=False, reason="0.9 times <as> fast")
    plan = Plan(device="cpu", speedups=("channels_last",), threads=2, trials=(trial,), origin="measured")
    assert repr(plan) == "Plan(channels_last, threads=2, measured, cpu)"
    assert "tried +bf16" in plan._repr_html_()
    assert "<as>" not in plan._repr_html_()


def test_notebook_forms_need_no_torch() -> None:
    create(name="digits")
    script = (
        "import sys, suanli; run = suanli.Run('runs/digits-1'); run._repr_html_(), repr(run), run.scores;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    run = create(out=tmp_path / "run")
    other = "import sys; from suanli.core.run import Run\nwith Run(sys.argv[1]).lock(): print('mine')"
    with run.lock(), pytest.raises(RunBusy, match="Another process"), Run(run.path).lock():
        pass
    with run.lock():
        result = subprocess.run([sys.executable, "-c", other, run.path], capture_output=True, text=True, timeout=60)
        assert "RunBusy" in result.stderr
    result = subprocess.run([sys.executable, "-c", other, run.path], capture_output=True, text=True, timeout=60)
    assert result.stdout == "mine\n"

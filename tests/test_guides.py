"""The guide's example is what it says: two scripts that differ in three lines and learn the same."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

GUIDE = Path(__file__).parents[1] / "docs" / "speed.md"
ENGINES = GUIDE.with_name("engines.md")


def test_three_changed_lines_learn_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    plain, fast = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    added = [line for line in difflib.ndiff(plain.splitlines(), fast.splitlines()) if line.startswith("+ ")]
    assert len([line for line in added if line.strip("+ ")]) == 3
    plain, fast = (script.replace("range(10)", "range(4)") for script in (plain, fast))  # for time's sake
    exec(plain, {})
    before = float(capsys.readouterr().out.split()[-1])
    # Its step stays open, so the switches of the process stay on.
    done = subprocess.run([sys.executable, "-c", fast], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert before < 0.5
    assert abs(before - float(done.stdout.split()[-1])) < 0.05


@pytest.mark.long
def test_the_lines_that_load_an_engine(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", ENGINES.read_text(), re.DOTALL)
    Image.fromarray((load_digits().images[7] * 15.9).astype(np.uint8)).save(tmp_path / "seven.png")
    shorter = script.replace('time_budget="1m"', 'time_budget="8s"')
    assert shorter != script
    done = subprocess.run([sys.executable, "-c", shorter], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "7"

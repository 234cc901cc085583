"""The guide's example is what it says: two scripts that differ in three lines and learn the same."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "speed.md"


def run(script: str, folder: Path) -> float:
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_three_changed_lines_learn_the_same(tmp_path: Path) -> None:
    plain, fast = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    added = [line for line in difflib.ndiff(plain.splitlines(), fast.splitlines()) if line.startswith("+ ")]
    assert len([line for line in added if line.strip("+ ")]) == 3
    before, after = run(plain, tmp_path), run(fast, tmp_path)
    assert before < 0.5
    assert abs(before - after) < 0.05

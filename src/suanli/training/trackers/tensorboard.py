"""TensorBoard: writes event files to `<run>/tensorboard`, for `tensorboard --logdir runs`. It needs no network."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from suanli.core.errors import pip_install
from suanli.core.types import Tracker


class TensorBoard(Tracker):
    @classmethod
    def why_not(cls) -> str | None:
        return None if importlib.util.find_spec("tensorboard") else pip_install("tensorboard>=2.18")

    def __init__(self, run_path: Path, config: Mapping[str, object]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run_path / "tensorboard"))
        listing = json.dumps(dict(config), indent=1, ensure_ascii=False)
        self._writer.add_text("recipe", "\n".join(f"    {line}" for line in listing.splitlines()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


TRACKER = TensorBoard

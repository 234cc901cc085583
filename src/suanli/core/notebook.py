"""What a notebook shows of an object: a small table of plain HTML that needs no style sheet and no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Rows whose value is None are left out."""
    cells = "".join(
        f'<tr><td style="text-align:left">{escape(name)}</td><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows
        if value is not None
    )
    head = f'<thead><tr><th colspan="2" style="text-align:left">{escape(title)}</th></tr></thead>'
    return f"<table>{head}<tbody>{cells}</tbody></table>"

"""HTML for notebooks: texts, tables and curves without a style sheet, in the colors of the page, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from typing import Any

__all__ = ["Part", "curve", "document", "facts", "folded", "preformatted", "table", "trainer"]

_MOST = 100  # rows of a table: a page with thousands of them scrolls slowly, and notebooks are saved with all of them
_WIDTH, _HEIGHT = 480, 80  # of a curve
_CELL = "padding:1px 14px 1px 0;border:none;text-align:"


class Part(str):
    """HTML, where all other text is escaped."""

    __slots__ = ()


def document(title: str, *parts: Part) -> str:
    """A value as HTML: what it is, and parts made by the other functions."""
    return f'<div style="color:inherit"><div><b>{escape(title)}</b></div>{"".join(parts)}</div>'


def trainer(arguments: Mapping[str, Any], model: str, seconds: Sequence[float]) -> str:
    """A trainer as HTML: its arguments by name, its model in words, and the seconds of each compilation."""
    shown = {**arguments, "model": preformatted(model)}
    shown["compiled"] = f"{len(seconds)} programs in {sum(seconds):.1f} s (trainer.compilations)"
    return document("Trainer", facts(shown.items()))


def facts(pairs: Iterable[tuple[str, Any]]) -> Part:
    """Names and values, a line for each; a value may be a ``Part``."""
    return _table([[f'<span style="opacity:0.65">{escape(name)}</span>', _cell(value)] for name, value in pairs])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], most: int = _MOST) -> Part:
    """A table of texts and numbers, ints with commas and floats with 4 digits. Rows beyond ``most`` are counted."""
    rows = list(rows)
    shown = [[_cell(value) for value in row] for row in islice(rows, most)]
    more = f"<div>and {len(rows) - most:,} more</div>" if len(rows) > most else ""
    numbers = [not isinstance(value, str) for value in (rows or [()])[0]]
    return Part(_table(shown, [escape(name) for name in head], numbers) + more)


def folded(title: str, part: Part) -> Part:
    """A part that is shown when its title is clicked."""
    return Part(f'<details><summary style="cursor:pointer">{escape(title)}</summary>{part}</details>')


def preformatted(text: str) -> Part:
    """Text whose lines and spaces stay as they are."""
    return Part(f'<pre style="margin:0;color:inherit;background:none">{escape(text)}</pre>')


def curve(values: Sequence[float], label: str) -> Part:
    """Finite values as a small curve, with the lowest and the highest of them in its label."""
    low, high = min(values), max(values)
    across, up = _WIDTH / max(len(values) - 1, 1), (_HEIGHT - 4) / ((high - low) or 1)
    points = " ".join(f"{i * across:.1f},{2 + (high - v) * up:.1f}" for i, v in enumerate(values))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.2"/>'
    box = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
    text = f"{label}: {low:.4g} to {high:.4g}"
    return Part(f'<div>{escape(text)}</div><svg {box} aria-label="{escape(text)}">{line}</svg>')


def _cell(value: Any) -> str:
    if isinstance(value, Part):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(str(value))


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), right: Sequence[bool] = ()) -> Part:
    side = lambda i: "right" if i < len(right) and right[i] else "left"
    line = lambda tag, cells: "".join(f'<{tag} style="{_CELL}{side(i)}">{c}</{tag}>' for i, c in enumerate(cells))
    body = "".join(f'<tr style="background:none">{line("td", row)}</tr>' for row in rows)
    top = f"<thead><tr>{line('th', head)}</tr></thead>" if head else ""
    style = "border-collapse:collapse;margin:2px 0;color:inherit"
    return Part(f'<table style="{style}">{top}<tbody>{body}</tbody></table>')

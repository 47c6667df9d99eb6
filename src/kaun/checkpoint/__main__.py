"""Inspect a directory of checkpoints: ``python -m kaun.checkpoint verify|list|show PATH``.

``join PATH FILE`` writes the state of a checkpoint, whose parts several processes wrote, as one file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from kaun._messages import plain
from kaun.checkpoint import one
from kaun.checkpoint.best import FOREVER, Best
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.folders import Found, newest_facts, parse_name, scan
from kaun.errors import ResumeMismatch
from kaun.tree import format_bytes

__all__ = ["main"]


def main(given: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code: 0, or 1 if there is no checkpoint, or one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m kaun.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in {
        "verify": "read every byte of every checkpoint, and report which ones are damaged or of a newer kaun",
        "list": "print steps, sizes and dates, and which one is the best, without reading the states",
        "show": "print the leaves of the newest checkpoint, or of the one at PATH",
    }.items():
        commands.add_parser(name, help=help).add_argument("path", type=Path, metavar="PATH")
    join = commands.add_parser(
        "join", help="write the state of the newest checkpoint, or of the one at PATH, as one file"
    )
    join.add_argument("path", type=Path, metavar="PATH")
    join.add_argument("file", type=Path, metavar="FILE")
    options = parser.parse_args(given)
    disk, path = Disk(), options.path
    single = parse_name(path.absolute())
    found = [single] if single and path.is_dir() else scan(disk, path)
    if not found:
        print(f"no checkpoint in {str(path)!r}", file=sys.stderr)
        return 1
    if options.command == "join":
        return _join(disk, found[0], options.file)
    return {"verify": _verify, "list": _list, "show": _show}[options.command](disk, found)


def _verify(disk: Disk, found: list[Found]) -> int:
    counts = {"sound": 0, "damaged": 0, "newer": 0}
    for each in reversed(found):
        try:
            manifest = one.verify(disk, each.path, each.step)
            kind, text = "sound", format_bytes(sum(record.size for record in manifest.files.values()))
        except ResumeMismatch as err:
            kind, text = "newer", _error(err)
        except (one.Damaged, OSError) as err:
            kind, text = "damaged", _error(err)
        counts[kind] += 1
        print(f"{each.path.name}  {kind if kind == 'sound' else kind.upper():7}  {text}")
    newer = f", {counts['newer']} of a newer kaun" if counts["newer"] else ""
    print(f"{counts['sound']} sound, {counts['damaged']} damaged{newer}")
    return int(counts["sound"] < len(found))


def _list(disk: Disk, found: list[Found]) -> int:
    bad, mark = 0, _marks(disk, found[0].path.parent)
    for each in reversed(found):
        try:
            print(f"{_line(disk, each)}{mark(each.step)}")
        except OSError as err:  # it was removed meanwhile, or may not be read
            bad += 1
            print(f"{each.path.name}  {_error(err)}")
    return int(bad > 0)


def _join(disk: Disk, newest: Found, file: Path) -> int:
    try:
        one.write_joined(disk, newest.path, newest.step, file)
    except (one.Damaged, ResumeMismatch, OSError) as err:
        print(f"{newest.path.name} was not joined: {_error(err)}", file=sys.stderr)
        return 1
    print(f"{newest.path.name}  {format_bytes(file.stat().st_size)}  {plain(file)}")
    return 0


def _marks(disk: Disk, path: Path) -> Callable[[int], str]:
    """Why a step is kept longer than others, by what the newest checkpoint records; empty where nothing says so."""
    best, forever = None, None
    with contextlib.suppress(OSError, ValueError):  # of a newer kaun, or of another program
        facts = newest_facts(disk, scan(disk, path))
        best, forever = Best.of(facts), facts.get(FOREVER)

    def mark(step: int) -> str:
        marks = [f"best ({plain(best.name)} {best.value:g})"] if best is not None and step == best.step else []
        marks += ["forever"] if type(forever) is int and forever > 0 and step % forever == 0 else []
        return "".join(f"  {text}" for text in marks)

    return mark


def _line(disk: Disk, each: Found) -> str:
    sizes = [(each.path / entry.name).lstat().st_size for entry in disk.entries(each.path) if entry.is_file]
    made = datetime.fromtimestamp(each.path.lstat().st_mtime).isoformat(" ", "seconds")
    parts = sum(entry.name.startswith("part-") for entry in disk.entries(each.path))
    return f"{each.path.name}  {format_bytes(sum(sizes)):>10}  {made}" + (f"  {parts} parts" if parts else "")


def _show(disk: Disk, found: list[Found]) -> int:
    newest = found[0]
    try:
        manifest, files = one.leaves(disk, newest.path, newest.step)
    except (one.Damaged, ResumeMismatch, OSError) as err:
        problem = "cannot be read" if isinstance(err, ResumeMismatch) else "is damaged"
        print(f"{newest.path.name} {problem}: {_error(err)}", file=sys.stderr)
        return 1
    for name, places in files.items():
        print(f"{newest.path.name}/{name}")
        rows = [(plain(p.name), _leaf(p), format_bytes(p.stop - p.start)) for p in sorted(places)]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for path, leaf, size in rows:
            print(f"  {path:{widths[0]}}  {leaf:{widths[1]}}  {size:>{widths[2]}}")
    for title, values in (("reports", manifest.reports), ("facts", manifest.facts)):
        for name, value in values.items():
            print(f"{title}: {plain(name)} = {plain(repr(value), 100)}")
    return 0


def _leaf(place: Any) -> str:
    return plain(f"{place.dtype.name}{list(place.shape)}" + (f" ({place.kind})" if place.kind else ""))


def _error(err: Exception) -> str:
    return plain(err, 1000)


if __name__ == "__main__":
    sys.exit(main())

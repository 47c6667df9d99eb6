"""Measures kaun and other ways to train the same model, and writes docs/performance.md.

Each run is its own process. Rounds of all runners are interleaved, and what is reported is the median of the ratios
within a round. Runners must end at the same loss.
"""

import argparse
from pathlib import Path
from typing import Any

from bench import report, results
from bench.extras import EXTRAS
from bench.launch import installed, one_round, pairs
from bench.runners import RUNNERS
from bench.workloads import WIDTHS, WORKLOADS

GROUPS = {"width": [f"width{n}" for n in WIDTHS]}


def names_of(text: str, known: Any, groups: Any = None) -> list[str]:
    """The names of a list with commas, each of them known."""
    found = []
    for name in filter(None, text.split(",")):
        more = (groups or {}).get(name, [name])
        if not set(more) <= set(known):
            raise SystemExit(f"{name!r} is none of {', '.join([*known, *(groups or {})])}")
        found += more
    return found


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of few steps; writes only with --json")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--steps", type=int, help="the steps of a pass, timed once")
    parser.add_argument("--only", help=f"workloads, with commas: {', '.join([*WORKLOADS, *GROUPS])}")
    parser.add_argument("--runners", help=f"besides `hand`, with commas: {', '.join(RUNNERS)}")
    parser.add_argument("--extras", help=f"{', '.join(EXTRAS)}, or none; default all, with --only or --runners none")
    parser.add_argument("--json", type=Path, help=f"results to add to, default {report.RESULTS.name} in bench/")
    parser.add_argument("--page", type=Path, help="the page to write, default docs/performance.md")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    part = options.only is not None or options.runners is not None
    workloads = names_of(options.only, WORKLOADS, GROUPS) if options.only is not None else list(WORKLOADS)
    runners = installed(names_of(options.runners, RUNNERS) if options.runners is not None else RUNNERS)
    default = "" if part or options.quick else ",".join(EXTRAS)
    extras = names_of((options.extras or default).replace("none", ""), EXTRAS)
    file = options.json or (None if options.quick else report.RESULTS)
    page = options.page or (None if options.json or options.quick else report.PAGE)

    old = results.load(file) if file else results.empty()
    session = str(1 + max(map(int, old["sessions"]), default=0))
    new: dict[str, Any] = {"sessions": {session: results.about()}, "runs": [], "extras": {}}
    rounds = options.rounds or (1 if options.quick else 5)
    flags = ["--quick"] * options.quick + (["--steps", str(options.steps)] if options.steps else [])

    for number in range(rounds):
        for run in one_round(pairs(workloads, runners), number, flags):
            new["runs"].append({**run, "session": session})
        if file:  # what is there after an interruption is whole rounds
            results.save(file, results.merged(old, new))
    for name in extras:
        print(f"{name}: {EXTRAS[name].__doc__}", flush=True)
        new["extras"][name] = {**EXTRAS[name](rounds), "session": session}
    if not (new["runs"] or new["extras"]):
        raise SystemExit("nothing to measure")
    found = results.merged(old, new)
    if file:
        results.save(file, found)
    print("\n" + "\n".join([*report.tables(found), *report.bars(found)]))
    if page:
        report.write(found, page)
        print(f"\n{page.name} is written")


if __name__ == "__main__":
    main()

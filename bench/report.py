"""Makes docs/performance.md, and the picture in it, of the results: ``python -m bench.report [FILE]``."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench import results
from bench.extras import FLAG
from bench.results import BASE, ratio
from bench.runners import RUNNERS
from bench.workloads import WIDTHS, WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = "performance-width.svg"
NOTES = Path(__file__).with_name("notes.md")

Results = dict[str, Any]
Bar = tuple[str, float, Callable[[Results], float | None], str]


def step(workload: str, runner: str, to: str = BASE) -> Callable[[Results], float | None]:
    return lambda found: ratio(found, workload, runner, to)


def field(workload: str, runner: str, name: str) -> Callable[[Results], float | None]:
    return lambda found: ratio(found, workload, runner, BASE, name)


def warm(workload: str) -> Callable[[Results], float | None]:
    def value(found: Results) -> float | None:
        times = found["extras"].get("cache", {}).get(workload)
        return times and median(w / c for w, c in zip(times["warm"], times["cold"], strict=True))

    return value


def extra(name: str, key: str) -> Callable[[Results], float | None]:
    return lambda found: found["extras"].get(name, {}).get(key)


# What kaun promises: the claim, the bound (at most), the measured value, and what would be better still.
BARS: list[Bar] = [
    ("xor, no report, to the scan", 1.4, step("xor", "kaun", "hand-scan"), "1.1"),
    ("xor, `every(100)`, to the scan", 1.4, step("xor", "kaun-every100", "hand-scan"), "1.1"),
    ("xor, no report, to the synced loop (6 times faster)", 1 / 6, step("xor", "kaun", "hand-synced"), ""),
    ("xor, `every(100)`, to the synced loop (6 times faster)", 1 / 6, step("xor", "kaun-every100", "hand-synced"), ""),
    ("xor, a report at each step, to the synced loop", 1.15, step("xor", "kaun-each", "hand-synced"), "1.0"),
    ("mlp, to the unsynced loop", 0.85, step("mlp", "kaun"), "0.76"),
    ("cnn, to the unsynced loop", 0.6, step("cnn", "kaun"), "0.37"),
    ("cnn, to PyTorch", 1.0, step("cnn", "kaun", "torch"), ""),
    ("gpt, to the unsynced loop", 0.65, step("gpt", "kaun"), "0.5"),
    ("gpt, to Flax NNX", 1.0, step("gpt", "kaun", "nnx"), ""),
    ("gpt, to PyTorch", 1.0, step("gpt", "kaun", "torch"), "beyond"),
    *(
        (f"{name}, first step with its compilation, to the unsynced loop's", 1.15, field(name, "kaun", "first"), "1.0")
        for name in ("xor", "mlp", "cnn", "gpt")
    ),
    *(
        (f"{name}, first step of a second process with JAX's compile cache, to the first's", 0.5, warm(name), "")
        for name in ("xor", "mlp", "cnn", "gpt")
    ),
    ("`import kaun` after `import jax`, seconds", 0.1, extra("import", "kaun"), "0.05"),
    ("adam50m, peak memory, to the unsynced loop's", 1.1, field("adam50m", "kaun", "peak"), ""),
    ("adam50m, peak memory, a report at each step", 1.1, field("adam50m", "kaun-each", "peak"), ""),
]


def rows_of(found: Results, workload: str) -> Iterator[str]:
    for runner, about in RUNNERS.items():
        to_base = 1.0 if runner == BASE else ratio(found, workload, runner, BASE)
        names = ("step", "first", "compiling", "peak")
        seconds, first, compiling, peak = (results.median(found, workload, runner, name) for name in names)
        if to_base is None or seconds is None:
            continue
        each = f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"
        cells = (about.label, each, f"{1 / seconds:,.{0 if seconds < 0.1 else 1}f}", f"{to_base:.2f}")
        yield "| " + " | ".join((*cells, f"{first:.2f} s", f"{compiling:.2f} s", f"{peak:,.0f} MB")) + " |"


def tables(found: Results) -> list[str]:
    """A table for each workload."""
    lines = []
    for name, workload in WORKLOADS.items():
        rows = list(rows_of(found, name))
        if rows and not name.startswith("width"):
            lines += [f"**{name}**: {workload.about}", ""]
            lines += [
                "| | per step | steps/s | ratio | first step | all compiling | peak |",
                "|---" * 7 + "|",
                *rows,
                "",
            ]
    return lines


def bars(found: Results) -> list[str]:
    measured = [(claim, bound, value(found), beyond) for claim, bound, value, beyond in BARS]
    rows = [
        f"| {claim} | {bound:.2f} | {value:.2f} | {'reached' if value <= bound else '**not reached**'} | {beyond} |"
        for claim, bound, value, beyond in measured
        if value is not None
    ]
    head = ["| | at most | measured | | better still |", "|---|---|---|---|---|"]
    return [*head, *rows] if rows else []


def headers(found: Results) -> Iterator[str]:
    """The machine and versions of each session, said once where they are the same."""
    seen = dict.fromkeys((s["machine"], tuple(s["versions"].items())) for s in found["sessions"].values())
    for machine, versions in seen:
        yield f"Machine: {machine}; " + ", ".join(f"{name} {version}" for name, version in versions) + "."


INTRODUCTION = """\
# Performance

Made by `make bench`, with all its figures. The same model with the same initial weights sees the same
batches in the same order in each runner, with Adam, in float32, on the CPU. The losses after the first step and at the
end must agree (to 1e-5 at first; then to 2e-3, as rounding differs from library to library and training lets it grow),
or there is no page.

Each run is its own process: it compiles, trains for one pass over the data, and then times passes. Runs are
interleaved in rounds. *Ratio* is the median, over the rounds, of a runner's time per step over that of the hand-written
loop in the same round, so what slows the whole machine cancels. *First step* includes tracing and compiling; *all
compiling* is by how much first step and first pass together took longer than they do later. Keras shuffles by a key of
its own, so it gets its rows in order. The hand-written models use JAX's stock operations
(convolutions in their default layout, channels first; attention by `einsum`). "kaun's loop around the hand-written
forward pass" has that same model, so it shows what the loop does; the lines above it have kaun's layers as well."""

REPRODUCE = """\
## Run it

```console
$ make bench
$ make bench ALSO=torch
$ make bench ARGS="--quick"
$ make bench ARGS="--only cnn,gpt --runners kaun,nnx"
```

The last one measures a part and puts it in place of the same part of the earlier results. `python -m bench --help` has
the rest, `python -m bench.report` makes this page of the results again."""


def write(found: Results, page: Path = PAGE) -> None:
    """The page, and its picture beside it."""
    picture = draw(found, page.with_name(PICTURE))
    page.write_text("\n".join(lines_of(found, picture)) + "\n")


def lines_of(found: Results, picture: bool) -> Iterator[str]:
    yield from (INTRODUCTION, "", *headers(found), "")
    yield from ("## Steps", "", *tables(found))
    yield from ("## Bars", "", "What kaun sets itself, in the same run:", "", *bars(found), "")
    if picture:
        yield from ("## From small to large", "", f"![Time per step against model width]({PICTURE})", "")
        yield from (*width_rows(found), "")
    yield from ("## Other costs", "", *others(found), "", "## What limits it", "", NOTES.read_text().strip(), "")
    yield REPRODUCE


def width_rows(found: Results) -> Iterator[str]:
    """The picture in numbers."""
    names = WORKLOADS[f"width{WIDTHS[0]}"].runners or ()
    yield "| width | " + " | ".join(RUNNERS[name].label for name in names if name != BASE) + " |"
    yield "|---" * len(names) + "|"
    for n in WIDTHS:
        cells = (ratio(found, f"width{n}", name, BASE) for name in names if name != BASE)
        yield f"| {n} | " + " | ".join("" if value is None else f"{value:.2f}" for value in cells) + " |"


def others(found: Results) -> Iterator[str]:
    have = found["extras"]
    if "closures" in have:
        yield f"- Capturing a fresh closure: {have['closures']['microseconds']:.1f} us (median of 1,000)."
    if "import" in have:
        seconds = have["import"]
        kaun, optax = seconds["kaun"], seconds["optax"]
        yield f"- `import kaun` after `import jax`: {kaun:.2f} s; `import optax` alone: {optax:.2f} s."
    yield "- JAX keeps compiled programs from one process to the next if it has a folder. (The second setting is for"
    yield "  short compilations, which it would leave out.) Nothing needs to change in a program:"
    yield "\n  ```text"
    yield "  JAX_COMPILATION_CACHE_DIR=~/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 python train.py"
    yield "  ```\n"
    for name, times in have.get("cache", {}).items():
        if name != "session":
            cold, again = median(times["cold"]), median(times["warm"])
            where = f"{cold:.2f} s in the process that fills the cache, {again:.2f} s in the next"
            yield f"  - First step of {name}: {where}."
    yield "- XLA reads flags when a process starts, and kaun sets none. One of them is about loops over"
    yield "  little data, so about tiny models:"
    yield f"\n  ```text\n  XLA_FLAGS={FLAG} python train.py\n  ```\n"
    for name, times in have.get("flag", {}).items():
        if name != "session":
            without, given = (median(times[key]) * 1e6 for key in ("without", "with"))
            yield f"  - xor, {RUNNERS[name].label}: {without:.1f} us per step without it, {given:.1f} us with it."


def draw(found: Results, path: Path) -> bool:
    """Time per step against width, on logarithmic scales; whether there was anything to draw."""
    names = WORKLOADS[f"width{WIDTHS[0]}"].runners or ()
    lines = {
        name: [(n, seconds * 1e6) for n in WIDTHS if (seconds := results.median(found, f"width{n}", name, "step"))]
        for name in names
    }
    if not any(lines.values()):
        return False
    import matplotlib

    # No date and no random names: equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "kaun", "svg.fonttype": "none"}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            label = RUNNERS[name].label.replace("*", "").replace("`", "")
            heavy = name == "kaun"
            axes.loglog(*zip(*points, strict=True), "o-", label=label, linewidth=3 if heavy else 1.5, zorder=2 + heavy)
        axes.set(xlabel="width (32-width-width-10, batches of 32)", ylabel="microseconds per step")
        axes.set_xticks(WIDTHS, map(str, WIDTHS), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, metadata={"Date": None})
    return True


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    if not file.exists():
        raise SystemExit(f"there are no results in {file.name}: run `make bench` first")
    write(results.load(file))

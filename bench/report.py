"""Write docs/performance.md and its figure from the results: ``python -m bench.report [FILE]``."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench import checkpoints, growth, results
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


def slowest(name: str, start: str = "") -> Callable[[Results], float | None]:
    """The largest ratio of an extra's rows whose names have this in them."""

    def value(found: Results) -> float | None:
        rows = rows_of_extra(found, name)
        return max((row["ratio"] for key, row in rows.items() if start in key), default=None)

    return value


def to_orbax(what: str) -> Callable[[Results], float | None]:
    def value(found: Results) -> float | None:
        rows = rows_of_extra(found, "checkpoints")
        return checkpoints.ratio(rows, "kaun", "orbax", what) if "orbax" in rows else None

    return value


def rows_of_extra(found: Results, name: str) -> dict[str, Any]:
    return {key: row for key, row in found["extras"].get(name, {}).items() if key != "session"}


# The performance targets of kaun: what is compared, the upper bound, the function for the measured value, and a
# stretch goal.
BARS: list[Bar] = [
    ("xor, no report, relative to the scan", 1.4, step("xor", "kaun", "hand-scan"), "1.1"),
    ("xor, `every(100)`, relative to the scan", 1.4, step("xor", "kaun-every100", "hand-scan"), "1.1"),
    ("xor, no report, relative to the synced loop (6 times faster)", 1 / 6, step("xor", "kaun", "hand-synced"), ""),
    (
        "xor, `every(100)`, relative to the synced loop (6 times faster)",
        1 / 6,
        step("xor", "kaun-every100", "hand-synced"),
        "",
    ),
    ("xor, a report at each step, relative to the synced loop", 1.15, step("xor", "kaun-each", "hand-synced"), "1.0"),
    ("mlp, relative to the unsynced loop", 0.85, step("mlp", "kaun"), "0.76"),
    ("cnn, relative to the unsynced loop", 0.6, step("cnn", "kaun"), "0.37"),
    ("cnn, relative to PyTorch", 1.0, step("cnn", "kaun", "torch"), ""),
    ("gpt, relative to the unsynced loop", 0.65, step("gpt", "kaun"), "0.5"),
    ("gpt, relative to Flax NNX", 1.0, step("gpt", "kaun", "nnx"), ""),
    ("gpt, relative to PyTorch", 1.0, step("gpt", "kaun", "torch"), "below 1.0"),
    *(
        (f"{name}, relative to {label}", 1.0, step(name, "kaun", other), "")
        for name in ("lstm", "nanogpt", "resnet18")
        for other, label in (("torch", "PyTorch"), ("nnx", "Flax NNX"))
    ),
    *(
        (
            f"{name}, first step with its compilation, relative to the unsynced loop",
            1.15,
            field(name, "kaun", "first"),
            "1.0",
        )
        for name in ("xor", "mlp", "cnn", "gpt")
    ),
    *(
        (
            f"{name}, first step of a second process with JAX's compile cache, relative to the first process",
            0.5,
            warm(name),
            "",
        )
        for name in ("xor", "mlp", "cnn", "gpt")
    ),
    ("`import kaun` after `import jax`, seconds", 0.1, extra("import", "kaun"), "0.05"),
    ("adam50m, peak memory, relative to the unsynced loop", 1.1, field("adam50m", "kaun", "peak"), ""),
    (
        "adam50m, peak memory, a report at each step, relative to the unsynced loop",
        1.1,
        field("adam50m", "kaun-each", "peak"),
        "",
    ),
    *(
        (f"`{name}`, the slowest of its rows below, relative to the loop by hand", 1.0, slowest("passes", name), "")
        for name in ("evaluate", "predict")
    ),
    ("`fit` over a loader, the slowest of its rows below, relative to the loop by hand", 1.05, slowest("loaders"), ""),
    *(
        (f"checkpoint of 120 MB, {what}, relative to Orbax", bound, to_orbax(what), "")
        for what, bound in (("blocked", 1 / 5), ("saved", 1 / 5), ("restored", 1 / 3))
    ),
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
    """Return the lines of one table for each workload."""
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
        f"| {claim} | {bound:.2f} | {value:.2f} | {'met' if value <= bound else '**not met**'} | {beyond} |"
        for claim, bound, value, beyond in measured
        if value is not None
    ]
    head = ["| target | at most | measured | result | stretch goal |", "|---|---|---|---|---|"]
    return [*head, *rows] if rows else []


def headers(found: Results) -> Iterator[str]:
    """Yield one line for each machine of the sessions, with all the versions that were measured on it."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for session in found["sessions"].values():
        versions = seen.setdefault(session["machine"], {})
        for name, version in session["versions"].items():
            versions.setdefault(name, {})[version] = None
    for machine, versions in seen.items():
        named = (f"{name} {' and '.join(each)}" for name, each in versions.items())
        yield f"Machine: {machine}; {', '.join(named)}."


INTRODUCTION = """\
# Performance

`make bench` measures all figures on this page and writes it. Each runner trains the same model with the same initial
weights on the same batches in the same order, with Adam, in float32, on the CPU. The losses after the first step and at
the end must agree: after the first step to 1e-5, at the end to 2e-3, because rounding differs between libraries and
grows during training. If they do not agree, the page is not written.

Each run is a separate process. It compiles, trains for one pass over the data, and then times further passes. Runs are
interleaved in rounds.

- *Ratio* is a runner's time per step divided by that of the hand-written loop in the same round; the table shows the
  median over the rounds. Effects that slow down the whole machine cancel.
- *First step* includes tracing and compiling.
- *All compiling* is the time of the first step and the first pass together, minus their time when repeated later.
- Keras shuffles with its own key, so it receives its rows in order.
- The hand-written models use JAX's stock operations: convolutions in their default layout, channels first, and
  attention by `einsum`.
- "kaun's loop around the hand-written forward pass" has the same model as the hand-written loop, so it shows the effect
  of the loop. The rows above it also use kaun's layers."""

GROWTH = """\
A dense network (32 inputs, 8 outputs, float32, Adam) is trained while one of its sizes grows: the width of its hidden
layers (128), their number (2), the rows of a batch (64), and the number of devices (1), which are simulated and share
the cores of the machine. The loop by hand is jitted, donates its state, has the gradient's norm as a result and waits
two steps behind, as kaun does.

What `fit` adds to a step does not grow with the width, the depth or the batch, as the "calls" show: the Python
functions that one more step of a run calls, which no other program on the machine changes. Those of `fit` are shared by
the steps of a dispatch. "Adds" is the time that the calling thread takes more than for the loop by hand, the median of
the differences within a round, with a band between the quartiles in the picture. `step` keeps its argument valid, so it
holds one state more, and it looks at every leaf. Memory is the peak of a process whose programs are compiled, beyond
JAX alone."""

PASSES = """\
Against jitted loops that add up on the device and read once (`evaluate`) or read each output (`predict`). "Ragged" data
have a last batch that is one row short, "padded" data the same rows with `pad=True`."""

LOADERS = """\
`fit` over the loaders of other libraries, in batches of 128 rows, against loops that iterate the same loader and train
the same network."""

CHECKPOINTS = """\
A state of 120 MB of noise, saved and restored in one process in turns. "Blocked" is the part of a save after which
training continues. A save ends when the checkpoint is on the disk: kaun and Orbax both wait for it (fsync). Orbax
compresses, here to 111 MB. kaun's files have checksums, and its restore verifies every byte; Orbax's restore returned
other values and no error for each of 40 flipped bits. "file" is the least that is possible: the bytes alone, written,
synced and renamed, and read into memory that JAX takes as it is."""

REPRODUCE = """\
## Run it

```console
$ make bench
$ make bench ALSO=torch
$ make bench ARGS="--quick"
$ make bench ARGS="--only cnn,gpt --runners kaun,nnx"
$ make bench ARGS="--extras growth,checkpoints --only ''"
```

The last two commands measure a part of the benchmarks and replace the same part of the earlier results.
`python -m bench --help` lists all options. `python -m bench.report` writes this page again from the results."""


def write(found: Results, page: Path = PAGE) -> None:
    """Write the page, and its figures in the same folder."""
    picture = draw(found, page.with_name(PICTURE))
    if grown := rows_of_extra(found, "growth"):
        growth.draw(grown, page.with_name(growth.PICTURE))
    page.write_text("\n".join(lines_of(found, picture)) + "\n")


def lines_of(found: Results, picture: bool) -> Iterator[str]:
    yield from (INTRODUCTION, "", *headers(found), "")
    yield from ("## Time per step", "", *tables(found))
    yield from ("## Targets", "", "The targets are measured in the same run:", "", *bars(found), "")
    if picture:
        yield from ("## Time per step against model width", "", f"![Time per step against model width]({PICTURE})", "")
        yield from (*width_rows(found), "")
    yield from sections(found)
    yield from ("## Other costs", "", *others(found), "", "## What limits the speed", "", NOTES.read_text().strip(), "")
    yield REPRODUCE


def width_rows(found: Results) -> Iterator[str]:
    """Yield the values of the figure as a table."""
    names = WORKLOADS[f"width{WIDTHS[0]}"].runners or ()
    yield "| width | " + " | ".join(RUNNERS[name].label for name in names if name != BASE) + " |"
    yield "|---" * len(names) + "|"
    for n in WIDTHS:
        cells = (ratio(found, f"width{n}", name, BASE) for name in names if name != BASE)
        yield f"| {n} | " + " | ".join("" if value is None else f"{value:.2f}" for value in cells) + " |"


def sections(found: Results) -> Iterator[str]:
    """Yield the sections of the extras that have tables."""
    if grown := rows_of_extra(found, "growth"):
        yield from ("## Growth", "", GROWTH, "", f"![Time and memory against the sizes]({growth.PICTURE})", "")
        yield from (*growth.rows(grown), "")
    for name, title, unit in (("passes", "Evaluate and predict", "batch"), ("loaders", "Loaders", "step")):
        if rows := rows_of_extra(found, name):
            yield from (f"## {title}", "", PASSES if name == "passes" else LOADERS, "")
            yield from (f"| | kaun, a {unit} | by hand | ratio |", "|---" * 4 + "|")
            for key, row in rows.items():
                yield f"| {key} | {row['kaun']:,.0f} us | {row['hand']:,.0f} us | {row['ratio']:.2f} |"
            yield ""
    if rows := rows_of_extra(found, "checkpoints"):
        yield from ("## Checkpoints", "", CHECKPOINTS, "")
        yield from ("| | " + " | ".join(checkpoints.WHAT) + " |", "|---" * (1 + len(checkpoints.WHAT)) + "|")
        for key, times in rows.items():
            cells = (f"{median(each[what] for each in times) * 1e3:,.0f} ms" for what in checkpoints.WHAT)
            yield f"| {key} | " + " | ".join(cells) + " |"
        yield ""


def others(found: Results) -> Iterator[str]:
    have = found["extras"]
    if "closures" in have:
        yield f"- Capturing a new loss closure: {have['closures']['microseconds']:.1f} us (median of 1,000)."
    if "import" in have:
        seconds = have["import"]
        kaun, optax = seconds["kaun"], seconds["optax"]
        yield f"- `import kaun` after `import jax`: {kaun:.2f} s; `import optax` alone: {optax:.2f} s."
    yield "- JAX can keep compiled programs from one process to the next. To enable this, set two environment"
    yield "  variables; your program does not change. The second variable includes programs with short compile times,"
    yield "  which JAX does not cache by default."
    yield "\n  ```text"
    yield "  JAX_COMPILATION_CACHE_DIR=~/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 python train.py"
    yield "  ```\n"
    for name, times in have.get("cache", {}).items():
        if name != "session":
            cold, again = median(times["cold"]), median(times["warm"])
            where = f"{cold:.2f} s in the process that fills the cache, {again:.2f} s in the next"
            yield f"  - First step of {name}: {where}."
    yield "- XLA reads its flags when a process starts; kaun does not set any. One flag changes loops over little data"
    yield "  and so affects very small models. `compiler_options` of `jax.jit`, for one program, do not take it:"
    yield f"\n  ```text\n  XLA_FLAGS={FLAG} python train.py\n  ```\n"
    for name, times in have.get("flag", {}).items():
        if name != "session":
            without, given = (median(times[key]) * 1e6 for key in ("without", "with"))
            yield f"  - xor, {RUNNERS[name].label}: {without:.1f} us per step without it, {given:.1f} us with it."


def draw(found: Results, path: Path) -> bool:
    """Draw time per step against width on logarithmic scales. Return whether there were values to draw."""
    names = WORKLOADS[f"width{WIDTHS[0]}"].runners or ()
    lines = {
        name: [(n, seconds * 1e6) for n in WIDTHS if (seconds := results.median(found, f"width{n}", name, "step"))]
        for name in names
    }
    if not any(lines.values()):
        return False
    import matplotlib

    # No date and no random identifiers, so that equal results give equal files.
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
        raise SystemExit(f"{file.name} does not exist: run `make bench` first")
    write(results.load(file))

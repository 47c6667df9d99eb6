"""Every fenced code block of README.md, docs/*.md and the other Markdown files is executed, or checked, or refused.

What a block's info string means:

    python                       runs; the blocks of one file run in order and share their names, as one program would
    python raises=CaptureError   runs and must end in an exception of exactly that type
    python needs=flax            runs where that package of OPTIONAL is installed; elsewhere the rest of the page runs, and
                                 its test is reported as skipped, with the lines that were not run
    text output                  what the python block before it printed, compared as doctest does (`...` stands for
                                 anything, runs of white space are equal); for a block that raises, the last line is the
                                 exception as a traceback shows it, `CaptureError: the message`. A line number behind
                                 the name of a file, `page.md:12`, and an address, `0x7f12`, may be another one
    text output within=5%        the same, but each number with a decimal point may differ by 5 % from the page's
    text output within=any       the same, but each number may be any number: times, and what depends on the machine
    console                      not run, but each `$ make x` must name a target and each `$ python x.py` a file
    text                         not run

Nothing else is allowed, so no block escapes by a typo, and there is no other way to skip one. Blocks run as users run them:
JAX's default promotion rules, and a working directory of their own. Warnings are errors.
"""

import contextlib
import dataclasses
import doctest
import importlib.util
import io
import math
import re
import sys
import textwrap
import types
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = object()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*(.*?)[ \t]*$")
PYTHON = re.compile(r"python(?: needs=(?P<needs>\w+))?(?: raises=(?P<raises>\w+))?")
OUTPUT = re.compile(r"text output(?: within=(?P<within>any|\d+%))?")
OPTIONAL = {"datasets", "equinox", "flax", "grain", "haiku", "mlflow", "optuna", "torch", "wandb"}


@dataclasses.dataclass
class Block:
    """A fenced block: what stands after the opening fence, the text inside, and the line where that text starts."""

    info: str
    text: str
    line: int


def blocks_of(text):
    """The fenced blocks of a Markdown text, in order. A fence closes with at least as many of its own characters."""
    blocks, inside, fence = [], None, ""
    for number, line in enumerate(text.splitlines(), start=1):
        match = FENCE.match(line)
        if inside is None and match:
            inside, fence = Block(info=match[3], text="", line=number + 1), match[2]
        elif match and match[2].startswith(fence) and not match[3]:
            inside.text = textwrap.dedent(inside.text)
            blocks.append(inside)
            inside = None
        elif inside is not None:
            inside.text += line + "\n"
    assert inside is None, f"the block opened at line {inside.line - 1} is never closed"
    return blocks


def run_page(path):
    """Runs and checks the blocks of one Markdown file; the first that is wrong fails, naming its line.

    The blocks whose packages are missing are skipped after all others have passed.
    """
    module = types.ModuleType(f"page_{path.stem.replace('-', '_')}")
    # A page is its user's program: classes defined there, for one, are looked up in their module.
    sys.modules[module.__name__] = module
    printed, skipped = None, []
    try:
        for block in blocks_of(path.read_text()):
            if block.info.split(" ")[0] == "python":
                missing = missing_package(path, block)
                skipped += [f"{missing} for line {block.line}"] * bool(missing)
                printed = SKIPPED if missing else run_python(path, block, module.__dict__)
            elif OUTPUT.fullmatch(block.info) and printed is SKIPPED:
                printed = None
            elif OUTPUT.fullmatch(block.info):
                compare(path, block, printed)
                printed = None
            else:
                check_inert(path, block)
                printed = None
    finally:
        del sys.modules[module.__name__]
    if skipped:
        pytest.skip(f"{path.name} needs {', '.join(skipped)}; its other blocks ran")


def missing_package(path, block):
    """The package that a python block needs, where it is not installed."""
    info = PYTHON.fullmatch(block.info)
    assert info and info["needs"] in {None, *OPTIONAL}, unknown(path, block)
    return info["needs"] if info["needs"] and importlib.util.find_spec(info["needs"]) is None else None


def run_python(path, block, namespace):
    """What the block printed, and the exception it was to raise."""
    expected = PYTHON.fullmatch(block.info)["raises"]
    # The blank lines put the block's own lines where they stand in the file, for tracebacks and error messages.
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
    except Exception as err:
        if not expected or type(err).__name__ != expected:
            raise
        return f"{out.getvalue()}{type(err).__name__}: {err}\n"
    assert not expected, f"{path.name}:{block.line}: the block was to raise {expected} and did not"
    return out.getvalue()


def compare(path, block, printed):
    where = f"{path.name}:{block.line}"
    assert printed is not None, f"{where}: a `text output` block must follow a python block directly"
    said = re.sub(r"(\.(?:md|py):|\b0x)[\da-f]+", r"\1...", block.text)
    seen = with_numbers_of(said, printed, OUTPUT.fullmatch(block.info)["within"])
    same = doctest.OutputChecker().check_output(said, seen, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert same, f"{where}: the page says\n{block.text}\nand the block before printed\n{printed}"


def with_numbers_of(said, printed, within):
    """What was printed, with the page's number for each that is as near to it as the block allows."""
    if within is None:
        return printed
    number = re.compile(r"-?\d+(?:\.\d+)?" if within == "any" else r"-?\d+\.\d+")
    near = math.inf if within == "any" else float(within.rstrip("%")) / 100
    ours, theirs = number.findall(printed), number.findall(said)
    if len(ours) != len(theirs):
        return printed
    pairs = zip(ours, theirs, strict=True)
    chosen = iter([b if abs(float(a) - float(b)) <= near * abs(float(b)) else a for a, b in pairs])
    return number.sub(lambda _: next(chosen), printed)


def check_inert(path, block):
    where = f"{path.name}:{block.line}"
    if block.info == "console":
        targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        for target in re.findall(r"^\$ make ([\w-]+)", block.text, flags=re.MULTILINE):
            assert target in targets, f"{where}: the Makefile has no target {target!r}, only {sorted(targets)}"
        for script in re.findall(r"^\$ python3? (\S+\.py)", block.text, flags=re.MULTILINE):
            assert (ROOT / script).is_file(), f"{where}: there is no {script}"
    else:
        assert block.info == "text", unknown(path, block)


def unknown(path, block):
    return (
        f"{path.name}:{block.line - 1}: a block with {block.info!r} after its fence is none of python, "
        f"python raises=NameOfError, python needs=package ({', '.join(sorted(OPTIONAL))}), text output, "
        "text output within=5%, text output within=any, console, text"
    )


@pytest.fixture
def as_users_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(path, as_users_do):
    run_page(path)


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {path.name for path in PAGES}


def page(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(textwrap.dedent(text))
    return path


GOOD = """
    # A page

    ```python
    import dataclasses, jax.numpy as jnp

    @dataclasses.dataclass
    class Point:
        x: "int"
    ```

    - In a list, and using the names from above:

      ```python
      print(Point(x=1))
      print(jnp.ones(2) + jnp.arange(2))
      ```

      ```text output
      Point(x=1)
      [1. ...]
      ```

    ```python raises=ValueError
    print("before")
    raise ValueError("no such thing as 3")
    ```

    ```text output
    before
    ValueError: no such thing as ...
    ```

    ```console
    $ make test
    ```

    ````text
    ```python
    not run
    ```
    ````
"""


def test_a_good_page_passes(tmp_path, as_users_do):
    run_page(page(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("old", "new", "error", "text"),
    [
        ("x=1", "x=1 / 0", ZeroDivisionError, "division"),
        ("[1. ...]", "[2. ...]", AssertionError, r"page\.md:20: the page says\s+Point.x=1.\s+\[2\. \.\.\.\]"),
        ("Point(x=1)\n      [1", "[1", AssertionError, r"printed\s+Point\(x=1\)"),
        (
            'raise ValueError("no such thing as 3")',
            "",
            AssertionError,
            r"page\.md:25: .* to raise ValueError and did not",
        ),
        ("raises=ValueError", "raises=TypeError", ValueError, "no such thing"),
        ("raises=ValueError", "", ValueError, "no such thing"),
        (
            "raises=ValueError",
            "raise=ValueError",
            AssertionError,
            r"page\.md:24: a block with 'python raise=ValueError'",
        ),
        ("thing as ...", "thing as 4", AssertionError, "ValueError: no such thing as 3"),
        ("make test", "make tset", AssertionError, "no target 'tset'"),
        ("make test", "python examples/none.py", AssertionError, "no examples/none.py"),
        ("console", "bash", AssertionError, "a block with 'bash'"),
        ("````text", "````", AssertionError, "a block with ''"),
        ("console", "text output", AssertionError, "must follow a python block directly"),
        ("    ```\n    ````\n", "", AssertionError, "opened at line 38 is never closed"),
    ],
)
def test_a_bad_page_fails(tmp_path, as_users_do, old, new, error, text):
    assert GOOD.count(old) >= 1
    with pytest.raises(error, match=f"(?s){text}"):
        run_page(page(tmp_path, GOOD.replace(old, new)))


NEEDY = """
    ```python needs=haiku
    x = undefined
    ```

    ```text output
    not compared
    ```

    ```python
    print("ran")
    ```

    ```text output
    ran
    ```
"""


def test_a_block_whose_package_is_missing_is_skipped_and_told(tmp_path, as_users_do, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "haiku" else found(name))
    with pytest.raises(pytest.skip.Exception, match=r"^page\.md needs haiku for line 3; its other blocks ran$"):
        run_page(page(tmp_path, NEEDY))
    with pytest.raises(AssertionError, match=r"the page says\s+walked"):
        run_page(page(tmp_path, NEEDY.replace("    ran", "    walked")))
    with pytest.raises(AssertionError, match="a block with 'python needs=haiku2'"):
        run_page(page(tmp_path, NEEDY.replace("haiku", "haiku2")))
    with pytest.raises(pytest.skip.Exception, match="needs haiku for line 3"):
        run_page(page(tmp_path, NEEDY.replace("needs=haiku", "needs=haiku raises=NameError")))


def test_a_block_whose_package_is_there_runs(tmp_path, as_users_do, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(NameError, match="undefined"):
        run_page(page(tmp_path, NEEDY))
    with pytest.raises(AssertionError, match=r"the page says\s+not compared"):
        run_page(page(tmp_path, NEEDY.replace("undefined", "1")))


NUMBERS = """
    ```python
    print("step 3, loss 0.412, -0.31")
    ```

    ```text output within=5%
    step 3, loss 0.400, -0.30
    ```
"""


@pytest.mark.parametrize(
    ("old", "new", "right"),
    [
        ("0.400", "0.400", True),
        ("0.400", "0.380", False),
        ("-0.30", "0.30", False),
        ("step 3, loss 0.400", "step 4, loss 0.400", False),
        ("step 3, loss 0.400", "loss 0.400", False),
        ("0.400, -0.30", "0.400", False),
        ("within=5%", "within=1%", False),
        ("within=5%", "within=any", True),
        ("within=5%\n    step 3, loss 0.400, -0.30", "within=any\n    step 7, loss 9.1, 4", True),
        ("within=5%\n    step 3, loss 0.400, -0.30", "within=any\n    step 7, loss, 4", False),
        ("within=5%", "within=much", False),
    ],
)
def test_numbers_of_a_page_are_near_those_that_were_printed(tmp_path, as_users_do, old, new, right):
    assert NUMBERS.count(old) == 1
    failure = contextlib.nullcontext() if right else pytest.raises(AssertionError, match=r"the page says|a block with")
    with failure:
        run_page(page(tmp_path, NUMBERS.replace(old, new)))


def test_the_line_of_a_file_and_an_address_may_be_another_one(tmp_path, as_users_do):
    lines = "```python\nprint('<lambda> (page.md:7) x:3 0xff')\n```\n\n```text output\n<lambda> (page.md:12) x:3 0x7f12\n```"
    run_page(page(tmp_path, lines))
    with pytest.raises(AssertionError, match="the page says"):
        run_page(page(tmp_path, lines.replace("12) x:3", "12) x:4")))


def test_a_warning_fails_a_page(tmp_path, as_users_do):
    with pytest.raises(UserWarning, match="deprecated thing"):
        run_page(page(tmp_path, "```python\nimport warnings\nwarnings.warn('deprecated thing')\n```"))


def test_an_error_on_a_page_is_reported_at_its_line(tmp_path, as_users_do):
    path = page(tmp_path, "Text.\n\n```python\nx = 1\nraise KeyError(x)\n```")
    with pytest.raises(KeyError) as caught:
        run_page(path)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (path, 5)

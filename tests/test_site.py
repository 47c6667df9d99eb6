"""The documentation site: what .ci/site.py adds to docs/, that its pages are found, and that they name everything public.

`make lint` builds the site, with each warning of MkDocs as an error: a link, an anchor or a page that is missing.
"""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.fixture(scope="module")
def site(module_at):
    return module_at(ROOT / ".ci" / "site.py")


@pytest.fixture(scope="module")
def public(module_at):
    return module_at(ROOT / "tests" / "test_house.py").PUBLIC


def test_the_reference_has_each_public_name(site, public):
    assert sorted(site.MODULES) == sorted(public)
    for module in site.MODULES:
        names = {name for name in public[module] if f"{module}.{name}" not in public and name != "__version__"}
        large = {name.rpartition(".")[2] for name in site.LARGE if name.rpartition(".")[0] == module}
        assert set(site.public_names(module)) == names
        listed = re.search(r"members: (\[.*\])", site.reference()[f"reference/{module}.md"])[1]
        assert set(re.findall(r"'(\w+)'", listed)) == names - large
    assert all(f"::: {name}\n" in site.reference()[f"reference/{name}.md"] for name in site.LARGE)


def test_every_module_example_and_notebook_is_a_page_that_the_menu_or_an_index_has(site):
    menu = (ROOT / "mkdocs.yml").read_text()
    assert not [page for page in site.reference() if f": {page}\n" not in menu]
    assert not [page for page in site.notebooks() if page.endswith(".md") and f": {page}\n" not in menu]
    index = site.examples()["examples/index.md"]
    examples = [path.relative_to(ROOT / "examples") for path in ROOT.glob("examples/**/*.py")]
    assert examples and not [path for path in examples if f"({path.with_suffix('.md').as_posix()})" not in index]


def on_page(site, path, markdown):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=path))
    return site.on_page_markdown(markdown, page, None, None)


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("index.md", "[a](docs/data.md#stages)", "[a](data.md#stages)"),
        ("index.md", "[a](examples/xor.py), [b](LICENSE)", "[a](examples/xor.md), [b](license.md)"),
        ("data.md", "[a](#stages), [b](https://jax.dev/x.md)", "[a](#stages), [b](https://jax.dev/x.md)"),
        ("data.md", "[a](../examples/models/vit.py)", "[a](examples/models/vit.md)"),
        ("data.md", "![a](picture.svg)", "![a](picture.svg)"),
        ("data.md", "[a](../CONTRIBUTING.md#what-is-public)", "[a](contributing.md#what-is-public)"),
        ("notebooks/project.md", "[a](fine-tuning.ipynb)", "[a](fine-tuning.md)"),
        ("notebooks/project.md", "[a](../layers.md)", "[a](../layers.md)"),
        ("examples/index.md", "[a](models/vit.md)", "[a](models/vit.md)"),
        ("data.md", "```python needs=flax raises=ValueError\nx\n```", "```python\nx\n```"),
        ("data.md", "  ```text output within=5%\n  x\n  ```", "  ```{.text .output}\n  x\n  ```"),
        ("data.md", "```text\nx\n```", "```text\nx\n```"),
    ],
)
def test_links_and_fences_become_those_of_the_site(site, page, before, after):
    assert on_page(site, page, before).splitlines()[: after.count("\n") + 1] == after.splitlines()


def test_the_page_of_a_notebook_has_code_outputs_pictures_and_the_notebook(site):
    pages = site.notebooks()
    text = on_page(site, "notebooks/project.md", pages["notebooks/project.md"])
    assert text.startswith("# A project") and "```python\nclass_weights" in text
    assert re.search(r"```\{\.text \.output\}\naccuracy 0\.\d+ on the validation data", text)
    picture = re.search(r"!\[.*\]\((project-\d+\.svg)\)", text)[1]
    assert "<svg" in pages[f"notebooks/{picture}"] and text.endswith("[Download this notebook](project.ipynb)\n")


def test_a_docstring_becomes_prose_and_commands(site):
    text = "Some text.\n\nRun it with: python a.py\n         or: python a.py -x\n\n    make b\n\nMore."
    kept = "```text\nRun it with: python a.py\n         or: python a.py -x\n```\n\n```text\nmake b\n```\n"
    assert site.prose(text) == f"Some text.\n\n{kept}\nMore.\n"


def test_getting_started_ends_with_links_to_all_pages():
    end = (ROOT / "docs" / "getting-started.md").read_text().partition("\n## Next\n")[2]
    linked = set(re.findall(r"\]\(([\w/.-]+)", end))
    docs = {
        path.relative_to(ROOT / "docs").as_posix() for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.ipynb")]
    }
    assert len(docs) > 20 and docs - linked == {"getting-started.md"}


def tables(page):
    """The code in the first columns of a page's tables."""
    text = (ROOT / "docs" / page).read_text()
    return " ".join(
        code for row in re.findall(r"^\| *(`.*?) *\|", text, re.MULTILINE) for code in re.findall(r"`(.*?)`", row)
    )


@pytest.mark.parametrize(
    ("page", "module", "others"),
    [
        ("training.md", "kaun.losses", {"Mean"}),
        ("training.md", "kaun.metrics", {"Counted", "Tracker", "evaluate", "evaluate_many"}),
    ],
)
def test_the_tables_have_all_losses_and_metrics(public, page, module, others):
    named = set(re.findall(r"\w+", tables(page)))
    assert public[module] - named == others


def test_install_lines_name_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [*PAGES, *ROOT.glob("docs/**/*.ipynb"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("src/**/*.py")]
    texts = {path: path.read_text().replace('\\"', '"') for path in sources}
    lines = [line for text in texts.values() for line in re.findall(r'pip install "\.\[([\w,]+)\]"', text)]
    named = {name for line in lines for name in line.split(",")}
    assert {"plot", "flax", "examples"} <= named <= set(extras)
    assert not [path for path, text in texts.items() if re.search(r"pip install \"?kaun", text)]

"""What `make docs` adds to the pages of docs/: a hook of MkDocs, which mkdocs.yml names.

- Pages made of what is in the repository already: the README as the first page, an API reference with a page for each
  public module, the examples with their code, notebooks with their stored outputs, the files at the root that pages
  link to.
- Links to files outside of docs/ lead to these pages.
- The words after the fences of code blocks, which are for tests/test_docs.py, become what MkDocs knows.
- After the build: each public name must have its entry in the reference.
"""

import ast
import json
import posixpath
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"

# Files of the repository, and the pages that they are on the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "citation.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
    "SECURITY.md": "security.md",
}
FOLDERS = {"examples": "examples/index.md"}
# The modules with public names; each is a page of the reference. The names of `kaun` itself are on one page but for the
# classes with many methods.
MODULES = [
    "kaun", "kaun.averages", "kaun.checkpoint", "kaun.errors", "kaun.grad", "kaun.interop", "kaun.interop.safetensors",
    "kaun.layers", "kaun.losses", "kaun.metrics", "kaun.reports", "kaun.rng", "kaun.sharding",
]  # fmt: skip
LARGE = ["kaun.Trainer", "kaun.Data", "kaun.Ensemble", "kaun.reports.Report"]
# What fit calls is described once, in the interface `Report`, and left out of the reports that implement it.
FILTERS = {"kaun.reports": ["!^_", "!^(begin|block|compiling|end|observe|restore|snapshot|wants)$"]}


def public_names(module: str) -> list[str]:
    """The public names of a module without the modules among them: its `__all__`, or what it imports `x as x`."""
    path = SRC.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    imported = [alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names = listed[0] if listed else filter(None, imported)
    return sorted(name for name in names if f"{module}.{name}" not in MODULES and not name.startswith("_"))


def reference() -> dict[str, str]:
    """The pages of the API reference, as Markdown by path."""
    pages = {f"reference/{module}.md": reference_of(module) for module in MODULES}
    for name in LARGE:
        pages[f"reference/{name}.md"] = f"# {name}\n\n::: {name}\n    options:\n      inherited_members: true\n"
    return pages


def reference_of(module: str) -> str:
    large = [name for name in LARGE if name.rpartition(".")[0] == module]
    names = [name for name in public_names(module) if f"{module}.{name}" not in large]
    pages = [name for name in [*large, *MODULES] if name.rpartition(".")[0] == module]
    filters = FILTERS.get(module)
    links = "".join(f"- [{name}]({name}.md)\n" for name in pages)
    return (
        f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
        f"      members: {names}\n      summary: true\n"
        + (f"      filters: {filters}\n\n" if filters else "\n")
        + (f"On pages of their own:\n\n{links}" if links else "")
    )


def examples() -> dict[str, str]:
    """A page for each example, with what its docstring says and its code, and one that lists them."""
    pages, rows = {}, []
    for path in sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/models/*.py")]):
        text = path.read_text()
        said = ast.get_docstring(ast.parse(text)) or ""
        name = path.relative_to(ROOT).as_posix()
        code = text[text.index('"""', 3) + 3 :].strip() if said else text
        pages[page_of(name)] = f"# {name}\n\n{prose(said)}\n\n```python\n{code}\n```\n"
        rows.append(f"- [{name}]({page_of(name).removeprefix('examples/')}): {said.splitlines()[0] if said else ''}")
    pages["examples/index.md"] = "# Examples\n\nPrograms that run as they are.\n\n" + "\n".join(rows) + "\n"
    return pages


def notebooks() -> dict[str, str]:
    """A page for each notebook, with its stored outputs; its pictures are files beside it."""
    pages = {}
    for path in sorted(ROOT.glob("docs/notebooks/*.ipynb")):
        parts = []
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            source = "".join(cell["source"])
            parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
            for output in cell.get("outputs", ()):
                data = output.get("data", {"text/plain": output.get("text")})
                if "image/svg+xml" in data:
                    picture = f"{path.stem}-{number}.svg"
                    pages[f"notebooks/{picture}"] = "".join(data["image/svg+xml"])
                    parts.append(f"![What the cell above draws]({picture})")
                else:
                    parts.append(f"```text output\n{''.join(data['text/plain']).rstrip()}\n```")
        pages[f"notebooks/{path.stem}.md"] = "\n\n".join(parts) + "\n"
    return pages


def prose(docstring: str) -> str:
    """A docstring as Markdown: how to run it, and what is indented, stay as they are."""
    kept = lambda found: f"```text\n{textwrap.dedent(found[0])}```\n"
    return re.sub(r"(?m)^Run it with: .*\n(?: .*\n)*|(?:^    .*\n)+", kept, docstring + "\n")


def root_page(file: str) -> str:
    text = (ROOT / file).read_text()
    return text if file.endswith(".md") else f"# {file}\n\n```text\n{text}```\n"


def page_of(file: str) -> str:
    """The page of a file of the repository that is named from its root."""
    if page := ROOT_PAGES.get(file) or FOLDERS.get(file):
        return page
    path, suffix = posixpath.splitext(file.removeprefix("docs/"))
    return path + (".md" if suffix in (".ipynb", ".py") else suffix)


def on_files(files, config):
    from mkdocs.structure.files import File  # here, since the tests of this file need no MkDocs

    made = {page: root_page(file) for file, page in ROOT_PAGES.items()}
    for path, text in {**made, **reference(), **examples(), **notebooks()}.items():
        files.append(File.generated(config, path, content=text))
    return files


LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^([ \t]*)(`{3,})(python|text)( [^`\n]+)$", re.MULTILINE)


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    source = {page: file for file, page in ROOT_PAGES.items()}.get(here, f"docs/{here}")

    def moved(link):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        inside = here.startswith(("reference/", "examples/"))
        path = link[1] if inside else posixpath.relpath(page_of(target), posixpath.dirname(here) or ".")
        return path + (link[2] or "")

    def fence(found):
        kind = "{.text .output}" if found[4].startswith(" output") else found[3]
        return f"{found[1]}{found[2]}{kind}"

    markdown = FENCE.sub(fence, LINK.sub(moved, markdown))
    if here.startswith("notebooks/"):
        markdown += f"\n[Download this notebook]({posixpath.basename(here).removesuffix('.md')}.ipynb)\n"
    return markdown


def on_post_build(config):
    """Every public name must have an entry: an element with the name as its id."""
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    missing = []
    for module in MODULES:
        for name in public_names(module):
            whole = f"{module}.{name}"
            text = (site / "reference" / f"{whole if whole in LARGE else module}.html").read_text()
            missing += [whole] * (f'id="{whole}"' not in text)
    if missing:
        raise PluginError(f"The API reference has no entry for {', '.join(missing)}.")

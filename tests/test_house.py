"""The rules of the house: imports run one way, sizes, the public names and their docs, and what no file may hold."""

import ast
import fnmatch
import functools
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "kaun"

# The floor plan: each package or module of the root, from the row that imports nothing of kaun to those that users call.
# Imports run from a row to those above it in this list; packages of one row do not import each other.
ROWS = [
    {
        "_cache",
        "_calls",
        "_html",
        "_jax",
        "_jax_work",
        "_kernels",
        "_messages",
        "_paths",
        "_processes",
        "errors",
        "rng",
        "tree",
    },
    {"context", "grad", "losses", "sharding"},
    {"averages", "layers", "metrics"},
    {"_loss"},
    {"_step", "data", "state"},
    {"_engine", "_report", "checkpoint"},
    {"_run", "evaluation", "interop"},
    {"train"},
    {"ensemble"},
    {"diagnose", "reports"},
]
# Modules of one row that stand on each other, which a row of single modules cannot avoid.
WITHIN_A_ROW = {
    ("_cache", "_calls"),
    ("_calls", "_messages"),
    ("rng", "_calls"),
    ("_calls", "tree"),
    ("_messages", "_jax"),
    ("_jax_work", "_jax"),
    ("_messages", "errors"),
    ("_processes", "_jax"),
    ("_processes", "_messages"),
    ("_processes", "errors"),
    ("rng", "_messages"),
    ("_kernels", "_jax"),
    ("rng", "errors"),
    ("rng", "tree"),
    ("tree", "_jax"),
    ("rng", "_jax"),
}
# A class in some modules: the part that its other part inherits from names the whole, for the type checker alone.
PARTS_OF_A_CLASS = {(f"data.{part}", "data.pipeline") for part in ("base", "placed", "sources")}
# Packages of kaun's own: nothing but what their __init__ lists is imported from outside.
ROOMS = {
    "_calls",
    "_engine",
    "_kernels",
    "_loss",
    "_processes",
    "_run",
    "_step",
    "checkpoint",
    "data",
    "ensemble",
    "evaluation",
    "metrics",
}

# The vocabulary. A new name belongs here, in the docs and in the changelog.
PUBLIC = {
    "kaun": {
        "Context", "Data", "EarlyStop", "Ensemble", "Layer", "TrainState", "Trainer", "Vars", "__version__",
        "averages", "cache", "checkpoint", "errors", "explain", "grad", "interop", "layers", "losses", "lr_range", "metrics",
        "reports", "rng", "sharding", "summary",
    },
    "kaun.averages": {"ema", "from_optimizer", "swa", "update_statistics"},
    "kaun.checkpoint": {"Directory", "ResumeMismatch", "load", "save"},
    "kaun.errors": {
        "CaptureError", "EarlyStop", "FailedElsewhere", "Locked", "MissingContext", "NonFiniteLoss",
        "RecompilationWarning", "ResumeMismatch", "Unavailable",
    },
    "kaun.grad": {"grad", "value_and_grad"},
    "kaun.interop": {"equinox", "export", "flax_nnx", "haiku", "linen", "safetensors"},
    "kaun.interop.safetensors": {
        "Rule", "copy", "drop", "into", "load", "rename", "save", "split", "stack", "transpose",
    },
    "kaun.layers": {
        "Float", "Int", "Layer", "Module", "Vars", "activation", "avg_pool1d", "avg_pool2d", "batch_norm",
        "bidirectional", "compose", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "drop_path",
        "dropout", "elu", "embedding", "flatten", "fn", "from_function", "gelu", "global_avg_pool", "global_max_pool",
        "glu", "group_norm", "gru", "instance_norm", "is_lora", "layer_norm", "leaky_relu", "linear", "log_softmax",
        "lora", "lstm", "max_pool1d", "max_pool2d", "merge_lora", "mish", "module", "multi_head_attention",
        "parameter", "positions", "relu", "remat", "repeat", "residual", "rms_norm", "rnn", "rope", "selu", "sequential", "sigmoid",
        "silu", "sinusoidal_positions", "softmax", "softplus", "spatial_dropout", "swiglu", "tanh", "upsample2d",
    },
    "kaun.losses": {
        "Mean", "binary_cross_entropy", "cosine_distance", "cross_entropy", "cross_entropy_sparse", "ctc", "focal",
        "gaussian_nll", "hinge", "huber", "info_nce", "kl_divergence", "log_cosh", "mae", "mse", "poisson_nll", "triplet",
    },
    "kaun.metrics": {
        "Counted", "Tracker", "accuracy", "auc", "average_precision", "binary_accuracy", "confusion_matrix", "evaluate",
        "evaluate_many", "f1", "mean_absolute_error", "mean_iou", "perplexity", "precision", "r2", "recall", "rmse",
        "top_k_accuracy",
    },
    "kaun.reports": {
        "EarlyStopping", "History", "Report", "ReportFunction", "Validation", "all_of", "csv", "each_epoch",
        "early_stopping", "every", "history", "jsonl", "learning_rate", "mlflow", "plot", "progress", "tensorboard",
        "time_limit", "validate", "wandb", "Watch", "watch", "Profile", "profile", "prune", "throughput",
    },
    "kaun.rng": {"next_key", "scope"},
    "kaun.sharding": {"Sharding", "by_path", "data_parallel", "fsdp", "members", "mesh", "put"},
}  # fmt: skip

# They mean something to the type checker only, so there is nothing to run.
FOR_THE_CHECKER = {"Float", "Int", "Report"}
# JAX's names, called by JAX.
PYTREE_PROTOCOL = {"tree_flatten", "tree_flatten_with_keys", "tree_unflatten"}

OPTIONAL = {
    "IPython", "datasets", "equinox", "flax", "grain", "haiku", "matplotlib", "mlflow", "optuna", "orbax", "pandas", "rich",
    "safetensors", "sklearn", "tensorboardX", "torch", "tqdm.auto", "tqdm.notebook", "wandb",
}  # fmt: skip


def module_name(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "kaun"


MODULES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


@functools.cache
def parsed(path):
    """The syntax tree of a file; half a second of CPU for all of kaun."""
    return ast.parse(path.read_text())


def room(module):
    """The package of a module, or the module itself where it lies at the root."""
    return module.split(".")[0]


def row(module):
    return next((i for i, names in enumerate(ROWS) if room(module) in names), None)


def listed(package):
    """What the ``__init__`` of a package lists: there ``matmul`` is the function, and not the module of that name."""
    path = MODULES.get(package.removeprefix("kaun."))
    if path is None or path.name != "__init__.py" or path.parent == SRC:
        return set()
    nodes = [node for node in parsed(path).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname for node in nodes for alias in node.names}


def imports_of(path):
    """The modules of kaun that a file imports, wherever in the file it does: in a function, or for the type checker."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; write from kaun..."
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                named = inner.removeprefix("kaun.") in MODULES and alias.name not in listed(node.module)
                found.add(inner if named else node.module)
    return {name.removeprefix("kaun.") for name in found if name.split(".")[0] == "kaun"}


@functools.cache
def all_imports():
    """By module; found by the first test that asks, and not by each worker that collects these tests."""
    return {name: imports_of(path) for name, path in MODULES.items()}


def test_every_module_has_its_row():
    unplaced = {room(name) for name in MODULES if row(name) is None and name != "kaun"}
    assert not unplaced, f"put {unplaced} into ROWS in tests/test_house.py"


def test_imports_run_from_a_row_to_those_above_it():
    wrong = [
        f"{a} imports {b}"
        for a in MODULES
        for b in all_imports()[a]
        if a != "kaun" and room(a) != room(b) and row(b) >= row(a) and (room(a), room(b)) not in WITHIN_A_ROW
    ]
    assert not wrong


@pytest.mark.parametrize(("part", "whole"), sorted(PARTS_OF_A_CLASS))
def test_the_part_of_a_class_imports_the_whole_for_the_type_checker_alone(part, whole):
    module = importlib.import_module(f"kaun.{part}")
    names = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == f"kaun.{whole}"}
    assert not names and whole in all_imports()[part]


def test_no_import_cycle():
    def visit(name, trail):
        assert name not in trail, f"an import cycle: {' > '.join((*trail, name))}"
        if name not in done:
            for other in all_imports()[name] - {"kaun", name}:
                if (name, other) not in PARTS_OF_A_CLASS:
                    visit(other, (*trail, name))
            done.add(name)

    done = set()
    for name in MODULES:
        visit(name, ())


def test_nothing_imports_the_adapters():
    # But the root, when its attribute is first read: a test below looks that `import kaun` does not.
    others = [name for name in MODULES if room(name) != "interop" and name != "kaun"]
    assert not [name for name in others if "interop" in map(room, all_imports()[name])]


def test_rooms_are_entered_by_their_door():
    inside = [
        f"{a} imports {b}"
        for a in MODULES
        for b in all_imports()[a]
        if room(b) in ROOMS and room(a) != room(b) and b != room(b)
    ]
    assert not inside


def test_the_root_is_short():
    root = [name for name, path in MODULES.items() if path.parent == SRC and path.name != "__init__.py"]
    assert len(root) <= 16


def body_lines(function):
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def functions():
    for name, path in MODULES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def test_functions_fit_on_a_screen():
    long = [f"{name}:{f.lineno} {f.name}: {body_lines(f)} lines" for name, f in functions() if body_lines(f) > 50]
    assert not long


def test_fit_fits_on_half_a_screen():
    *_, fit = [f for name, f in functions() if (name, f.name) == ("train", "fit")]
    assert body_lines(fit) <= 30


def test_modules_are_short():
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: n for name, n in lines.items() if n > 400}


def test_every_room_has_its_tests():
    folders = {room(name).strip("_") for name, path in MODULES.items() if path.parent != SRC}
    files = {name for name, path in MODULES.items() if path.parent == SRC and not name.startswith("_")} - {"kaun"}
    assert not [name for name in folders if not list((ROOT / "tests" / name).glob("test_*.py"))]
    assert not [name for name in files if not (ROOT / "tests" / f"test_{name}.py").is_file()]


def exports(module):
    """The public names of a module: its ``__all__``, or for a package what its ``__init__`` imports ``x as x``."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    nodes = parsed(Path(module.__file__)).body
    aliases = [a for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names]
    return {alias.asname for alias in aliases if alias.asname and not alias.asname.startswith("_")}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_names_are_the_vocabulary(name):
    module = importlib.import_module(name)
    assert sorted(exports(module)) == sorted(PUBLIC[name])
    assert not [n for n in PUBLIC[name] if not hasattr(module, n)]


def test_dir_shows_the_public_names_alone():
    assert dir(importlib.import_module("kaun")) == sorted(PUBLIC["kaun"])


def public_objects():
    for name in PUBLIC:
        module = importlib.import_module(name)
        for public in sorted(PUBLIC[name]):
            value = getattr(module, public)
            if callable(value):
                yield f"{name}.{public}", value


def public_methods(value):
    """The public methods and properties that a class itself defines, by name; nothing for a function."""
    return {
        attribute: member
        for attribute, member in (vars(value).items() if inspect.isclass(value) else ())
        if isinstance(member, classmethod | staticmethod | property) or callable(member)
        if not attribute.startswith("_") and attribute not in PYTREE_PROTOCOL
    }


def test_every_public_name_has_an_example():
    without = [
        name
        for name, value in public_objects()
        if name.split(".")[-1] not in FOR_THE_CHECKER
        if not any(">>> " in (v.__doc__ or "") for v in (value, *public_methods(value).values()))
    ]
    assert not without


def test_every_public_method_has_a_docstring():
    methods = {f"{name}.{a}": m for name, value in public_objects() for a, m in public_methods(value).items()}
    assert {"kaun.Trainer.fit", "kaun.Data.map", "kaun.Data.stack", "kaun.Layer.init"} <= set(methods)
    assert not [name for name, method in methods.items() if not method.__doc__]


SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Examples")


def docstrings(source):
    """The line and the text of each docstring of a file: of modules, classes, functions and variables."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, inspect.cleandoc(node.value.value)


def wrong_sections(source):
    """The lines of a file's docstrings that do not render: other headers, empty sections, doctests without Examples."""
    for start, text in docstrings(source):
        section, lines = "", ["", *text.splitlines(), ""]
        for i, line in enumerate(lines[:-1]):
            header = re.fullmatch(r"( *)(\w+):", line)
            if header and (not header[1] or header[2] in SECTIONS):
                section = header[2]
                right = not header[1] and section in SECTIONS and not lines[i - 1] and lines[i + 1].startswith("    ")
            else:
                section = "" if line[:1].strip() else section
                right = ">>> " not in line or (section == "Examples" and line.startswith("    "))
            if not right:
                yield f"{start + i - 1}: {line}"


def test_sections_of_docstrings_render_and_doctests_are_examples():
    assert not [f"{name}:{wrong}" for name, path in MODULES.items() for wrong in wrong_sections(path.read_text())]
    texts = {name: path.read_text() for name, path in MODULES.items()}
    found = {header: sum(f"    {header}:\n" in text for text in texts.values()) for header in SECTIONS}
    assert min(found.values()) >= 1 and found["Examples"] >= 30, found


@pytest.mark.parametrize(
    "text",
    [
        "One.\n\n>>> 1\n1",
        "One.\n\nArgs:\n    x: One.\n\n>>> 1\n1",
        "One.\n\nArgs:\n    x: One.\n    >>> 1\n    1",
        "One.\n\nExamples:\n    >>> 1\n    1\n\nMore.\n    >>> 1\n    1",
        "One.\n\nExample:\n    >>> 1\n    1",
        "One.\n\nArguments:\n    x: One.",
        "One.\nReturns:\n    x",
        "One.\n\nReturns:\nx",
        "One.\n\nMore.\n\n    Returns:\n        x",
    ],
)
def test_sections_that_do_not_render_are_found(text):
    good = "One.\n\nArgs:\n    x: One.\n\nExamples:\n    >>> 1\n    1\n\n    Two::\n\n        >>> 2"
    assert not list(wrong_sections(f"def f(): {good!r}"))
    assert list(wrong_sections(f"def f(): {text!r}"))


# Names that said nothing, or two things, before each module had its room. "" stands for all of src.
OLD_NAMES = {
    "": {
        "Body", "Expected", "Flight", "Frozen", "Hook", "Lagging", "Most", "Plan", "Programs", "Ran", "Rows", "Runs",
        "Token", "Tracked", "Windows", "adds", "advance", "begun", "beside", "heard", "heard_in", "judge",
        "lift", "lifted", "nothing_lost", "scored", "settled", "spell", "staged", "take_apart", "thinned",
    },
    "_engine": {"_before", "_done", "_flight", "_held", "_wrong", "fault", "good", "lost", "wrong"},
    "_run": {"Look", "_shown", "_told", "again", "place", "settle", "tell"},
    "_step": {"Parts", "fault", "lost", "still", "wrong"},  # LossScale.good is the name in checkpoints
    "data": {"Run", "Stage", "place"},
    "evaluation": {"Total", "_Sums"},
    "metrics": {"Total", "_Sums"},
}  # fmt: skip


def identifiers(path):
    """(line, name) for each name that a file reads, defines, imports or passes."""
    for node in ast.walk(parsed(path)):
        for field in ("id", "attr", "name", "arg", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), name.split(".")[-1]


def test_old_names_are_gone():
    old = {module: OLD_NAMES[""] | OLD_NAMES.get(room(module), set()) for module in MODULES}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for module, path in MODULES.items()
        for line, name in identifiers(path)
        if name in old[module]
    ]
    assert not found


def test_every_package_says_what_it_is_for():
    packages = {name: path for name, path in MODULES.items() if path.name == "__init__.py"}
    assert {"kaun", "_loss", "data", "layers"} <= set(packages)
    assert not [name for name, path in packages.items() if not ast.get_docstring(parsed(path))]


def test_pre_commit_and_continuous_integration_run_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    ran = {}
    for name in (".pre-commit-config.yaml", ".github/workflows/ci.yml", ".ci/run"):
        text = re.sub(r"#.*", "", (ROOT / name).read_text()).replace("${{ matrix.target }}", "test-slow")
        ran[name] = set(re.findall(r"(?:run:|entry:|exec) make ([\w-]+)", text.replace("${{ matrix.jax }}", "oldest")))
    assert ran[".pre-commit-config.yaml"] == {"lint"} and ran[".ci/run"] == {"test"}
    assert {"test", "test-oldest", "test-slow"} <= ran[".github/workflows/ci.yml"]
    assert not [name for names in ran.values() for name in names if name not in targets]


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation and f"\nlicense: {project['license']}\n" in citation
    pythons = re.search(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())[1]
    listed = [c.split()[-1] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert re.findall(r"[\d.]+", pythons) == listed and project["requires-python"] == f">={listed[0]}"


@pytest.fixture(scope="module")
def imported():
    """What a new process prints: the modules that `import kaun` loads, and then something of interop."""
    code = """if True:
        import sys, kaun
        print(*sys.modules)
        print(*[getattr(kaun, name) for name in kaun.__all__ if name != "interop"] and sys.modules)
        print(kaun.interop.safetensors.rename('a', 'b'))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_import_kaun_imports_nothing_else(imported):
    modules = set(imported[0].split())
    assert "kaun" in modules and "jax" not in modules
    assert not [name for name in modules if name.startswith("kaun.")]


def test_the_names_of_kaun_pull_in_nothing_optional(imported):
    modules = set(imported[1].split())
    assert {"kaun.rng", "kaun.reports", "kaun.diagnose.summary"} <= modules
    assert "kaun.interop" not in modules
    assert not OPTIONAL & modules


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.import_module("kaun").__version__ == project["version"]


def test_interop_is_imported_when_it_is_used(imported):
    assert imported[2:] == ["rename('a', 'b')"]


def test_a_name_that_kaun_does_not_have_is_an_error_that_lists_those_it_has():
    with pytest.raises(AttributeError, match=r"^module 'kaun' has no attribute 'fitt'. It has Context, .*, summary\.$"):
        importlib.import_module("kaun").fitt  # noqa: B018


def test_modules_name_nothing_optional_at_their_top():
    # What is not installed here would pass the test above behind a `try: import`.
    tops = {
        (name, alias)
        for name, path in MODULES.items()
        if room(name) != "interop"
        for node in parsed(path).body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        for inner in ast.walk(node)
        for alias in imported_names(inner)
    }
    assert not [(name, alias) for name, alias in tops if alias in OPTIONAL or alias.split(".")[0] in OPTIONAL]


def imported_names(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


# Put together here, so that this file does not hold what it looks for.
FORBIDDEN = re.compile(
    "|".join(
        [
            *(r"\.".join(host) for host in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "(?:com|org)"))),
            r"\.".join(("anaconda", "org")),
            r"\.".join(("pytorch", "org/whl")),
            *(f"(?<![\\w.~])/{folder}/\\w" for folder in ("home", "Users", "root", "work", "tmp/w")),
        ]
    )
)


def files_of_the_repository():
    """Every file but those that .gitignore names; a checkout without git has the same ones."""
    ignored = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())]
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
                continue
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
            elif path.is_file():
                yield path


def test_no_file_names_a_registry_or_a_place_on_a_machine():
    files = list(files_of_the_repository())
    assert {ROOT / "Makefile", ROOT / ".ci" / "run", SRC / "rng.py", Path(__file__).resolve()} <= set(files)
    found = []
    for path in files:
        text = path.read_bytes()
        if b"\0" not in text:
            lines = enumerate(text.decode(errors="replace").splitlines(), start=1)
            found += [f"{path.relative_to(ROOT)}:{n}: {line}" for n, line in lines if FORBIDDEN.search(line)]
    assert not found


@pytest.mark.parametrize("text", ["https://{}.org/simple", "cd /{}/ann/kaun", "see '/{}/main'"])
def test_the_patterns_find_what_they_look_for(text):
    place = {"h": "pypi", "c": "home", "s": "work"}[text[0]]
    assert FORBIDDEN.search(text.format(place))
    assert not FORBIDDEN.search(text.format("docs"))

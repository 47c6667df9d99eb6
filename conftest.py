"""What holds for every test: strict promotion, a compile cache on disk, and the short form of property tests.

Strict mode: no implicit dtype promotion, no implicit rank promotion (warnings are errors too).
"""

import contextlib
import functools
import gc
import importlib.util
import os
import re
import signal
import sys
import threading
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the suite's time would be XLA compiling the same small models again and again. JAX's own compile cache
# compiles each program once for all tests, workers and runs, and for the processes that tests start, which inherit
# these variables. `make clean` removes it; JAX_ENABLE_COMPILATION_CACHE=false runs the suite without it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A whole traceback for each operation of each program is a sixth of what tracing and lowering cost.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")

import jax
import pytest
from hypothesis import settings
from jax._src import compiler
from jax._src.interpreters import mlir
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# Shells ignore SIGINT, and nohup SIGHUP, for what they start in the background. A fit would respect that; tests of it
# send these signals.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Python looks for cycles after each 700 allocations, and JAX has a callback for each time: an eighth of collecting the
# tests, and 2 % of running them.
gc.set_threshold(50_000, 10, 10)

# Before pytest collects the doctests of single files, which would otherwise run a second copy of each module.
import kaun  # noqa: E402

for imported in kaun.__all__:
    getattr(kaun, imported)

CACHE = Path(__file__).resolve().parent / ".jax_cache"
CACHE_LIMIT = 1_000_000_000  # bytes

# Most of the suite's time is XLA making fast machine code for programs that run once or twice. Nearly all tests look at
# values within a tolerance, at errors, at what a page prints, or compare the bits of two programs that are compiled
# alike, for which simple machine code serves as well: with one piece of code for each program (the split count) the
# bits of a loop are those of its steps, without it they were not (jaxlib 0.10.2). Some laws, the pages that compare
# bits, and what is measured have the code that users have. `make test-oldest`, `make test-newest` and `make test-slow`
# run all their tests on that code.
# The first option is gone in jaxlib 0.12.
SIMPLE = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
OF_USERS = (
    "tests/ensemble/test_laws.py::test_fit_is_the_fold_of_step_and_near_the_trainers[in place]",
    "tests/ensemble/test_laws.py::test_members_that_are_not_packed_update_the_statistics_of_batch_norm",
    "tests/ensemble/test_laws.py::test_members_that_may_be_skipped_keep_the_bits_of_a_running_statistic",
    "tests/evaluation/test_passes.py::test_predict_in_blocks_keeps_the_bits_of_a_sum_of_what_is_sliced",
    "tests/laws/test_fold.py::test_a_step_of_ignore_keeps_the_norm_that_it_does_not_need",
    "tests/laws/test_fold.py::test_fit_is_the_fold_for_targets_with_three_axes",
    "tests/laws/test_fold.py::test_fit_is_the_fold_with_a_ragged_last_batch",
    "tests/laws/test_fold.py::test_steps_that_are_reported_from_the_start_are_the_fold_too",
    "tests/losses/test_mean.py",
    # They train long: on this code they take half the time once it is in the cache.
    "tests/models/test_bert.py::test_it_fills_in_what_is_masked",
    "tests/models/test_ddpm.py::test_samples_are_distributed_as_the_data",
    "tests/models/test_lenet.py::test_digits_are_read",
    "tests/test_docs.py::test_page[docs/exactness.md]",
)
CACHE_OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
OPTIONS_OF_TEST = []  # the innermost last; for all threads
key_of_caches = jax.make_user_context(())  # the options again, in the keys of JAX's caches

CONTEXTS = threading.local()

OF_OTHERS = ("datasets", "equinox", "flax", "grain", "haiku", "torch")

# The number of examples that a property test states is that of the full profile, which `make test-slow` runs. Both are
# random, and a failure prints what reproduces it.
settings.register_profile("full", deadline=None, print_blob=True, derandomize=False)
settings.register_profile("short", settings.get_profile("full"))
settings.load_profile("short")


def options_for(name):
    """The options of XLA for a test, by its node id or that of its file, as pairs: those that this release has."""
    if os.environ.get("KAUN_TESTS_CODE") == "of users" or name.startswith(OF_USERS):
        return ()
    return tuple(option for option in SIMPLE.items() if is_known(option))


@functools.cache
def is_known(option):
    try:
        jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def options_of_compiler(*args, made=compiler.get_compile_options, **kwargs):
    """JAX's function of that name, which has options for one function and none for all."""
    options = made(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *(OPTIONS_OF_TEST or [()])[-1]]
    return options


compiler.get_compile_options = options_of_compiler


@contextlib.contextmanager
def options_in_use(options):
    OPTIONS_OF_TEST.append(options)
    try:
        with key_of_caches(options):
            yield
    finally:
        OPTIONS_OF_TEST.pop()


MAKE_CONTEXT = getattr(mlir, "_create_ir_context", mlir.make_ir_context)  # the first is that of jax 0.12


def context_of_file():
    """JAX's `make_ir_context`, which loads all dialects of MLIR for each program that is lowered.

    That is 3.5 ms of CPU of the 5 that lowering a small program takes, in jax 0.10; in 0.12 ten programs share a
    context. Here one serves all programs that a thread lowers for a file of tests. `freeze` ends it, since types and
    constants stay as long as their context does. What is compiled while a program is being lowered has its own: in that
    program's context it would be inserted there.
    """
    if mlir.ir.Context.current is not None:
        return MAKE_CONTEXT()
    if not hasattr(CONTEXTS, "made"):
        CONTEXTS.made = MAKE_CONTEXT()
    return CONTEXTS.made


mlir.make_ir_context = context_of_file


def lowered_directly():
    """The operations of `jax.lax` whose rule makes a few operations of MLIR, the same for all platforms.

    JAX lowers each operation as a function of MLIR, keeps that for operations like it, and inlines it. Without that
    step the program is the same, and lowering costs three quarters. Rules that trace a function are left to JAX.
    """
    own = set().union(*mlir._platform_specific_lowerings.values())
    rules = {found: mlir._lowerings.get(found) for name, found in vars(jax.lax).items() if name.endswith("_p")}
    traces = lambda rule: "lower_fun" in getattr(rule, "__qualname__", "")
    return {found for found, entry in rules.items() if entry and entry.inline and not traces(entry.rule)} - own


LOWERED_DIRECTLY = frozenset(lowered_directly() - mlir._uncacheable_primitives)
mlir._uncacheable_primitives |= LOWERED_DIRECTLY


def location_without_line(ctx, primitive, name_stack, traceback):
    """JAX's `source_info_to_location`, with the name of an operation in its scopes and not the line that called it."""
    names = [str(name_stack)] if name_stack.stack else []
    names += [primitive.name] if primitive else []
    return mlir.ir.Location.name("/".join(names)) if names else mlir.ir.Location.unknown()


mlir.source_info_to_location = location_without_line


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
    with options_in_use(options_for(item.nodeid)):
        try:
            return (yield)
        finally:
            if before != (after := {name: getattr(jax.config, name) for name in CACHE_OPTIONS}):  # kaun.cache ran
                for name in after:
                    jax.config.update(name, before[name])
                reset_cache()


def examples(full, profile):
    """How many examples a property test runs, of those that it states: an eighth in the short profile, 3 at least."""
    return full if profile == "full" else min(full, max(3, full // 8))


def shrink(folder, limit):
    """Remove the oldest files of a folder that holds more than `limit` bytes, until half of that is left.

    JAX's own limit needs one more package, and a lock for each read.
    """
    files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir())
    size = sum(size for _, size, _ in files)
    if size > limit:
        for _, removed, path in files:
            if size <= limit // 2:
                break
            path.unlink(missing_ok=True)
            size -= removed


def pytest_sessionstart(session):
    if "PYTEST_XDIST_WORKER" not in os.environ and CACHE.is_dir():
        shrink(CACHE, CACHE_LIMIT)


def pytest_collection_finish():
    freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            freeze()


def freeze():
    """Keep what is alive from the garbage collector: JAX's caches hold millions of objects that stay to the end.

    Late in the suite each full collection took seconds: the tests of a file cost twice as much as on their own.
    """
    CONTEXTS.__dict__.clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _doctests_are_code_of_a_user(doctest_namespace):
    """Without it their globals have the name of kaun's module, and a loss does not follow the globals of a library."""
    doctest_namespace["__name__"] = "__main__"


def pytest_collection_modifyitems(items):
    """Skip examples of libraries that are not installed, and shorten property tests."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            text = "".join(example.source for example in item.dtest.examples)
            for name in OF_OTHERS:
                if re.search(rf"^(import|from) {name}\b", text, re.MULTILINE) and not importlib.util.find_spec(name):
                    item.add_marker(pytest.mark.skip(reason=f"{name} is not installed"))
    for test in {item.function for item in items if isinstance(item, pytest.Function)}:
        if getattr(test, "is_hypothesis_test", False):
            stated = test._hypothesis_internal_use_settings
            number = examples(stated.max_examples, settings.get_current_profile_name())
            test._hypothesis_internal_use_settings = settings(stated, max_examples=number)


@pytest.fixture
def no_compile_cache():
    """For tests that measure compiling: XLA compiles what they ask for, whether it did so before or not."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX looks at the option once, and again after this
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    reset_cache()


@pytest.fixture(scope="session")
def module_at():
    """A function from the path of a file that is in no package to its module, the same one each time."""

    @functools.cache
    def load(path):
        name = f"{path.parent.name}_{path.stem}"  # not the stem alone: .ci/site.py is not Python's site
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def xla_flags():
    """The options of XLA for all tests but OF_USERS as a value of XLA_FLAGS, for the processes that tests start."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options_for(""))

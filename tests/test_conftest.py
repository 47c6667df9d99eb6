"""What conftest.py gives to all tests: the compile cache on disk, and property tests in a short form."""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(pytestconfig):
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))


@pytest.fixture
def cached():
    if not jax.config.jax_enable_compilation_cache:
        pytest.skip("the suite runs without the compile cache")


@pytest.fixture
def compiled():
    """A function that compiles a program of a new name, and gives the files that the cache has of it."""
    folder, name = Path(jax.config.jax_compilation_cache_dir), f"kept_{uuid.uuid4().hex}"

    def run():
        double = lambda x: x * 2
        double.__name__ = name
        np.testing.assert_array_equal(jax.jit(double)(np.arange(3.0, dtype=np.float32)), [0, 2, 4])
        return list(folder.glob(f"*{name}*"))

    yield run
    for path in folder.glob(f"*{name}*"):
        path.unlink()


def test_what_was_compiled_is_kept_and_found_again(cached, compiled):
    (path,) = compiled()
    before = path.stat().st_mtime_ns
    assert compiled() == [path] and path.stat().st_mtime_ns == before
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == jax.config.jax_compilation_cache_dir, "for processes of tests"


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in (lambda raw: b"", lambda raw: raw[::-1])),
    ],
)
def test_a_damaged_file_is_as_good_as_none(cached, compiled, damage):
    (path,) = compiled()
    path.write_bytes(damage(path.read_bytes()))
    compiled()


def test_tests_that_measure_compiling_do_without(no_compile_cache, compiled):
    assert compiled() == []


def test_simple_machine_code_is_for_all_but_some_and_is_compiled_apart(root, monkeypatch):
    monkeypatch.delenv("KAUN_TESTS_CODE", raising=False)
    known = lambda options: {name: value for name, value in options.items() if root.is_known((name, value))}
    assert dict(root.options_for("tests/losses/test_losses.py")) == known(root.SIMPLE)
    assert dict(root.options_for("tests/test_docs.py::test_page[docs/data.md]")) == known(root.SIMPLE)
    for name in (
        "tests/laws/test_fold.py::test_steps_that_are_reported_from_the_start_are_the_fold_too[mlp-inject]",
        "tests/laws/test_fold.py::test_fit_is_the_fold_with_a_ragged_last_batch",
        "tests/test_docs.py::test_page[docs/exactness.md]",
    ):
        assert root.options_for(name) == ()
    simple = root.options_for("tests/losses/test_losses.py")
    monkeypatch.setenv("KAUN_TESTS_CODE", "of users")
    assert root.options_for("tests/losses/test_losses.py") == ()
    run, seen, made = jax.jit(lambda x: x * 3), [], root.compiler.get_compile_options
    monkeypatch.setattr(
        root.compiler,
        "get_compile_options",
        lambda *args, **options: seen.append(made(*args, **options)) or seen[-1],
    )
    for options in ((), simple, simple, ()):
        with root.options_in_use(options):
            np.testing.assert_array_equal(run(np.float32(2)), 6)
    plain, compiled = (dict(options.env_option_overrides) for options in seen)
    assert not plain and compiled == dict(simple) and compiled["xla_backend_optimization_level"] == 0


def test_programs_of_a_file_are_lowered_in_one_context_of_their_thread(root):
    contexts = lambda: [jax.jit(lambda x: x * i).lower(2).compiler_ir().context for i in range(2)]
    first, second = contexts()
    assert first is second
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(contexts).result()[0] is not first
    with first:  # as while a program is lowered
        assert contexts()[0] is not first
    root.freeze()
    assert contexts()[0] is not first


def test_operations_that_are_lowered_directly_make_the_same_program(root, monkeypatch):
    x = np.ones((2, 3), np.float32)

    def texts():
        function = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jax.nn.silu(x @ x.T @ x).cumsum(0) + x, x).sum()
        return jax.jit(jax.grad(function)).lower(x).as_text()

    assert jax.lax.add_p in root.LOWERED_DIRECTLY and jax.lax.cumsum_p not in root.LOWERED_DIRECTLY
    here = texts()
    monkeypatch.setattr(root.mlir, "_uncacheable_primitives", root.mlir._uncacheable_primitives - root.LOWERED_DIRECTLY)
    assert texts() == here


def test_a_full_cache_loses_its_oldest_files(root, tmp_path):
    for i in range(10):
        (tmp_path / str(i)).write_bytes(bytes(100))
        os.utime(tmp_path / str(i), (i, i))
    root.shrink(tmp_path, 1000)
    assert len(list(tmp_path.iterdir())) == 10
    root.shrink(tmp_path, 999)
    assert {path.name for path in tmp_path.iterdir()} == {"6", "7", "8", "9"}


def test_the_short_form_is_an_eighth_of_the_examples(root):
    assert [root.examples(n, "full") for n in (3, 40)] == [3, 40]
    assert [root.examples(n, "short") for n in (2, 6, 20, 40, 100)] == [2, 3, 3, 5, 12]


@given(st.integers())
@settings(max_examples=40)
def test_it_holds_for_this_one(n):
    stated = test_it_holds_for_this_one._hypothesis_internal_use_settings
    assert stated.max_examples == {"short": 5, "full": 40}[settings.get_current_profile_name()]
    assert stated.deadline is None and stated.print_blob and not stated.derandomize

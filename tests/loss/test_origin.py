"""Whose code it is goes by the name of its package, wherever the package lies."""

import functools
import importlib
import importlib.util
import os
import site
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import losses
from kaun._loss import capture_loss, origin, rebuild_loss
from kaun.errors import CaptureError

PACKAGE = """
import numpy as np
from . import parts

ALPHA = 1.0
TARGETS = np.zeros((2,), np.float32)
CACHE = {}

def loss(out):
    return ((out - TARGETS) ** 2).sum() * ALPHA + parts.extra(out)

def counted(out):
    global ALPHA
    ALPHA = ALPHA + 0.0
    return out.sum()
"""
PARTS = """
from kaun import losses
BETA = 0.0

def extra(out):
    return out.sum() * BETA
"""


def write_package(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(PACKAGE)
    (folder / name / "parts.py").write_text(PARTS)


@pytest.fixture
def package(tmp_path, request, monkeypatch):
    """A package of the user's, placed as the test asks for."""
    name = f"perceptual_{request.param.replace('-', '_')}"
    before = list(sys.path)
    if request.param == "site-packages":
        write_package(tmp_path / "site-packages", name)
        sys.path.insert(0, str(tmp_path / "site-packages"))
    elif request.param == "editable":
        write_package(tmp_path / "src", name)
        (tmp_path / "site-packages").mkdir()
        (tmp_path / "site-packages" / f"{name}.pth").write_text(f"{tmp_path / 'src'}\n")
        site.addsitedir(str(tmp_path / "site-packages"))
    elif request.param == "installed":  # where pip puts what it installs, by the folder's name in this Python
        folder = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "dist-packages"
        write_package(folder, name)
        sys.path.append(str(folder))
    else:
        write_package(tmp_path, name)
        sys.path.insert(0, str(tmp_path))
    yield importlib.import_module(name)
    sys.path[:] = before
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def value_of(loss, out):
    key, arrays = capture_loss(loss)
    return key, float(rebuild_loss(key, arrays)(out))


@pytest.mark.parametrize("package", ["site-packages", "editable", "installed", "plain"], indirect=True)
@pytest.mark.parametrize("way", ["itself", "by lambda", "through a module", "with_loss"])
def test_a_package_of_the_users_is_seen_as_it_is_now(package, way):
    """The same wherever it lies, and whether the loss is defined in it or only uses it."""
    out = np.ones(2, np.float32)
    f = package.loss
    loss = {
        "itself": package.loss,
        "by lambda": lambda out: f(out),
        "through a module": lambda out: package.loss(out),
        "with_loss": functools.partial(lambda f, out: f(out), package.loss),
    }[way]
    first, value = value_of(loss, out)
    assert value == 2.0
    package.ALPHA = 100.0
    second, value = value_of(loss, out)
    assert value == 200.0 and second is not first
    package.parts.BETA = 1.0
    assert value_of(loss, out)[1] == 202.0
    package.TARGETS = np.full((2,), 3, np.float32)
    third, value = value_of(loss, out)
    package.TARGETS = np.full((2,), 5, np.float32)
    assert value == 802.0 and value_of(loss, out) == (third, 3202.0), "a new array is the same program"


@pytest.mark.parametrize("placed", ["PYTHONPATH", pytest.param("beside the script", marks=pytest.mark.slow)])
def test_the_same_in_a_process_of_its_own(tmp_path, placed):
    write_package(tmp_path / "place", "perceptual")
    code = (
        "import numpy as np, perceptual\n"
        "from kaun._loss import capture_loss, rebuild_loss\n"
        "def now():\n"
        "    key, arrays = capture_loss(perceptual.loss)\n"
        "    return float(rebuild_loss(key, arrays)(np.ones(2, np.float32)))\n"
        "before = now()\n"
        "perceptual.ALPHA = 100\n"
        "print(before, now())\n"
    )
    script = tmp_path / ("place" if placed == "beside the script" else ".") / "main.py"
    script.write_text(code)
    env = dict(os.environ)
    if placed == "PYTHONPATH":
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "place"), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.0", "200.0"]


@pytest.mark.parametrize("package", ["site-packages"], indirect=True)
def test_only_the_users_own_code_is_refused(package):
    """A write in a package that the loss only uses is that package's affair; in the package of the loss it is not."""
    key, arrays = capture_loss(lambda out: package.counted(out))
    assert rebuild_loss(key, arrays)(np.ones(2)) == 2.0
    with pytest.raises(CaptureError, match=r"`counted` .* assigns to the global variable `ALPHA`"):
        capture_loss(package.counted)


def test_modules_that_are_in_no_table_are_followed(tmp_path):
    (tmp_path / "settings.py").write_text("import numpy as np\nW = 2.0\nY = np.ones(2, np.float32)\n")
    spec = importlib.util.spec_from_file_location("settings_of_this_run", tmp_path / "settings.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    made = types.ModuleType("made")
    made.W, made.Y = 2.0, np.ones(2, np.float32)
    for module in (loaded, made):
        loss = lambda out: (out * module.Y).sum() * module.W
        first, value = value_of(loss, np.ones(2))
        assert value == 4.0
        module.Y = np.full(2, 3, np.float32)
        assert value_of(loss, np.ones(2)) == (first, 12.0)
        module.W = 1.0
        assert value_of(loss, np.ones(2))[1] == 6.0


def test_chains_and_imports_inside_a_function(monkeypatch):
    package, inner = types.ModuleType("outer_of_test"), types.ModuleType("outer_of_test.inner")
    package.inner, package.other = inner, iter([1])
    inner.Y, inner.deep = np.ones(2, np.float32), types.SimpleNamespace(w=1.0)
    monkeypatch.setitem(sys.modules, "outer_of_test", package)
    monkeypatch.setitem(sys.modules, "outer_of_test.inner", inner)

    def imports(out):
        import outer_of_test.inner
        from outer_of_test.inner import Y

        return (out * Y).sum() * outer_of_test.inner.deep.w

    def alias(out):
        m = package
        return (out * m.inner.Y).sum() * m.inner.deep.w

    for loss in (lambda out: (out * package.inner.Y).sum() * package.inner.deep.w, imports, alias):
        inner.Y, inner.deep.w = np.ones(2, np.float32), 1.0
        first, value = value_of(loss, np.ones(2))
        assert value == 2.0
        inner.Y = np.full(2, 2, np.float32)
        assert value_of(loss, np.ones(2)) == (first, 4.0)
        inner.deep.w = 3.0
        assert value_of(loss, np.ones(2))[1] == 12.0


def test_names_decide():
    for name in ("numpy.linalg", "jax", "equinox", "torch.nn", "json", "builtins", "tensorflow_probability.substrates"):
        assert origin.is_library(name)
    for name in ("", "__main__", "numpyro_models", "mylosses", "perceptual.jax", "kaunas"):
        assert not origin.is_library(name)


# Decorators

WEIGHT = 1.0


def weighted(out):
    return losses.mse(out, TARGETS) * WEIGHT


TARGETS = jnp.zeros(2)


def decorated(name):
    if name == "lru_cache":
        cached = functools.lru_cache(lambda: WEIGHT)
        return lambda out: losses.mse(out, TARGETS) * cached()
    if name == "jit":
        return jax.jit(weighted)
    if name == "wraps":
        return functools.wraps(weighted)(lambda out: weighted(out))
    if name == "beartype":
        return pytest.importorskip("beartype").beartype(weighted)
    if name == "jaxtyping":
        return pytest.importorskip("jaxtyping").jaxtyped(typechecker=None)(weighted)
    if name == "jaxtyping and beartype":
        beartype, jaxtyping = pytest.importorskip("beartype"), pytest.importorskip("jaxtyping")

        @jaxtyping.jaxtyped(typechecker=beartype.beartype)
        def typed(out: jaxtyping.Float[jaxtyping.Array, "..."]) -> jaxtyping.Float[jaxtyping.Array, "..."]:
            return losses.mse(out, TARGETS) * WEIGHT

        return typed
    if name == "einops":
        einops = pytest.importorskip("einops")
        return lambda out: weighted(einops.rearrange(out[None], "a b -> (a b)"))
    assert name == "filter_jit"
    return pytest.importorskip("equinox").filter_jit(weighted)


NAMES = ["lru_cache", "jit", "wraps", "beartype", "jaxtyping", "jaxtyping and beartype", "einops", "filter_jit"]


@pytest.mark.parametrize("name", NAMES)
def test_decorators_are_looked_through(name, monkeypatch):
    out = jnp.array([1.0, 2.0])
    loss = decorated(name)
    run = lambda: float(jax.jit(lambda arrays, out: rebuild_loss(key, arrays)(out))(arrays, out))
    first, arrays = key, arrays = capture_loss(loss)
    assert run() == 2.5
    key, arrays = capture_loss(loss)
    assert key is first
    monkeypatch.setattr(sys.modules[__name__], "WEIGHT", 3.0)
    getattr(loss, "cache_clear", lambda: None)()
    second, arrays = key, arrays = capture_loss(loss)
    assert second is not first and run() == 7.5
    monkeypatch.setattr(sys.modules[__name__], "TARGETS", jnp.array([1.0, 2.0]))
    key, arrays = capture_loss(loss)
    assert key is second and run() == 0.0

"""Objects of other libraries where kaun expects its own, recognized without an import by where their class lies."""

from __future__ import annotations

import sys
from typing import Any

from kaun._calls.names import call_of, renamed
from kaun._calls.refusal import shown

__all__ = ["foreign_function", "layer_for", "model_for"]

_NO_ADAPTER = (
    "there is no adapter for models of {library}: write the model with kaun.layers, and copy its weights, "
    "vars = interop.safetensors.into(model.init(), interop.safetensors.load(path), rules)"
)
# By the beginning of the module in which a class was defined, the more special ones first.
_MODELS = {
    "flax.nnx": "write model=interop.flax_nnx(module)",
    "flax.linen": "write model=interop.linen(module, sample), with an input as sample",
    "flax": "write model=interop.linen(module, sample) or interop.flax_nnx(module)",
    "equinox": "write model=interop.equinox(module)",
    "haiku": "write model=interop.haiku(hk.transform_with_state(forward), sample), with forward a function that makes "
    "and applies the module",
    "torch": _NO_ADAPTER.format(library="PyTorch"),
    "transformers": _NO_ADAPTER.format(library="transformers"),
    "keras": _NO_ADAPTER.format(library="Keras"),
    "tensorflow": _NO_ADAPTER.format(library="TensorFlow"),
    "sklearn": "there is no adapter for models of scikit-learn: they are not differentiable",
}
_FUNCTIONS = {"torch": "PyTorch", "keras": "Keras", "tensorflow": "TensorFlow", "sklearn": "scikit-learn"}


def _modules(value: Any) -> list[str]:
    """Where the classes of an object, or of a class itself, were defined, and where a function was."""
    classes = value.__mro__ if isinstance(value, type) else (*type(value).__mro__,)
    own = [getattr(value, "__module__", None) or ""] if callable(value) else []
    return [*own, *(getattr(kind, "__module__", "") or "" for kind in classes)]


def _found(value: Any, libraries: Any) -> str | None:
    names = _modules(value)
    return next((each for each in libraries if any(n == each or n.startswith(f"{each}.") for n in names)), None)


def model_for(value: Any) -> str | None:
    """Return what to write for a model of another library in place of a layer, None if it is not one."""
    library = _found(value, _MODELS)
    if library is None:
        return None
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    made = f"{name} is a class: make the module first, " if isinstance(value, type) else ""
    return f"{made}{_MODELS[library]}"


def layer_for(value: Any) -> str:
    """Return what to write for something that is given where a layer is expected."""
    if (advice := model_for(value)) is not None:
        return f"{advice[0].upper()}{advice[1:].replace('model=', '')}."
    if isinstance(value, str) and value in _ACTIVATIONS:
        return f"Write layers.{value}()."
    if isinstance(value, tuple):
        return 'Names are the keys of a dict. Write layers.sequential({"hidden": a, "out": b}).'
    if isinstance(value, list):
        return "Write its layers in the same list, or layers.sequential([...]) in place of it."
    if value is None:
        return "Leave it out."
    name = getattr(value, "__name__", "")
    # The ufuncs of NumPy 2.0 have no __module__.
    home = (getattr(value, "__module__", None) or type(value).__module__).split(".")
    layers = sys.modules.get("kaun.layers")
    if home[:2] == ["kaun", "layers"] and callable(getattr(layers, name, None)):
        return f"Call it: layers.{call_of('layers', name, getattr(layers, name))}."
    if home[0] in ("jax", "numpy", "optax") and callable(value):
        known = {"swish": "silu"}.get(name, name)
        same = known in _ACTIVATIONS and hasattr(layers, known)
        where = "jax.nn." if "nn" in home else "jnp." if "numpy" in home else ""
        return f"Write layers.{known}()." if same else f"For a plain function write layers.fn({where}{name or 'f'})."
    called = "Did you forget to call it? " if callable(value) else ""
    return f"{called}For a plain function write layers.fn({name if name.isidentifier() else 'f'})."


_ACTIVATIONS = frozenset(
    {
        "elu", "gelu", "glu", "leaky_relu", "log_softmax", "mish", "relu", "selu", "sigmoid", "silu", "softmax",
        "softplus", "tanh",
    }
)  # fmt: skip


def foreign_function(value: Any, kind: str) -> str | None:
    """Return what to write for a loss or a metric of a library that does not compute with JAX, None for any other.

    Args:
        value: The function or the object.
        kind: ``"losses"`` or ``"metrics"``.
    """
    library = _found(value, _FUNCTIONS)
    if library is None:
        return None
    name = getattr(value, "__name__", None) or type(value).__name__
    module = sys.modules.get(f"kaun.{kind}")
    found = renamed(kind, name, module) if module is not None else None
    fix = f"Write {kind}.{found}" if found else f"Write one of kaun.{kind}, or a function with jax.numpy"
    return f"received {shown(value)} of {_FUNCTIONS[library]}, which does not compute with JAX. {fix}."

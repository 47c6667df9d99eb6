"""Flax NNX modules as layers."""

from __future__ import annotations

from typing import Any

import jax

from kaun import rng, tree
from kaun._calls import public
from kaun._messages import optional_package
from kaun.context import Context
from kaun.interop.frozen import check_unchanged
from kaun.interop.keywords import Keywords, cast_floats, check_method, check_structure, nested, origins, pick
from kaun.interop.parts import by_identity, naming_parts
from kaun.layers.arguments import accumulation_dtype
from kaun.layers.core import Layer, Vars
from kaun.layers.path import here, is_frozen

__all__ = ["flax_nnx"]

Path = tuple[Any, ...]

_MODES = ("deterministic", "use_running_average")  # the attributes that module.train() and module.eval() set
_RATES = ("rate", "dropout_rate")


@public
def flax_nnx(module: Any, *, method: Any = None) -> Layer[Any, Any]:
    """Make a layer of a Flax NNX module; its initial values are those of the module.

    The params are the module's ``nnx.Param`` variables, by the paths of ``nnx.to_pure_dict(nnx.state(module,
    nnx.Param))``; a shared variable occurs once. The state is every other variable and array (``nnx.BatchStat``,
    ``nnx.Cache``), except random streams, which receive keys from kaun's RNG scope, and ``nnx.Intermediate``, which is
    discarded. ``init(dtype=...)`` casts floating params to its dtype, and floating state to float32 or wider, as Flax
    keeps it.

    The module is split once, when the layer is made, and merged only while JAX traces, with ``module.train()`` or
    ``module.eval()`` called on the copy. What was in evaluation mode when the module was passed
    (``use_running_average=True``, ``self.encoder.eval()``) stays in it, and a submodule whose parameters are all frozen
    by ``Trainer(trainable=...)`` is in it too. The object that was passed is never changed. What a call assigns to an
    ``nnx.Param`` is discarded: only the optimizer updates params.

    Keyword arguments of the module's call receive the mode (``training``, ``train``, ``is_training``,
    ``deterministic``, ``use_running_average``, ``inference``), streams (``rngs``), or the value of that name in the
    Context.

    Args:
        module: An ``nnx.Module``.
        method: What to call instead of the module: a method's name, or a function of module and input.

    Raises:
        ImportError: If flax is not installed.
        TypeError: If ``module`` is not an NNX module, or cannot be called.
        ValueError: If, when applied, the call adds or removes variables, applies dropout in evaluation mode, or changes
            the state of a frozen submodule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kaun import interop
        >>> class MLP(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.linear = nnx.Linear(2, 3, rngs=rngs)
        ...         self.norm = nnx.BatchNorm(3, rngs=rngs)
        ...     def __call__(self, x):
        ...         return nnx.relu(self.norm(self.linear(x)))
        >>> model = interop.flax_nnx(MLP(nnx.Rngs(0)))
        >>> variables = model.init(dtype=jnp.float32)
        >>> sorted(variables.params["linear"]), sorted(variables.state["norm"])
        (['bias', 'kernel'], ['mean', 'var'])
        >>> y, after = model.apply(variables, jnp.ones((4, 2)), training=True)
        >>> y.shape, bool((after.state["norm"]["mean"] == 0).all())
        ((4, 3), False)
    """
    nnx = optional_package("interop.flax_nnx", "flax.nnx", "flax")
    adapter = _Adapter(nnx, module, check_method(method, "flax_nnx"))
    return Layer(init=adapter.init, apply=adapter.apply, name=adapter.name)


class _Adapter:
    """The functions of the layer: the module's graph, and a variable (or array) for each path."""

    def __init__(self, nnx: Any, module: Any, method: Any) -> None:
        _check(nnx, module)
        self.nnx, self.name = nnx, f"flax_nnx({type(module).__name__})"
        self.method = method
        call = getattr(module, method or "__call__", None) if not callable(method) else method
        if call is None:
            raise TypeError(
                f"{self.name} has no {method or '__call__'}, so there is nothing to apply. Name the method that is "
                'the forward pass: interop.flax_nnx(module, method="encode").'
            )
        self.keywords = Keywords.of(call, 2 if callable(method) else 1)
        self.graph, state = nnx.split(module)
        # Copies, because nnx.split returns the module's own variables, and the caller may change those.
        flat = nnx.to_flat_state(state)
        self.made: dict[Path, Any] = {p: v.copy() if isinstance(v, nnx.Variable) else tree.snapshot(v) for p, v in flat}
        kind = lambda *kinds: [path for path, made in self.made.items() if isinstance(made, kinds)]
        self.params, self.keys, self.counts = kind(nnx.Param), kind(nnx.RngKey), kind(nnx.RngCount)
        random, self.drops = kind(nnx.RngState), list(self.dropouts(module))
        self.state = [path for path in self.made if path not in {*self.params, *random}]

    def init(self, *, dtype: Any) -> Vars:
        part = lambda paths: nested({path: _value(self.nnx, self.made[path]) for path in paths})
        state = cast_floats(part(self.state), accumulation_dtype(dtype))
        return Vars(params=cast_floats(part(self.params), dtype), state=state, dtype=dtype)

    def apply(self, vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        asks = "rngs" in self.keywords.required and (training or self.keywords.required["rngs"])
        named = self.keywords.values(training=training, ctx=ctx, without=("rngs",))
        if asks:
            named["rngs"] = self.nnx.Rngs(rng.next_key())
        key = rng.next_key() if training and self.keys else None
        y, after = self.call(vars, x, key, training, named)
        drawn = [path for path in self.counts if after[path] is not _value(self.nnx, self.made[path])]
        if not training and drawn:
            self.refuse_dropout(drawn)
            # The module draws in evaluation. Most do not, and then no key is drawn, which would need an open scope.
            y, after = self.call(vars, x, rng.next_key(), training, named)
        state = check_structure(
            self.name, vars.state, nested({path: after[path] for path in self.state}),
            "Make the variable in __init__, with the shape that it has after the call.",
            filled=self.keywords.counts_filled_rows(training=training, ctx=ctx),
        )  # fmt: skip
        return y, vars.replace(state=state)

    def call(
        self, vars: Vars, x: Any, key: jax.Array | None, training: bool, named: dict[str, Any]
    ) -> tuple[Any, dict[Path, Any]]:
        """The output, and the value of every variable after it."""
        module = self.merged(vars, key)
        frozen = self.in_training(module, vars) if training else []
        if not training:
            module.eval()
        with naming_parts(self.name, self.nnx.Module, by_identity(lambda: self.nnx.iter_modules(module))):
            if callable(self.method):
                y = self.method(module, x, **named)
            else:
                y = getattr(module, self.method or "__call__")(x, **named)
        after = dict(self.nnx.to_flat_state(self.nnx.state(module)))
        self.check_paths(after)
        values = {path: _value(self.nnx, after[path]) for path in self.made}
        if frozen:
            before = {path: pick(vars.state, path) for path in self.state}
            part = lambda path: next((where for where in frozen if path[: len(where)] == where), None)
            check_unchanged(self.name, part, before, values, "interop.flax_nnx({})")
        return y, values

    def in_training(self, module: Any, vars: Vars) -> list[Path]:
        """Switch a module to training mode, and return the paths of its submodules that are frozen as a whole.

        These run in evaluation mode, as does what was in it when the layer was made.
        """
        modules = list(self.nnx.iter_modules(module))
        fixed = [(each, mode) for _, each in modules for mode in _MODES if getattr(each, mode, None) is True]
        module.train()
        for each, mode in fixed:
            setattr(each, mode, True)
        if not any(map(is_frozen, jax.tree_util.tree_leaves(vars.params))):
            return []
        params = lambda part: self.nnx.to_pure_dict(self.nnx.state(part, self.nnx.Param))
        frozen = [(path, part) for path, part in modules if is_frozen(params(part))]
        for _, part in frozen:
            part.eval()
            for dropout in self.dropouts(part).values():
                # An argument deterministic=False, handed down through the calls, would override the attribute.
                for rate in _RATES:
                    if hasattr(dropout, rate):
                        setattr(dropout, rate, 0.0)
        return [path for path, _ in frozen]

    def refuse_dropout(self, drawn: list[Path]) -> None:
        """Refuse a call in evaluation that drew from these streams, if one is a dropout's."""
        for where in self.drops:
            if any(path[: len(where)] == where for path in drawn):
                name = ".".join(map(str, where)) or self.name
                raise ValueError(
                    f"{here(self.name)}: {name!r} draws in evaluation mode, so dropout would stay on in predict: it is "
                    "called with deterministic=False. Leave that argument out, kaun calls module.train() and "
                    "module.eval(); or give the model's __call__ an argument deterministic: bool, and pass that."
                )

    def dropouts(self, module: Any) -> dict[Path, Any]:
        kinds = (self.nnx.Dropout, self.nnx.MultiHeadAttention)
        return {path: each for path, each in self.nnx.iter_modules(module) if isinstance(each, kinds)}

    def merged(self, vars: Vars, key: jax.Array | None = None) -> Any:
        """The module with the values of ``vars``, and a different key for each of its random streams."""
        values = {path: pick(vars.params, path) for path in self.params}
        values |= {path: pick(vars.state, path) for path in self.state}
        if key is not None:
            values |= {path: self.stream(path, jax.random.fold_in(key, i)) for i, path in enumerate(self.keys)}
        filled = [(path, _filled(self.nnx, made, values[path]) if path in values else made.copy())
                  for path, made in self.made.items()]  # fmt: skip
        return self.nnx.merge(self.graph, self.nnx.from_flat_state(filled))

    def stream(self, path: Path, key: jax.Array) -> jax.Array:
        shape = _value(self.nnx, self.made[path]).shape
        return jax.random.split(key, shape) if shape else key

    def check_paths(self, after: dict[Path, Any]) -> None:
        dotted = lambda paths: ", ".join(repr(".".join(map(str, path))) for path in paths)
        new = [p for p, v in after.items() if p not in self.made and not isinstance(v, self.nnx.Intermediate)]
        removed = [path for path in self.made if path not in after]
        if new or removed:
            what = f"made {dotted(new)}" if new else f"removed {dotted(removed)}"
            raise ValueError(
                f"{here(self.name)} {what} in its call, but its variables must be the same in each step. Make all "
                "variables in __init__; values that are only inspected can be an nnx.Intermediate."
            )

    def export(self, vars: Vars) -> Any:
        return self.merged(vars)


def _value(nnx: Any, made: Any) -> Any:
    return made.get_value() if isinstance(made, nnx.Variable) else made


def _filled(nnx: Any, made: Any, value: Any) -> Any:
    return made.replace(value) if isinstance(made, nnx.Variable) else value


def _check(nnx: Any, module: Any) -> None:
    if isinstance(module, nnx.Module):
        return
    received = f"received {tree.describe(module)}"
    fix = "Write interop.flax_nnx(Model(nnx.Rngs(0)))."
    if isinstance(module, type) and issubclass(module, nnx.Module):
        received = f"received the class {module.__name__}"
        fix = f"Pass an instance: interop.flax_nnx({module.__name__}(..., rngs=nnx.Rngs(0)))."
    elif "flax.linen.module" in origins(module):
        received, fix = f"{received}, a Linen module", "Write interop.linen(module, x)."
    raise TypeError(f"flax_nnx expected an nnx.Module, {received}. {fix}")

"""Haiku functions as layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from kaun import rng, tree
from kaun._calls import public
from kaun._messages import optional_package, warn
from kaun.context import Context
from kaun.interop.frozen import FrozenParts, frozen_error, run_in_evaluation
from kaun.interop.keywords import Keywords, cast_floats, check_structure, leaves_by_path, plain, zeros
from kaun.interop.parts import naming_parts
from kaun.layers.arguments import accumulation_dtype
from kaun.layers.core import Layer, Vars
from kaun.layers.path import here

__all__ = ["haiku"]


@public
def haiku(transformed: Any, sample: Any, *, ctx: Context | None = None) -> Layer[Any, Any]:
    """Make a layer of a function that ``hk.transform`` or ``hk.transform_with_state`` made pure.

    Its initial values are those of ``transformed.init(rng.next_key(), sample)`` in training mode. The params and the
    state are Haiku's own dicts, of module names and then of parameters: ``params["linear"]["w"]``. ``init(dtype=...)``
    casts floating params to its dtype, and floating state to float32 or wider.

    In training the function's keys (``hk.next_rng_key``) come from kaun's RNG scope, and in evaluation too if it asks
    for one, with a warning, once: dropout that is not switched off would stay on. Under ``Trainer(trainable=...)`` a
    module whose parameters are all frozen runs in evaluation mode: the switches among its methods' arguments are set
    where they are called. The mode is a keyword argument: ``is_training``, ``training``, ``train``, ``deterministic``,
    ``use_running_average`` or ``inference``. Other keyword arguments receive the value of that name in the Context.

    Args:
        transformed: The result of ``hk.transform(f)`` or ``hk.transform_with_state(f)``.
        sample: An input for ``init``: arrays, or ``jax.ShapeDtypeStruct`` in place of arrays.
        ctx: A Context for ``init``, if the function needs one.

    Raises:
        ImportError: If dm-haiku is not installed.
        TypeError: If ``transformed`` is not a transformed function.
        MissingContext: If the function needs a name that the Context does not have.
        ValueError: If, when applied, the function changes the structure of its state, or the state of a frozen module.

    Examples:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from kaun import interop
        >>> def forward(x, is_training):
        ...     x = hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), is_training)
        ...     return jax.nn.relu(x)
        >>> model = interop.haiku(hk.transform_with_state(forward), jnp.ones((1, 2)))
        >>> variables = model.init(dtype=jnp.float32)
        >>> {name: sorted(values) for name, values in variables.params.items()}
        {'batch_norm': ['offset', 'scale'], 'linear': ['b', 'w']}
        >>> sorted(variables.state["batch_norm/~/mean_ema"])
        ['average', 'counter', 'hidden']
    """
    hk = optional_package("interop.haiku", "haiku", "haiku")
    adapter = _Adapter(hk, transformed, zeros(sample), ctx or Context())
    return Layer(init=adapter.init, apply=adapter.apply, name=adapter.name)


class _Adapter:
    def __init__(self, hk: Any, transformed: Any, sample: Any, ctx: Context) -> None:
        if not isinstance(transformed, (hk.Transformed, hk.TransformedWithState)):
            called = getattr(transformed, "__name__", "f")
            if isinstance(transformed, (hk.MultiTransformed, hk.MultiTransformedWithState)):
                kind = type(transformed).__name__.removeprefix("Multi")
                raise TypeError(
                    f"haiku expected one function, received a {type(transformed).__name__}, which has several. Choose "
                    f'one: interop.haiku(hk.{kind}(multi.init, multi.apply["encode"]), x), or multi.apply.encode.'
                )
            raise TypeError(
                "haiku expected a function transformed by hk.transform or hk.transform_with_state, received "
                f"{tree.describe(transformed)}. Write interop.haiku(hk.transform_with_state({called}), x)."
            )
        self.hk, self.sample, self.ctx, self.warned = hk, sample, ctx, False
        self.stateful = isinstance(transformed, hk.TransformedWithState)
        self.function = transformed if self.stateful else _WithEmptyState(transformed)
        self.keyed = _takes_key(transformed, 1 + self.stateful)
        original = inspect.signature(transformed.apply)
        self.keywords = Keywords.of(transformed.apply, 2 + self.stateful + self.keyed)
        self.name = "haiku(" + ", ".join(list(original.parameters)[1 + self.stateful + self.keyed :]) + ")"

    def init(self, *, dtype: Any) -> Vars:
        # In training mode, as in Haiku's examples: running averages exist only after an update.
        words = self.keywords.values(training=True, ctx=self.ctx)
        params, state = self.function.init(rng.next_key(), self.sample, **words)
        return Vars(
            params=cast_floats(plain(params), dtype),
            state=cast_floats(plain(state), accumulation_dtype(dtype)),
            dtype=dtype,
        )

    def apply(self, vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        words = self.keywords.values(training=training, ctx=ctx)
        call = lambda *key: self.function.apply(vars.params, vars.state, *key, x, **words)
        with naming_parts(self.name, self.hk.Module, _path_of):
            if training:
                y, after = self.trained(vars, call)
            elif not self.keyed:
                y, after = call()
            else:
                y, after = self.evaluated(call)
        fix = "Give hk.get_state and hk.set_state the same shape at init and in every call."
        filled = self.keywords.counts_filled_rows(training=training, ctx=ctx)
        return y, vars.replace(state=check_structure(self.name, vars.state, plain(after), fix, filled=filled))

    def trained(self, vars: Vars, call: Callable[..., Any]) -> tuple[Any, Any]:
        """The output in training, and the state after it."""
        frozen = FrozenParts(_by_path(vars.params))

        def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            name = getattr(context.module, "module_name", None)  # None in the module's __init__
            part = None if name is None else frozen.part(tuple(name.split("/")))
            if part is None:
                return run(*args, **kwargs)

            def refuse(_: Any, value: Any, state: Any) -> Any:
                what = f"changes its state {state.full_name!r}"
                raise frozen_error(self.name, part, what, "interop.haiku({}, x)")

            with self.hk.custom_setter(refuse):
                return run_in_evaluation(context.module, context.orig_method, run, *args, **kwargs)

        with self.hk.intercept_methods(intercept) if frozen else contextlib.nullcontext():
            return call(rng.next_key()) if self.keyed else call()

    def evaluated(self, call: Callable[..., Any]) -> tuple[Any, Any]:
        """The output in evaluation, and the state after it."""
        try:
            return call(None)
        except ValueError as error:
            if type(error).__name__ != "MissingRNGError":
                raise
        # Most functions draw nothing in evaluation, and then no key is drawn, which would need an open scope.
        result = call(rng.next_key())
        if not self.warned:
            self.warned = True
            warn(
                f"{here(self.name)} asks for a random key in evaluation mode. If that is for dropout, dropout stays on "
                "in predict: give the function a keyword argument for the mode, is_training, and write "
                "hk.dropout(hk.next_rng_key(), rate, x) if is_training else x."
            )
        return result

    def export(self, vars: Vars) -> Any:
        return (vars.params, vars.state) if self.stateful else vars.params


class _WithEmptyState:
    """As ``hk.with_empty_state``, which needs a mark on the functions that those of ``hk.multi_transform`` lack."""

    def __init__(self, transformed: Any) -> None:
        self._transformed = transformed

    def init(self, *args: Any, **words: Any) -> tuple[Any, Any]:
        return self._transformed.init(*args, **words), {}

    def apply(self, params: Any, state: Any, *args: Any, **words: Any) -> tuple[Any, Any]:
        return self._transformed.apply(params, *args, **words), state


def _path_of(module: Any) -> tuple[str] | None:
    name = getattr(module, "module_name", None)  # None in the module's __init__
    return None if name is None else (name,)


def _by_path(values: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of Haiku's dicts by their paths, in which a module's name is one key for each module around it."""
    return {(*name.split("/"), *inner): leaf for (name, *inner), leaf in leaves_by_path(values).items()}


def _takes_key(transformed: Any, held: int) -> bool:
    """Return whether ``apply`` takes a key after the ``held`` arguments for params and state, whatever its name is."""
    init, apply = (list(inspect.signature(f).parameters.values()) for f in (transformed.init, transformed.apply))
    if any(p.kind is p.VAR_POSITIONAL for p in (*init, *apply)):
        return [p.name for p in apply[held : held + 1]] == ["rng"]
    return len(apply) - held == len(init)  # init takes a key and then the inputs

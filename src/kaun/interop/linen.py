"""Flax Linen modules as layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kaun import rng, tree
from kaun._calls import public
from kaun._messages import add_note, optional_package
from kaun.context import Context
from kaun.interop.frozen import FrozenParts, frozen_error, run_in_evaluation
from kaun.interop.keywords import (
    SWITCHES,
    Keywords,
    cast_floats,
    check_method,
    check_structure,
    leaves_by_path,
    origins,
    plain,
    zeros,
)
from kaun.interop.parts import naming_parts
from kaun.layers.arguments import accumulation_dtype
from kaun.layers.core import Layer, Vars
from kaun.layers.path import here

__all__ = ["linen"]


@public
def linen(
    module: Any,
    sample: Any,
    *,
    ctx: Context | None = None,
    method: Any = None,
    drop: Sequence[str] = ("intermediates",),
    keep: Sequence[str] = (),
) -> Layer[Any, Any]:
    """Make a layer of a Flax Linen module; its initial values are those of ``module.init(rng.next_key(), sample)``.

    The params are the collection ``"params"``. The state is all other collections, such as ``state["batch_stats"]``,
    except those in ``drop`` and ``keep``. ``init(dtype=...)`` casts floating params to its dtype, and floating state to
    float32 or wider, as Flax keeps it.

    In training the collections of the state are mutable, and random streams receive keys from kaun's RNG scope:
    ``"dropout"`` the first, all others the second. In evaluation the state is not mutable, and keys are drawn only if
    the module asks for one. Under ``Trainer(trainable=...)`` a submodule whose parameters are all frozen runs in
    evaluation mode: its switches are set where its methods are called.

    The mode is a keyword argument of the module's call, ``training``, ``train``, ``is_training``, ``deterministic``,
    ``use_running_average`` or ``inference``, or else a field of the module with one of these names. Other keyword
    arguments receive the value of that name in the Context.

    Args:
        module: An ``nn.Module``.
        sample: An input for ``init``: arrays, or ``jax.ShapeDtypeStruct`` in place of arrays.
        ctx: A Context for ``init``, if the module needs one.
        method: What to call instead of the module: a method's name, or a function of module and input.
        drop: Collections that are discarded. Default: ``"intermediates"``, which ``sow`` collects.
        keep: Collections that the module sows and the loss needs, such as ``"losses"``. The output is then the pair
            ``(y, {"losses": ...})``, of what the module returned and what it sowed. Default: none.

    Raises:
        ImportError: If flax is not installed.
        TypeError: If ``module`` is not a Linen module, or takes the entries of a ``sample`` that is a dict one by one.
        MissingContext: If the call needs a name that the Context does not have.
        ValueError: If a collection is in ``drop`` and in ``keep``; when applied, if the call changes the structure of
            its state, sows nothing in a collection of ``keep``, draws from the stream ``"dropout"`` in evaluation, or
            changes the state of a frozen submodule.

    Examples:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> from kaun import interop
        >>> class MLP(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train: bool):
        ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        ...         return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        >>> model = interop.linen(MLP(), jnp.ones((1, 2)))
        >>> variables = model.init(dtype=jnp.float32)
        >>> sorted(variables.params), sorted(variables.state["batch_stats"]["BatchNorm_0"])
        (['BatchNorm_0', 'Dense_0'], ['mean', 'var'])
        >>> model.apply(variables, jnp.ones((4, 2)), training=True)[0].shape
        (4, 3)
    """
    flax = optional_package("interop.linen", "flax.linen", "flax")
    drop, keep = ([names] if isinstance(names, str) else list(names) for names in (drop, keep))
    both = [name for name in keep if name in (*drop, "params")]
    if both:
        raise ValueError(
            f"linen(drop={drop}, keep={keep}): keep= names collections that the module sows and the loss needs, and "
            f"{both[0]!r} is {'the parameters' if both[0] == 'params' else 'in drop= too'}. Write "
            'interop.linen(module, x, drop=(), keep=["losses"]), for example.'
        )
    adapter = _Adapter(flax, module, zeros(sample), ctx or Context(), check_method(method, "linen"), drop, keep)
    return Layer(init=adapter.init, apply=adapter.apply, name=adapter.name)


class _Adapter:
    def __init__(
        self, flax: Any, module: Any, sample: Any, ctx: Context, method: Any, drop: list[str], keep: list[str]
    ) -> None:
        _check(flax, module)
        self.flax, self.module, self.sample, self.ctx, self.drop, self.keep = flax, module, sample, ctx, drop, keep
        self.errors = optional_package("interop.linen", "flax.errors", "flax")
        self.name = f"linen({type(module).__name__})"
        self.method = method
        # Read from the class, because Flax binds what is read from an instance. A class without __call__ has that of
        # its metaclass.
        found = callable(module) if method is None else True
        call = method if callable(method) else getattr(type(module), method or "__call__", None) if found else None
        if call is None:
            raise TypeError(
                f"{self.name} has no {method or '__call__'}, so there is nothing to apply. Name the method that is "
                'the forward pass: interop.linen(module, x, method="encode").'
            )
        self.keywords = Keywords.of(call, 2)
        _check_inputs(self.name, self.keywords.required, sample, ctx)
        words = self.keywords.required
        self.fields = [f for f in SWITCHES if f in module.__dataclass_fields__ and f not in words]

    def init(self, *, dtype: Any) -> Vars:
        module, words = self.called(False, self.ctx)
        made = module.init(rng.next_key(), self.sample, **words)
        variables = plain(self.flax.meta.unbox(made))
        params = cast_floats(variables.pop("params", {}), dtype)
        kept = {name: value for name, value in variables.items() if name not in (*self.drop, *self.keep)}
        return Vars(params=params, state=cast_floats(kept, accumulation_dtype(dtype)), dtype=dtype)

    def apply(self, vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        module, words = self.called(training, ctx)
        variables = {"params": vars.params, **vars.state}
        with naming_parts(self.name, self.flax.Module, self.path_of, collections=True):
            run = self.trained if training else self.evaluated
            y, after = run(module, variables, x, words)
        sown = {name: after.pop(name, {}) for name in self.keep}
        y = (y, sown) if self.keep else y
        if not training:
            return y, vars
        empty = [name for name in self.keep if not sown[name]]
        if empty:
            raise ValueError(
                f"{here(self.name)} sowed nothing in {empty[0]!r}, which keep= names. Name a collection that it sows: "
                f"self.sow({empty[0]!r}, name, value) belongs to interop.linen(module, x, keep=[{empty[0]!r}])."
            )
        fix = (
            "If it is a collection that the module sows, interop.linen(module, x, keep=[...]) returns it with the "
            "output, (y, {...}), so that the loss can add it; drop=[...] discards it."
        )
        filled = self.keywords.counts_filled_rows(training=training, ctx=ctx)
        return y, vars.replace(state=check_structure(self.name, vars.state, after, fix, filled=filled))

    def trained(self, module: Any, variables: Any, x: Any, words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The output in training, and the collections that may change."""
        state = [name for name in variables if name != "params"]
        frozen = FrozenParts(leaves_by_path(variables["params"]))

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            part, scope = frozen.part(context.module.path), context.module.scope
            if part is None or scope is None:
                return call(*args, **kwargs)
            mutable, scope.mutable = scope.mutable, self.keep  # as in evaluation
            try:
                return run_in_evaluation(context.module, context.orig_method, call, *args, **kwargs)
            except self.errors.ModifyScopeVariableError as error:
                what = f"changes its state ({error})"
                raise frozen_error(self.name, part, what, "interop.linen({}, x)") from error
            finally:
                scope.mutable = mutable

        with self.flax.intercept_methods(intercept) if frozen else contextlib.nullcontext():
            y, after = module.apply(variables, x, rngs=_keys(), mutable=[*state, *self.keep], **words)
        return y, plain(after)

    def evaluated(self, module: Any, variables: Any, x: Any, words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The output in evaluation, and the collections that are returned with it."""

        def run(**rngs: Any) -> tuple[Any, dict[str, Any]]:
            y, after = module.apply(variables, x, mutable=self.keep, **rngs, **words)
            return y, plain(after)

        try:
            return run()
        except self.errors.InvalidRngError:
            # Most modules draw nothing in evaluation, and then no key is drawn, which would need an open scope.
            with self.flax.intercept_methods(self.refuse_dropout):
                return run(rngs=_keys())
        except self.errors.ModifyScopeVariableError as error:
            add_note(
                error,
                f"{self.name} was run in evaluation mode, where its state may not change. Give its __call__ a "
                "keyword argument for the mode, train: bool, and write nn.BatchNorm(use_running_average=not train).",
            )
            raise

    def refuse_dropout(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Call a module's method in evaluation, where it must not draw from the stream of dropout."""
        counters = context.module.scope.rng_counters if context.module.scope is not None else {}
        before = counters.get("dropout", 0)
        y = call(*args, **kwargs)
        if counters.get("dropout", 0) != before:
            where = ".".join(context.module.path) or type(context.module).__name__
            raise ValueError(
                f"{here(self.name)}: {where!r} draws from the stream 'dropout' in evaluation mode, so dropout would "
                "stay on in predict. Give the model's __call__ a keyword argument for the mode, train: bool, and write "
                "nn.Dropout(rate, deterministic=not train). Noise that belongs to evaluation has a stream with another "
                'name: self.make_rng("noise").'
            )
        return y

    def path_of(self, module: Any) -> Any:
        return None if module.scope is None else module.path

    def called(self, training: bool, ctx: Context) -> tuple[Any, dict[str, Any]]:
        """The module in this mode, and the keywords to call it with."""
        words = self.keywords.values(training=training, ctx=ctx)
        if self.method is not None:
            words["method"] = self.method
        fields = {field: SWITCHES[field] is training for field in self.fields}
        return self.module.clone(**fields) if fields else self.module, words

    def export(self, vars: Vars) -> Any:
        return {"params": vars.params, **vars.state}


def _keys() -> dict[str, Any]:
    # Flax uses the stream "params" in place of one that is missing. Its key differs from that of "dropout": each stream
    # counts its own draws, so two streams with one key would draw the same numbers.
    return {"dropout": rng.next_key(), "params": rng.next_key()}


def _check_inputs(name: str, required: Mapping[str, bool], sample: Any, ctx: Context) -> None:
    """Refuse a dict or a tuple of inputs for a call that takes them one by one: it would be the first of them."""
    needed = [key for key, is_needed in required.items() if is_needed and key not in SWITCHES and key not in ctx]
    if isinstance(sample, Mapping) and len(sample) > 1:
        needed, words = [key for key in sample if key in needed], [f"{k}=x[{k!r}]" for k in sample]
        received = "a dict with that name"
    elif type(sample) in (tuple, list) and len(sample) == 1 + len(needed):
        words, received = ["*x"], f"a {type(sample).__name__} of {len(sample)}"
    else:
        return
    if needed:
        modes = [key for key, is_needed in required.items() if is_needed and key in SWITCHES]
        taken, passed = ", ".join(["module, x", *modes]), ", ".join([*words, *[f"{m}={m}" for m in modes]])
        raise TypeError(
            f"{name} takes {', '.join(map(repr, needed))} as an argument of its own, and a layer has one input, here "
            f"{received}. Write interop.linen(module, x, method=lambda {taken}: module({passed}))."
        )


def _check(flax: Any, module: Any) -> None:
    if isinstance(module, flax.Module):
        return
    received, fix = f"received {tree.describe(module)}", "Write interop.linen(Model(), x)."
    if isinstance(module, type) and issubclass(module, flax.Module):
        received = f"received the class {module.__name__}"
        fix = f"Pass an instance: interop.linen({module.__name__}(...), x)."
    elif "flax.nnx.module" in origins(module):
        received, fix = f"{received}, an NNX module", "Write interop.flax_nnx(module)."
    raise TypeError(f"linen expected a flax.linen.Module, {received}. {fix}")

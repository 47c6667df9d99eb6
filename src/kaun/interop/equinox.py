"""Equinox modules as layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import jax

from kaun import rng, tree
from kaun._calls import public
from kaun._messages import optional_package
from kaun.context import Context
from kaun.interop.frozen import FrozenParts, check_unchanged
from kaun.interop.keywords import (
    Keywords,
    cast_floats,
    check_method,
    check_structure,
    key_path,
    nested,
    pick,
)
from kaun.interop.parts import by_identity, naming_parts
from kaun.layers.core import Layer, Vars
from kaun.layers.path import here

__all__ = ["equinox"]

Path = tuple[Any, ...]


@public
def equinox(
    module: Any,
    state: Any = None,
    *,
    axis_name: Hashable = "batch",
    vmap: bool = True,
    method: Any = None,
) -> Layer[Any, Any]:
    """Make a layer of an Equinox module; its initial values are those of the module.

    The params are what Equinox differentiates, floating arrays, by the module's attributes:
    ``params["layers"][0]["weight"]``. The state is all other arrays, which do not change, and the entries of an
    ``eqx.nn.State``, by the path of their ``StateIndex``. Fields and leaves that are not JAX arrays are static.
    ``init(dtype=...)`` casts all floating arrays to its dtype, as ``eqx.nn.BatchNorm(dtype=...)`` does.

    An Equinox module takes one example, so it is vmapped over axis 0 of ``x``. The vmapped axis is named ``axis_name``,
    which ``eqx.nn.BatchNorm`` needs, and ``key`` is split among the examples. ``key`` comes from kaun's RNG scope; in
    evaluation it is not passed if it has a default.

    In training the module runs as it was passed, in evaluation as ``eqx.nn.inference_mode(module)``. A part whose
    parameters are all frozen by ``Trainer(trainable=...)`` is in inference mode in training too.

    Other keyword arguments of the module's call receive the mode (``training``, ``train``, ``is_training``,
    ``deterministic``, ``use_running_average``, ``inference``) or the value of that name in the Context: scalars are
    passed to all examples, other arrays are split along axis 0 as ``x`` is.

    Args:
        module: An ``eqx.Module``, or any pytree that can be called.
        state: Its ``eqx.nn.State``, if ``eqx.nn.make_with_state`` made both.
        axis_name: The name of the batch axis. Default: ``"batch"``.
        vmap: Whether the module is vmapped; with False it receives the whole of ``x``. Default: True.
        method: What to call instead of the module: a method's name, or a function of module and input.

    Raises:
        ImportError: If equinox is not installed.
        TypeError: If ``module`` cannot be called, or ``state`` is not an ``eqx.nn.State``.
        ValueError: If the module's state is missing; when applied, if ``x`` has no batch axis, or the call changes the
            state of a frozen part.

    Examples:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from kaun import interop
        >>> class MLP(eqx.Module):
        ...     linear: eqx.nn.Linear
        ...     norm: eqx.nn.BatchNorm
        ...     def __init__(self, key):
        ...         self.linear = eqx.nn.Linear(2, 3, key=key)
        ...         self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
        ...     def __call__(self, x, state):
        ...         x, state = self.norm(self.linear(x), state)
        ...         return jax.nn.relu(x), state
        >>> model = interop.equinox(*eqx.nn.make_with_state(MLP)(jax.random.key(0)))
        >>> variables = model.init(dtype=jnp.float32)
        >>> sorted(variables.params["linear"]), sorted(variables.state["norm"])
        (['bias', 'weight'], ['batch_counter', 'batch_state_index'])
        >>> y, after = model.apply(variables, jnp.ones((4, 2)), training=True)
        >>> y.shape, int(after.state["norm"]["batch_counter"])
        ((4, 3), 1)
    """
    eqx = optional_package("interop.equinox", "equinox", "equinox")
    adapter = _Adapter(eqx, module, state, check_method(method, "equinox"), axis_name if vmap else None, vmap)
    return Layer(init=adapter.init, apply=adapter.apply, name=adapter.name)


class _Adapter:
    """The functions of the layer: the module's structure, its leaves, and the paths of the leaves that are arrays."""

    def __init__(self, eqx: Any, module: Any, state: Any, method: Any, axis_name: Any, vmap: bool) -> None:
        _check(eqx, module, state)
        self.eqx, self.name = eqx, f"equinox({type(module).__name__})"
        self.method, self.axis_name, self.vmap = method, axis_name, vmap
        call = method if callable(method) else getattr(module, method or "__call__", None)
        if call is None:
            raise TypeError(
                f"{self.name} has no {method or '__call__'}, so there is nothing to apply. Name the method that is "
                'the forward pass: interop.equinox(module, method="encode").'
            )
        self.keywords = Keywords.of(call, 2 if callable(method) else 1)
        module, state = _with_state(eqx, module, state)
        pairs, self.structure = jax.tree_util.tree_flatten_with_path(module)
        self.leaves = [leaf for _, leaf in pairs]
        paths = [key_path(path) for path, _ in pairs]
        self.arrays = {i: paths[i] for i, leaf in enumerate(self.leaves) if eqx.is_array(leaf)}
        self.switches = _switches(eqx, module, dict(zip(paths, self.leaves, strict=True)))
        self.trained = {i for i in self.arrays if eqx.is_inexact_array(self.leaves[i])}
        self.state_leaves, self.state_structure = jax.tree_util.tree_flatten(state)
        self.state_paths = _state_paths(eqx, module, self.state_structure)
        needs = self.keywords.required.get("state")
        self.stateful = needs is not None and (needs or bool(self.state_leaves))
        if self.state_leaves and not self.stateful:
            raise TypeError(
                f"{self.name} has an eqx.nn.State, and its call takes no argument `state`. Write it as "
                "__call__(self, x, state) and return (y, state)."
            )

    def init(self, *, dtype: Any) -> Vars:
        params = {path: self.leaves[i] for i, path in self.arrays.items() if i in self.trained}
        kept = {path: self.leaves[i] for i, path in self.arrays.items() if i not in self.trained}
        kept |= dict(zip(self.state_paths, self.state_leaves, strict=True))
        return Vars(params=cast_floats(nested(params), dtype), state=cast_floats(nested(kept), dtype), dtype=dtype)

    def apply(self, vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        frozen = FrozenParts({path: pick(vars.params, path) for i, path in self.arrays.items() if i in self.trained})
        module, state = self.filled(vars, frozen if training else None)
        if not training:
            module = self.eqx.nn.inference_mode(module)
        words = self.keywords.values(training=training, ctx=ctx, without=("key", "state"))
        keyed = "key" in self.keywords.required and (training or self.keywords.required["key"])
        key = rng.next_key() if keyed else None
        find = by_identity(lambda: _modules(self.eqx, module))
        with naming_parts(self.name, self.eqx.Module, find, output=self.without_state):
            y, state = self.called(module, state, x, key, words)
        if not self.stateful:
            return y, vars
        fix = "Return the eqx.nn.State that the call received, with the same entries."
        leaves, structure = jax.tree_util.tree_flatten(state)
        if structure != self.state_structure:
            raise ValueError(
                f"{here(self.name)} expected {self.state_structure} as the state after its call, received {structure}. "
                + fix
            )
        after = {path: pick(vars.state, path) for i, path in self.arrays.items() if i not in self.trained}
        after |= dict(zip(self.state_paths, leaves, strict=True))
        if training and frozen:
            before = {path: pick(vars.state, path) for path in after}
            check_unchanged(self.name, frozen.part, before, after, "interop.equinox({})")
        filled = self.keywords.counts_filled_rows(training=training, ctx=ctx)
        return y, vars.replace(state=check_structure(self.name, vars.state, nested(after), fix, filled=filled))

    def without_state(self, result: Any) -> Any:
        pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], self.eqx.nn.State)
        return result[0] if pair else result

    def called(self, module: Any, state: Any, x: Any, key: Any, words: dict[str, Any]) -> tuple[Any, Any]:
        def one(x: Any, state: Any, key: Any, words: dict[str, Any]) -> tuple[Any, Any]:
            if self.stateful:
                words = {**words, "state": state}
            if key is not None:
                words = {**words, "key": key}
            method: Any = self.method
            if not callable(method):
                result: Any = getattr(module, method or "__call__")(x, **words)
            else:
                result = method(module, x, **words)
            return result if self.stateful else (result, None)

        if not self.vmap:
            return one(x, state, key, words)
        size = self.size(x)
        keys = None if key is None else jax.random.split(key, size)
        axes = jax.tree_util.tree_map(lambda a: 0 if jax.numpy.ndim(a) else None, words)
        spread = jax.vmap(one, in_axes=(0, None, 0, axes), out_axes=(0, None), axis_name=self.axis_name)
        return spread(x, state, keys, words)

    def size(self, x: Any) -> int:
        """The number of examples."""
        shapes = [jax.numpy.shape(leaf) for leaf in jax.tree_util.tree_leaves(x)]
        if not shapes or not shapes[0]:
            raise ValueError(
                f"{here(self.name)} expected a batch, [batch, ...], received {tree.describe(x)}: it is vmapped over "
                "axis 0. Add the axis, x[None], or write interop.equinox(module, vmap=False)."
            )
        return shapes[0][0]

    def filled(self, vars: Vars, frozen: FrozenParts | None = None) -> tuple[Any, Any]:
        """The module and its ``eqx.nn.State`` with the values of ``vars``; frozen parts are in inference mode."""
        leaves = list(self.leaves)
        for i, (owner, value) in self.switches.items():
            if frozen is not None and frozen.part(owner) is not None:
                leaves[i] = value
        for i, path in self.arrays.items():
            leaves[i] = pick(vars.params if i in self.trained else vars.state, path)
        state = jax.tree_util.tree_unflatten(self.state_structure, [pick(vars.state, p) for p in self.state_paths])
        return jax.tree_util.tree_unflatten(self.structure, leaves), state

    def export(self, vars: Vars) -> Any:
        module, state = self.filled(vars)
        return (module, state) if self.stateful else module


def _switches(eqx: Any, module: Any, leaves: dict[Path, Any]) -> dict[int, tuple[Path, Any]]:
    """By position among the leaves: the module that a switch belongs to, and its value in inference mode.

    The rate of a dropout is one too: an argument ``inference=False``, handed down through the calls, would override
    the attribute.
    """
    dropout = lambda node: isinstance(node, eqx.nn.Dropout)
    nodes, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=dropout)
    rates = {(*key_path(path), "p") for path, node in nodes if dropout(node)}
    values = {"inference": True, "p": 0.0}
    return {
        i: (path[:-1], values[path[-1]])
        for i, (path, leaf) in enumerate(leaves.items())
        if (path[-1:] == ("inference",) and isinstance(leaf, bool)) or (path in rates and isinstance(leaf, float))
    }


def _modules(eqx: Any, module: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The modules inside a module, and it itself, with their paths."""
    inner = lambda node: node is not module and isinstance(node, eqx.Module)
    yield path, module
    for below, node in jax.tree_util.tree_flatten_with_path(module, is_leaf=inner)[0]:
        if inner(node):
            yield from _modules(eqx, node, (*path, *key_path(below)))


def _indices(eqx: Any, module: Any) -> dict[Path, Any]:
    """The ``StateIndex`` at each path."""
    index = lambda leaf: isinstance(leaf, eqx.nn.StateIndex)
    pairs, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=index)
    return {key_path(path): leaf for path, leaf in pairs if index(leaf)}


def _with_state(eqx: Any, module: Any, state: Any) -> tuple[Any, Any]:
    """The module without its initial states, and its ``eqx.nn.State``."""
    if state is not None:
        return eqx.nn.delete_init_state(module), state
    try:
        state = eqx.nn.State(module)
    except ValueError:
        raise ValueError(
            f"equinox received a {type(module).__name__} without its eqx.nn.State: eqx.nn.make_with_state returns "
            f"both. Write interop.equinox(*eqx.nn.make_with_state({type(module).__name__})(key))."
        ) from None
    return eqx.nn.delete_init_state(module), state


def _state_paths(eqx: Any, module: Any, structure: Any) -> list[Path]:
    """The path of each leaf of an ``eqx.nn.State``: that of its ``StateIndex`` in the module."""
    numbered = jax.tree_util.tree_unflatten(structure, range(structure.num_leaves))
    paths: dict[int, Path] = {}
    for path, index in _indices(eqx, module).items():
        for inner, number in jax.tree_util.tree_flatten_with_path(numbered.get(index))[0]:
            paths.setdefault(number, (*path, *key_path(inner)))
    return [paths.get(number, ("state", number)) for number in range(structure.num_leaves)]


def _check(eqx: Any, module: Any, state: Any) -> None:
    if isinstance(module, tuple):
        raise TypeError(
            "equinox expected a module, received a tuple. If eqx.nn.make_with_state returned module and state, "
            "write interop.equinox(*eqx.nn.make_with_state(Model)(key))."
        )
    if isinstance(module, type):
        raise TypeError(
            f"equinox expected a module, received the class {module.__name__}. Pass an instance: "
            f"interop.equinox({module.__name__}(..., key=jax.random.key(0)))."
        )
    if state is not None and not isinstance(state, eqx.nn.State):
        raise TypeError(
            f"equinox(module, state) expected an eqx.nn.State, received {tree.describe(state)}. Write "
            "interop.equinox(*eqx.nn.make_with_state(Model)(key))."
        )

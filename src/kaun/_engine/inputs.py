"""StepInputs: the arrays of one item, and the key of the program that can run it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun._engine.explicit import explicit_mesh, to_automatic
from kaun._jax import any_traced, is_traced, type_of
from kaun._loss import array_names, capture_loss, captures, subject
from kaun._messages import locate
from kaun.context import Context
from kaun.data import Data, Item, is_explicit, is_tensor

__all__ = [
    "StepInputs", "as_arrays", "check_input", "is_host", "is_number", "joined", "pattern_for", "refuse_traced",
    "rows_at",
]  # fmt: skip

_LEAF = jax.tree_util.tree_structure(0)
_NO_CONTEXT = jax.tree_util.tree_structure(Context())
_NOT_NUMBERS = "OSUMmT"  # kinds of NumPy dtypes
# Types seen to be JAX arrays of numbers; the class itself is not public, and isinstance of jax.Array takes 0.3 us.
# Arrays of typed PRNG keys are of another class, which has no attribute weak_type, and traced ones have no sharding.
_array_types: set[type] = set()
# By the types in JAX's sense of arrays that are on no explicit axes: shape, dtype and whether that is weak. These are
# attributes in Python, of which each takes longer than the look into a dict.
_array_kinds: dict[Any, tuple[Any, ...]] = {}
_MOST_KINDS = 1024


class StepInputs:
    """One item as a compiled step takes it. NumPy arrays are the caller's own, and not copied yet.

    ``evaluate`` has a dict of x and y as x, which messages call an item, and a dict of frozen metrics as loss.

    Args:
        x: The model's input, any pytree of arrays.
        loss: A function of the model's output, None if the output itself is wanted.
        ctx: A Context, or None.
        what: The name of x in messages.

    Attributes:
        leaves: The arrays of input, loss and context, in this order.
        key: Hashable; inputs with equal keys run the same program.
        mesh: The mesh of explicit axes on which one of the arrays lay, None in the usual case. The leaves are on
            automatic axes.
        is_usual: Whether all leaves are arrays of usual kinds, with numbers: none is traced.

    Raises:
        CaptureError: As ``capture_loss``.
        TypeError: If a leaf is not an array of numbers.
    """

    __slots__ = ("is_usual", "key", "leaves", "mesh", "static", "what")
    what: str
    leaves: list[Any]
    static: tuple[Any, ...]
    key: tuple[Any, ...]
    mesh: Any
    is_usual: bool

    def __init__(self, x: Any, loss: Any, ctx: Context | None, what: str = "x") -> None:
        # Run for each item: a call of a function costs 0.1 us, so the usual cases are decided here.
        loss_key, arrays = capture_loss(loss) if loss is not None else (None, [])
        known, array = _array_types, np.ndarray
        if type(x) in known or (type(x) is array and x.dtype.kind not in _NOT_NUMBERS):
            leaves, x_def, n = [x, *arrays], _LEAF, 1
        else:
            leaves, x_def = _flatten(x, what)
            n = len(leaves)
            leaves = [*leaves, *arrays]
        ctx_def = _NO_CONTEXT
        if ctx is not None:
            more, ctx_def = _flatten(ctx, "ctx")
            leaves += more
        kinds: list[Any] = []
        a: Any
        maybe_explicit, self.is_usual = False, True
        for a in leaves:
            if type(a) in known:
                kind = _array_kinds.get(type_of(a))
                if kind is None:
                    kind, maybe_explicit = _kind_of_array(a), True
                kinds.append(kind)
            elif type(a) is array:
                kinds.append((a.shape, a.dtype))
            else:
                kinds.append(_kind(a))
                maybe_explicit, self.is_usual = True, False
        self.what, self.mesh = what, explicit_mesh(leaves) if maybe_explicit else None
        self.leaves = leaves if self.mesh is None else to_automatic(leaves)
        self.static = (loss_key, x_def, ctx_def, n, len(arrays))
        self.key = (self.static, tuple(kinds))

    def owned(self) -> list[Any]:
        """Return the leaves as they are now: NumPy arrays copied, because XLA may read them after the call returned."""
        return [tree.snapshot(a) for a in self.leaves]

    def with_leaves(self, leaves: list[Any]) -> StepInputs:
        """Return inputs of the same kind with these arrays, which are on automatic axes."""
        made = copy.copy(self)
        made.leaves, made.mesh = leaves, None
        return made

    @property
    def split(self) -> Callable[[list[Any]], tuple[Any, list[Any], Context]]:
        """A function from leaves in this order to input, captured arrays and context. It holds no array.

        Leaves become JAX arrays. Those of a compiled function are; under ``jax.disable_jit`` they arrive as they were.
        """
        return functools.partial(_split_arrays, self.static)

    def length(self, axis: int = 0) -> int | None:
        """The length of x's first array along an axis, None if it has none."""
        shape = np.shape(self.leaves[0]) if self.static[3] else ()
        return shape[axis] if len(shape) > axis else None

    @property
    def examples(self) -> int | None:
        """The length of x's first array along its first axis, None if it has none."""
        return self.length()

    @property
    def row_mask(self) -> int | None:
        """Which leaf is the context's ``row_mask``, False for rows that fill a batch; None if there is none.

        It is an array [batch], or [members, batch] where each member of an ensemble has a batch.
        """
        i = _split(self.static, list(range(len(self.leaves))))[2].get("row_mask")
        shape = np.shape(self.leaves[i]) if isinstance(i, int) else ()
        return i if shape and self.static[3] and shape == np.shape(self.leaves[0])[: len(shape)] else None

    @property
    def loss_key(self) -> Any:
        """The static part of the loss, as ``capture_loss`` returned it."""
        return self.static[0]

    @property
    def subject(self) -> Any:
        """The user's code of the loss, None without a loss."""
        return subject(self.loss_key) if self.loss_key is not None else None

    @property
    def code(self) -> str:
        """The name, file and line of the loss, empty without a loss."""
        return locate(self.subject) if self.subject is not None else ""

    def names(self) -> list[str]:
        """Return for each leaf what it is: ``"x"``, ``"y, captured by the loss"``, ``"ctx['mask']"``."""
        loss_key, _, _, _, captured = self.static
        x, _, ctx = _split(self.static, self.leaves)
        names = [f"{self.what}.{path}" if path else self.what for path in tree.flatten(x)[0]]
        names += [f"{name}, captured by the loss" for name in array_names(loss_key, captured)] if captured else []
        return [*names, *[f"ctx[{path!r}]" for path in tree.flatten(ctx)[0]]]

    def describe(self) -> dict[str, str]:
        """Return all that the program depends on, by name, in words."""
        x, arrays, ctx = _split(self.static, self.leaves)
        words = {f"{self.what}.{p}" if p else self.what: _describe(a) for p, a in tree.flatten(x)[0].items()}
        words |= {f"ctx[{p!r}]": _describe(a) for p, a in tree.flatten(ctx)[0].items()}
        if self.loss_key is not None:
            words |= {f"captured {n}": v for n, v in captures(self.loss_key, arrays).items()}
        return words


def _split(static: tuple[Any, ...], leaves: list[Any]) -> tuple[Any, list[Any], Context]:
    _, x_def, ctx_def, n, m = static
    join = jax.tree_util.tree_unflatten
    return join(x_def, leaves[:n]), leaves[n : n + m], join(ctx_def, leaves[n + m :])


def _split_arrays(static: tuple[Any, ...], leaves: list[Any]) -> tuple[Any, list[Any], Context]:
    return _split(static, as_arrays(leaves))


def as_arrays(leaves: Sequence[Any]) -> list[Any]:
    """Return leaves as JAX arrays; those that are one stay the same object."""
    return [a if isinstance(a, jax.Array) else jnp.asarray(a) for a in leaves]


def refuse_traced(values: Iterable[Any], entry: str = "fit") -> None:
    """Check that ``fit``, or ``evaluate``, received no traced array.

    Raises:
        TypeError: If one of the values is traced: it was called inside a function that JAX traces.
    """
    if not any_traced(values):
        return
    if entry == "evaluate":
        raise TypeError(
            "evaluate was called inside a function that JAX traces (jit, grad, vmap, scan): it adds up its results in "
            "Python, and there they have no numbers. Call evaluate outside of that function. Inside of it, the metric "
            "of one batch is metric(trainer.predict(state, x), y)."
        )
    raise TypeError(
        "fit was called inside a function that JAX traces (jit, grad, vmap, scan): it runs its steps from Python "
        "and reads their results, and there they have no numbers. Call fit outside of that function. Inside of it, "
        "one step is loss, state = trainer.step(state, x, loss=loss), and many are\n"
        "    state, losses = jax.lax.scan(lambda state, x: trainer.step(state, x, loss=loss)[::-1], state, xs)"
    )


def is_host(leaf: Any) -> bool:
    """Return whether a leaf is a NumPy array, which its owner may change after the call."""
    return isinstance(leaf, (np.ndarray, np.generic))


def is_number(leaf: Any) -> bool:
    """Return whether a leaf is a Python number, which has a type but no dtype."""
    return isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)


def check_input(x: Any) -> None:
    """Check an input of the model of which only shapes and dtypes are used, arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        TypeError: If a leaf is something else.
    """
    _flatten(jax.tree_util.tree_map(lambda leaf: 0 if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, x), "x")


def _flatten(value: Any, what: str) -> tuple[list[Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten(value)
    for leaf in leaves:
        if type(leaf) not in _array_types and not (type(leaf) is np.ndarray and leaf.dtype.kind not in _NOT_NUMBERS):
            if not _is_numeric(leaf):
                raise _not_numbers(value, what)
            if isinstance(leaf, jax.Array) and not tree.is_key(leaf) and not is_traced(leaf):
                _array_types.add(type(leaf))
    return leaves, treedef


def _is_numeric(leaf: Any) -> bool:
    if is_host(leaf):
        return leaf.dtype.kind not in _NOT_NUMBERS and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


def _not_numbers(value: Any, what: str) -> TypeError:
    path, leaf = next((p, v) for p, v in tree.flatten(value)[0].items() if not _is_numeric(v))
    kind = "a masked array" if isinstance(leaf, np.ma.MaskedArray) else "an array"
    received = f"{kind} of dtype {leaf.dtype}" if tree.is_array(leaf) else type(leaf).__name__
    fix = "Convert it, np.asarray(value, np.float32), or remove it from the batch."
    if tree.is_array(leaf) and leaf.dtype == object:
        fix = "Its elements are objects, for example arrays of different shapes: pad them to one shape in data.map(f)."
    elif dataclasses.is_dataclass(leaf):
        kind = type(leaf).__name__
        fix = f"Register it as a pytree, jax.tree_util.register_dataclass({kind}); the model then receives the {kind}."
    elif Item.is_training_item(value):
        fix = "That is an item of the data of fit: write x, loss, *ctx = item, and pass x."
    elif isinstance(leaf, Data):
        fix = "A Data holds many items: pass one, x = next(iter(data)), or x, *_ = next(iter(data)) of pairs."
    elif is_tensor(leaf):
        fix = "Data.from_iterable(loader) converts the tensors of another library to arrays."
    return TypeError(
        f"{what}{f' at {path!r}' if path else ''} expected a NumPy or JAX array of numbers, received {received}. {fix}"
    )


def _kind_of_array(a: Any) -> tuple[Any, ...]:
    """The kind of a JAX array, kept by the array's type unless that has explicit axes."""
    kind = a.shape, a.dtype, a.weak_type
    if not is_explicit(a):
        while len(_array_kinds) >= _MOST_KINDS:
            _array_kinds.pop(next(iter(_array_kinds)), None)
        _array_kinds[type_of(a)] = kind
    return kind


def _kind(a: Any) -> tuple[Any, ...]:
    if isinstance(a, jax.Array):
        return a.shape, a.dtype, tree.is_weak(a)
    return (a.shape, a.dtype) if is_host(a) else (type(a),)


def _describe(a: Any) -> str:
    return tree.describe(a) + (" (weak)" if tree.is_weak(a) else "")


def pattern_for(patterns: list[tuple[bool, ...]], varying: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return which leaves of a block to stack where some vary: as in an earlier block, where that is possible.

    Args:
        patterns: Those so far; a new one is appended.
        varying: For each leaf whether it varies.
    """
    if patterns and patterns[-1] == varying:
        return varying
    for known in reversed(patterns):
        if all(k or not v for k, v in zip(known, varying, strict=True)):
            return known
    patterns.append(varying)
    return varying


def rows_at(i: Any, stacked: Sequence[Any]) -> list[Any]:
    """Return the stacked leaves of item i of a block in a program."""
    return [lax.dynamic_index_in_dim(stack, i, keepdims=False) for stack in stacked]


def joined(pattern: Sequence[bool], shared: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
    """Return the leaves of an item in a program, of those passed once and those of a stack's row by a pattern."""
    given, sliced = iter(shared), iter(rows)
    return [next(sliced if is_stacked else given) for is_stacked in pattern]

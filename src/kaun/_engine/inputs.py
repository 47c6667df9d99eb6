"""What one call of a compiled step brings: its arrays, and the static key that decides which program can run it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._loss import capture_loss, captures, subject
from kaun._messages import locate
from kaun.context import Context
from kaun.data import is_tensor

__all__ = ["StepInputs", "is_host", "is_number"]

_LEAF = jax.tree_util.tree_structure(0)
_NO_CONTEXT = jax.tree_util.tree_structure(Context())
# Types seen to be JAX arrays; the class itself is not public, and isinstance of jax.Array takes 0.3 us.
_array_types: set[type] = set()


class StepInputs:
    """One item as a compiled step takes it. NumPy arrays are the caller's own and not copied yet.

    Arguments:
        x: the model's input, any tree of arrays.
        loss: a function of the model's output, None for the output itself.
        ctx: a Context, or None.
        what: the name of x in messages.

    For ``evaluate`` x is a dict of x and y, called an item in messages, and the loss a dict of frozen metrics.

    Attributes:
        leaves: the arrays of input, loss and context, in this order.
        key: hashable; calls with equal keys run the same program.

    Raises:
        CaptureError: as ``lift.take_apart``.
        TypeError: for what is not an array of numbers.
    """

    __slots__ = ("key", "leaves", "static", "what")
    what: str
    leaves: list[Any]
    static: tuple[Any, ...]
    key: tuple[Any, ...]

    def __init__(self, x: Any, loss: Any, ctx: Context | None, what: str = "x") -> None:
        loss_key, arrays = capture_loss(loss) if loss is not None else (None, [])
        self.what = what
        xs, x_def = _leaves(x, what)
        cs, ctx_def = _leaves(ctx, "ctx") if ctx is not None else ([], _NO_CONTEXT)
        self.leaves = [*xs, *arrays, *cs]
        self.static = (loss_key, x_def, ctx_def, len(xs), len(arrays))
        self.key = (self.static, tuple([_kind(a) for a in self.leaves]))

    def owned(self) -> list[Any]:
        """The leaves as they are now: NumPy arrays copied, because XLA may read them after the call has returned."""
        return [tree.snapshot(a) for a in self.leaves]

    @property
    def split(self) -> Callable[[list[Any]], tuple[Any, list[Any], Context]]:
        """A function from leaves in this order to input, captured arrays and context. It holds no array."""
        return functools.partial(_split, self.static)

    @property
    def examples(self) -> int | None:
        """The length of x's first array along its first axis, None where it has none."""
        shape = np.shape(self.leaves[0]) if self.static[3] else ()
        return shape[0] if shape else None

    @property
    def loss_key(self) -> Any:
        """The loss as ``lift.take_apart`` gave it."""
        return self.static[0]

    @property
    def subject(self) -> Any:
        """The user's code that the loss is about."""
        return subject(self.loss_key) if self.loss_key is not None else None

    @property
    def code(self) -> str:
        """Its name, file and line."""
        return locate(self.subject) if self.subject is not None else ""

    def words(self) -> dict[str, str]:
        """All that the program depends on, by name."""
        x, arrays, ctx = self.split(self.leaves)
        told = {f"{self.what}.{p}" if p else self.what: _tell(a) for p, a in tree.flatten(x)[0].items()}
        told |= {f"ctx[{p!r}]": _tell(a) for p, a in tree.flatten(ctx)[0].items()}
        if self.loss_key is not None:
            told |= {f"captured {n}": v for n, v in captures(self.loss_key, arrays).items()}
        return told


def _split(static: tuple[Any, ...], leaves: list[Any]) -> tuple[Any, list[Any], Context]:
    _, x_def, ctx_def, n, m = static
    join = jax.tree_util.tree_unflatten
    return join(x_def, leaves[:n]), leaves[n : n + m], join(ctx_def, leaves[n + m :])


def is_host(leaf: Any) -> bool:
    """Whether a leaf is an array of NumPy, which its owner may change after the call."""
    return isinstance(leaf, (np.ndarray, np.generic))


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a Python number, which has a type but no dtype."""
    return isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)


def _leaves(value: Any, what: str) -> tuple[list[Any], Any]:
    if type(value) in _array_types:
        return [value], _LEAF
    leaves, treedef = jax.tree_util.tree_flatten(value)
    for leaf in leaves:
        if not _is_numeric(leaf):
            raise _no_number(value, what)
        if isinstance(leaf, jax.Array):
            _array_types.add(type(leaf))
    return leaves, treedef


def _is_numeric(leaf: Any) -> bool:
    if is_host(leaf):
        return leaf.dtype.kind not in "OSUMmT" and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


def _no_number(value: Any, what: str) -> TypeError:
    path, leaf = next((p, v) for p, v in tree.flatten(value)[0].items() if not _is_numeric(v))
    kind = "a masked array" if isinstance(leaf, np.ma.MaskedArray) else "an array"
    received = f"{kind} of dtype {leaf.dtype}" if tree.is_array(leaf) else type(leaf).__name__
    fix = "Convert it, np.asarray(value, np.float32), or leave it out of the batch."
    if tree.is_array(leaf) and leaf.dtype == object:
        fix = "Such an array holds parts of different shapes, or no numbers: pad them to one shape in data.map(f)."
    elif dataclasses.is_dataclass(leaf):
        kind = type(leaf).__name__
        fix = f"Let JAX look into it, jax.tree_util.register_dataclass({kind}), and the model gets the {kind}."
    elif is_tensor(leaf):
        fix = "Data.from_iterable(loader) makes arrays of the tensors of another library."
    return TypeError(
        f"{what}{f' at {path!r}' if path else ''} expected a NumPy or JAX array of numbers, received {received}. {fix}"
    )


def _kind(a: Any) -> tuple[Any, ...]:
    if type(a) in _array_types:
        return a.shape, a.dtype, a.weak_type
    if isinstance(a, jax.Array):
        return a.shape, a.dtype, a.weak_type
    return (a.shape, a.dtype) if is_host(a) else (type(a),)


def _tell(a: Any) -> str:
    return tree.describe(a) + (" (weak)" if getattr(a, "weak_type", False) else "")

"""Rules that convert the names and the layout of another library's weights to kaun's; a list of rules is a mapping.

In the pattern of a rule the placeholder ``{x}`` matches one or more characters except dots, and ``{*x}`` one or more
characters of any kind; all other text matches itself. ``h.{i}.attn.{*rest}`` matches ``h.0.attn.c_proj.bias``.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kaun import tree
from kaun._calls import explained, shown
from kaun._messages import quoted

__all__ = [
    "Array", "Rule", "copy", "drop", "expression", "filled", "group_name", "placeholders", "rename", "split", "stack",
    "transpose",
]  # fmt: skip

Array = np.ndarray[Any, Any]
Change = Callable[[Mapping[str, Array]], Sequence[Array]]

_PLACEHOLDER = re.compile(r"\{(\*?)(\w*)\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of a mapping, made by ``rename``, ``transpose``, ``split``, ``stack``, ``copy`` or ``drop``.

    Its ``repr`` is that call.

    Attributes:
        call: The call that makes the rule, as text.
        pattern: Which weights it matches.
        names: The new name of each array that the rule makes of a weight, with the placeholders of the pattern.
        change: The function from weights by name to the arrays of ``names``: one weight, or all that are stacked.
        undo: The inverse of ``change``: from the arrays by their new names to the weights.
        needed: Whether ``into`` requires that the rule matches a weight.
        index: The placeholder of the pattern that numbers the weights which are stacked. Empty for other rules.

    Examples:
        >>> from kaun.interop.safetensors import rename
        >>> rename("bert.{*x}", "{*x}")
        rename('bert.{*x}', '{*x}')
    """

    call: str
    pattern: str
    names: tuple[str, ...]
    change: Change = dataclasses.field(compare=False)
    undo: Change = dataclasses.field(compare=False)
    needed: bool = False
    index: str = ""

    def __repr__(self) -> str:
        return self.call


@explained("interop.safetensors.rename")
def rename(pattern: str, template: str) -> Rule:
    """Make a rule that renames weights.

    Args:
        pattern: It must match the whole name. ``{x}`` matches one or more characters except dots, ``{*x}`` one or more
            characters of any kind.
        template: The new name, with the placeholders of the pattern.

    Raises:
        TypeError: If an argument is not a string.
        ValueError: If a placeholder is malformed, or is in the template but not in the pattern.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> from kaun import layers
        >>> from kaun.interop import safetensors
        >>> weights = {"norm.0.gamma": np.full(2, 3.0, np.float32)}
        >>> mapping = [safetensors.rename("norm.{i}.gamma", "{i}.weight")]
        >>> model = layers.sequential([layers.rms_norm(2)])
        >>> safetensors.into(model.init(dtype=jnp.float32), weights, mapping).params
        [{'weight': Array([3., 3.], dtype=float32)}]
    """
    return _rule(f"rename({pattern!r}, {template!r})", pattern, (template,), _same, _same)


@explained("interop.safetensors.transpose")
def transpose(pattern: str, axes: Sequence[int] | None = None) -> Rule:
    """Make a rule that permutes the axes of weights, as ``np.transpose`` does.

    The weights of linear layers are ``[out, in]`` in PyTorch and ``[in, out]`` in kaun; those of convolutions are OIHW
    in PyTorch and HWIO in kaun: ``transpose("{*x}.conv.weight", (2, 3, 1, 0))``. A square weight that is not transposed
    has the right shape, so that the mistake cannot be detected. Therefore ``into`` requires that each ``transpose``
    matches a weight.

    Args:
        pattern: Which weights, as in ``rename``.
        axes: The new order of the axes. Default: the reverse order, which does not change vectors.

    Raises:
        TypeError: If the pattern is not a string.
        ValueError: If a placeholder is malformed; when applied, if ``axes`` do not fit a weight.

    Examples:
        >>> from kaun.interop import safetensors
        >>> safetensors.transpose("{*x}.conv.weight", (2, 3, 1, 0))
        transpose('{*x}.conv.weight', (2, 3, 1, 0))
    """
    order = None if axes is None else _ints("transpose(pattern, axes)", axes, "(1, 0)")
    call = f"transpose({pattern!r}{'' if order is None else f', {order}'})"
    change, undo = (functools.partial(_transposed, call, order, back) for back in (False, True))
    return _rule(call, pattern, (pattern,), change, undo, needed=True)


@explained("interop.safetensors.split")
def split(pattern: str, into: Sequence[str], axis: int = -1, sizes: Sequence[int] | None = None) -> Rule:
    """Make a rule that splits a weight into several, such as a joint projection to queries, keys and values.

    Args:
        pattern: Which weights, as in ``rename``.
        into: The new name of each part, as ``template`` of ``rename``.
        axis: The axis that is split. Default: the last.
        sizes: The length of each part along the axis. Default: equal parts.

    Raises:
        TypeError: If the pattern or a template is not a string, or ``into`` is one.
        ValueError: If a placeholder is malformed, or ``sizes`` and ``into`` have different lengths; when applied, if a
            weight does not have the axis, or its length is not the sum of the sizes.

    Examples:
        >>> from kaun.interop import safetensors
        >>> safetensors.split("{*x}.qkv.bias", ["{*x}.q.bias", "{*x}.k.bias", "{*x}.v.bias"])
        split('{*x}.qkv.bias', ['{*x}.q.bias', '{*x}.k.bias', '{*x}.v.bias'], axis=-1)
    """
    if isinstance(into, str) or not isinstance(into, Sequence):  # pyright: ignore
        one = repr(into) if isinstance(into, str) else "template"  # pyright: ignore
        raise TypeError(
            f"split(pattern, into) expected a list of templates, received {shown(into)}. Write [{one}, ...]."
        )
    templates, (axis,) = list(into), _ints("split(axis=...)", [axis], "axis=0")
    given = None if sizes is None else [*_ints("split(sizes=...)", sizes, "sizes=[4, 2]")]
    if not templates:
        raise ValueError("split(pattern, into) expected a template for each part, received none. Use drop(pattern).")
    call = f"split({pattern!r}, {templates!r}, axis={axis}{'' if given is None else f', sizes={given}'})"
    if given is not None and len(given) != len(templates):
        raise ValueError(
            f"{call}: into has {len(templates)} templates, and sizes has {len(given)} entries. Give one size for each "
            "template."
        )
    change = functools.partial(_cut, call, len(templates), axis, given)
    return _rule(call, pattern, tuple(templates), change, functools.partial(_joined, call, axis))


@explained("interop.safetensors.stack")
def stack(pattern: str, template: str) -> Rule:
    """Make a rule that stacks the weights of numbered layers into one array with a new first axis.

    It makes the variables of ``layers.repeat`` from those of single layers.

    Args:
        pattern: Which weights, as in ``rename``. One placeholder, ``{i}``, is not in the template: it is the number of
            the layer, and the numbers must be 0, 1, ..., n - 1.
        template: The name of the stacked array, with the other placeholders of the pattern.

    Raises:
        TypeError: If an argument is not a string.
        ValueError: If a placeholder is malformed, or not exactly one ``{i}`` of the pattern is missing in the template;
            when applied, if a number is missing, or shapes or dtypes differ.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> from kaun import layers
        >>> from kaun.interop import safetensors
        >>> weights = {f"h.{i}.{name}": np.full(2, i, np.float32) for i in range(3) for name in ("weight", "bias")}
        >>> model = layers.repeat(layers.layer_norm(2), 3)
        >>> loaded = safetensors.into(model.init(), weights, [safetensors.stack("h.{i}.{x}", "{x}")])
        >>> loaded.params["weight"].tolist()
        [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    """
    call = f"stack({pattern!r}, {template!r})"
    rule = _rule(call, pattern, (template,), functools.partial(_stacked, call), functools.partial(_unstacked, call))
    index = placeholders(pattern) - placeholders(template)
    if len(index) != 1 or (name := index.pop()).startswith("{*"):
        raise ValueError(
            f"{call}: the number of the layer must be one placeholder, such as {{i}}, that is in the pattern and not "
            "in the template. Write stack('h.{i}.{*x}', 'h.{*x}')."
        )
    return dataclasses.replace(rule, index=name)


@explained("interop.safetensors.copy")
def copy(pattern: str, template: str) -> Rule:
    """Make a rule that gives weights a second name, for a model that has the array twice.

    The usual case is a tied head: the file has the array once, as the embedding, and the model has a head with its own
    array. ``save`` writes it once again, if both are still equal.

    Args:
        pattern: Which weights, as in ``rename``. They keep their names.
        template: The second name, with the placeholders of the pattern.

    Raises:
        TypeError: If an argument is not a string.
        ValueError: If a placeholder is malformed, or is in the template but not in the pattern.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> from kaun import layers
        >>> from kaun.interop import safetensors
        >>> model = layers.sequential({"wte": layers.embedding(5, 2), "head": layers.linear(2, 5, bias=False)})
        >>> mapping = [safetensors.copy("wte.weight", "head.weight"), safetensors.transpose("head.weight")]
        >>> weights = {"wte.weight": np.ones((5, 2), np.float32)}
        >>> safetensors.into(model.init(dtype=jnp.float32), weights, mapping).params["head"]["weight"].shape
        (2, 5)
    """
    call = f"copy({pattern!r}, {template!r})"
    return _rule(call, pattern, (pattern, template), _twice, functools.partial(_once, call))


@explained("interop.safetensors.drop")
def drop(pattern: str) -> Rule:
    """Make a rule that removes weights which the model does not use.

    Args:
        pattern: Which weights, as in ``rename``.

    Raises:
        TypeError: If the pattern is not a string.
        ValueError: If a placeholder is malformed.

    Examples:
        >>> from kaun.interop import safetensors
        >>> safetensors.drop("pooler.{*x}")
        drop('pooler.{*x}')
    """
    return _rule(f"drop({pattern!r})", pattern, (), _nothing, _nothing)


def _ints(call: str, values: Any, like: str) -> tuple[int, ...]:
    try:
        if isinstance(values, str):
            raise TypeError
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise TypeError(f"{call} expected ints, received {shown(values)}. Write {like}, for example.") from None


def _rule(
    call: str,
    pattern: Any,
    templates: tuple[Any, ...],
    change: Change,
    undo: Change,
    needed: bool = False,
) -> Rule:
    for text in (pattern, *templates):
        if not isinstance(text, str):
            raise TypeError(f"{call} expected strings, received {type(text).__name__}. Write '{{*x}}' for any name.")
        if wrong := re.search(r"[{}]", _PLACEHOLDER.sub("", text)) or re.search(r"\{\*?(\d\w*)?\}", text):
            raise ValueError(
                f"{call}: {wrong[0]!r} in {text!r} is not a placeholder. Write {{x}} for one or more characters except "
                "dots, {*x} for one or more characters of any kind, with a name in the braces."
            )
    known = placeholders(pattern)
    for template in templates:
        unknown = [place[0] for place in _PLACEHOLDER.finditer(template) if place[0] not in known]
        if unknown:
            raise ValueError(
                f"{call}: {template!r} has {unknown[0]}, which is not in the pattern {pattern!r}; that has "
                f"{', '.join(sorted(known)) or 'no placeholders'}. Write the same placeholder in both."
            )
    return Rule(call, pattern, templates, change, undo, needed)


def placeholders(text: str) -> set[str]:
    """The placeholders of a pattern or a template, as they are written: ``{i}``, ``{*x}``."""
    return {place[0] for place in _PLACEHOLDER.finditer(text)}


@functools.cache
def expression(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression; a placeholder that occurs twice matches the same text twice."""
    parts: list[str] = []
    end, seen = 0, set[str]()
    for place in _PLACEHOLDER.finditer(pattern):
        group = group_name(place[0])
        parts.append(re.escape(pattern[end : place.start()]))
        parts.append(f"(?P={group})" if group in seen else f"(?P<{group}>{'.+' if place[1] else '[^.]+'})")
        seen.add(group)
        end = place.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]), re.DOTALL)


def filled(template: str, texts: Mapping[str, str]) -> str:
    """The template with the texts that placeholders matched, by the names of ``expression``'s groups."""
    return _PLACEHOLDER.sub(lambda place: texts[group_name(place[0])], template)


def group_name(placeholder: str) -> str:
    """The name of the group of ``expression`` that a placeholder is."""
    return ("any_" if placeholder.startswith("{*") else "one_") + placeholder.strip("{*}")


def _same(weights: Mapping[str, Array]) -> Sequence[Array]:
    return [*weights.values()]


def _nothing(weights: Mapping[str, Array]) -> Sequence[Array]:
    return ()


def _twice(weights: Mapping[str, Array]) -> Sequence[Array]:
    return [*weights.values()] * 2


def _once(call: str, weights: Mapping[str, Array]) -> Sequence[Array]:
    (first, a), (second, b) = weights.items()
    if tree.describe(a) != tree.describe(b) or a.tobytes() != b.tobytes():
        raise ValueError(
            f"{call} cannot be undone: {quoted(first)}, {tree.describe(a)}, and {quoted(second)}, {tree.describe(b)}, "
            "are not equal, and the file has one array for both. Save without this rule, so that the file has both; or "
            "use one array in the model: layers.module(parts, forward), where forward reads m.params."
        )
    return (a,)


def _stacked(call: str, weights: Mapping[str, Array]) -> Sequence[Array]:
    (first, a), *others = weights.items()
    for name, array in others:
        if tree.describe(array) != tree.describe(a):
            raise ValueError(
                f"{call}: {quoted(first)} is {tree.describe(a)}, and {quoted(name)} is {tree.describe(array)}. Only "
                "arrays of one shape and dtype can be stacked: make the pattern narrower."
            )
    return (np.stack([*weights.values()]),)


def _unstacked(call: str, weights: Mapping[str, Array]) -> Sequence[Array]:
    ((name, array),) = weights.items()
    if not array.ndim:
        raise ValueError(
            f"{call} cannot be undone: {quoted(name)} is {tree.describe(array)} and has no axis of layers. Pass "
            "variables of the model that the mapping is for."
        )
    return [*array]


def _transposed(call: str, axes: tuple[int, ...] | None, back: bool, weights: Mapping[str, Array]) -> Sequence[Array]:
    ((name, array),) = weights.items()
    try:
        if back and axes is not None:
            axes = tuple(sorted(range(len(axes)), key=[axis % len(axes) for axis in axes].__getitem__))
        return (np.transpose(array, axes),)
    except ValueError as err:
        raise ValueError(
            f"{call}: {quoted(name)} is {tree.describe(array)}, {err}. Give each of its axes once."
        ) from err


def _joined(call: str, axis: int, weights: Mapping[str, Array]) -> Sequence[Array]:
    try:
        return (np.concatenate([*weights.values()], axis),)
    except ValueError as err:
        found = ", ".join(f"{quoted(name)} is {tree.describe(array)}" for name, array in weights.items())
        raise ValueError(
            f"{call} cannot be undone: {found}; {err}. Pass variables of the model that the mapping is for."
        ) from err


def _cut(call: str, parts: int, axis: int, sizes: list[int] | None, weights: Mapping[str, Array]) -> Sequence[Array]:
    ((name, array),) = weights.items()
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(
            f"{call}: {quoted(name)} is {tree.describe(array)} and has no axis {axis}. Give another axis=."
        )
    length = array.shape[axis]
    if sizes is None and length % parts:
        raise ValueError(
            f"{call}: axis {axis} of {quoted(name)}, {tree.describe(array)}, cannot be split into {parts} equal parts. "
            "Give sizes=[...], or another axis=."
        )
    each = [length // parts] * parts if sizes is None else sizes
    if sum(each) != length or min(each) < 0:
        raise ValueError(
            f"{call}: axis {axis} of {quoted(name)}, {tree.describe(array)}, has {length}, and the sizes add up to "
            f"{sum(each)}. Give sizes that make {length}."
        )
    return np.split(array, [int(n) for n in np.cumsum(each)[:-1]], axis=axis)

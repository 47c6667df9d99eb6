"""Mappings: lists of rules that give the weights of another library kaun's names and layout.

In a rule's pattern ``{x}`` stands for one or more characters without a dot, ``{*x}`` for one or more of any; all else
stands for itself. ``h.{i}.attn.{*rest}`` matches ``h.0.attn.c_proj.bias``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kaun import tree

__all__ = ["Array", "Rule", "drop", "mapped", "rename", "split", "transpose", "unmatched"]

Array = np.ndarray[Any, Any]

_PLACE = re.compile(r"\{(\*?)(\w*)\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of a mapping, made by ``rename``, ``transpose``, ``split`` or ``drop``: a value that prints as its call.

    >>> from kaun.interop.safetensors import rename
    >>> rename("bert.{*x}", "{*x}")
    rename('bert.{*x}', '{*x}')
    """

    call: str
    pattern: str
    names: tuple[str, ...]
    change: Callable[[str, Array], Sequence[Array]] = dataclasses.field(compare=False)
    needed: bool = False

    def __repr__(self) -> str:
        return self.call


def rename(pattern: str, template: str) -> Rule:
    """The rule that gives weights another name: ``template`` with the parts that ``pattern`` found.

    Arguments:
        pattern: the whole of a name; ``{x}`` is one or more characters without a dot, ``{*x}`` one or more of any.
        template: the new name, with the same places.

    Raises:
        TypeError: an argument that is not a string.
        ValueError: a place that is not written as above, or stands in the template alone.

    >>> import jax.numpy as jnp, numpy as np
    >>> from kaun import layers
    >>> from kaun.interop import safetensors
    >>> weights = {"norm.0.gamma": np.full(2, 3.0, np.float32)}
    >>> mapping = [safetensors.rename("norm.{i}.gamma", "{i}.weight")]
    >>> model = layers.sequential([layers.rms_norm(2)])
    >>> safetensors.into(model.init(dtype=jnp.float32), weights, mapping).params
    [{'weight': Array([3., 3.], dtype=float32)}]
    """
    return _rule(f"rename({pattern!r}, {template!r})", pattern, (template,), _same)


def transpose(pattern: str, axes: Sequence[int] | None = None) -> Rule:
    """The rule that permutes the axes of weights, as ``np.transpose`` does.

    PyTorch's linear layers have ``[out, in]`` and kaun's ``[in, out]``; PyTorch's convolutions have OIHW and kaun's
    HWIO: ``transpose("{*x}.conv.weight", (2, 3, 1, 0))``. A square weight that should have been transposed has the
    right shape all the same, and no error can say so; so ``into`` wants each ``transpose`` to match something.

    Arguments:
        pattern: which weights, as in ``rename``.
        axes: the new order of the axes; default the reverse one. Vectors stay as they are then.

    Raises:
        TypeError: a pattern that is not a string.
        ValueError: a place that is not written as in ``rename``; applied, ``axes`` that do not fit a weight.

    >>> from kaun.interop import safetensors
    >>> safetensors.transpose("{*x}.conv.weight", (2, 3, 1, 0))
    transpose('{*x}.conv.weight', (2, 3, 1, 0))
    """
    order = None if axes is None else tuple(axes)
    call = f"transpose({pattern!r}{'' if order is None else f', {order}'})"
    return _rule(call, pattern, (pattern,), functools.partial(_transposed, call, order), needed=True)


def split(pattern: str, into: Sequence[str], axis: int = -1, sizes: Sequence[int] | None = None) -> Rule:
    """The rule that makes several weights of one: of a joint projection to queries, keys and values, say.

    Arguments:
        pattern: which weights, as in ``rename``.
        into: a template for each part, as in ``rename``.
        axis: the axis that is cut, default the last one.
        sizes: how much of it each part gets; default the same.

    Raises:
        TypeError: a pattern or a template that is not a string, or ``into`` that is one.
        ValueError: a place that is not written as in ``rename``, ``sizes`` of another number than ``into``; applied,
            an axis that a weight does not have, or that cannot be cut like this.

    >>> from kaun.interop import safetensors
    >>> safetensors.split("{*x}.qkv.bias", ["{*x}.q.bias", "{*x}.k.bias", "{*x}.v.bias"])
    split('{*x}.qkv.bias', ['{*x}.q.bias', '{*x}.k.bias', '{*x}.v.bias'], axis=-1)
    """
    if isinstance(into, str):
        raise TypeError(f"split(pattern, into) expected a list of templates, received {into!r}. Write [{into!r}, ...].")
    templates, given = list(into), None if sizes is None else list(sizes)
    if not templates:
        raise ValueError("split(pattern, into) expected a template for each part, received none. Use drop(pattern).")
    call = f"split({pattern!r}, {templates!r}, axis={axis}{'' if given is None else f', sizes={given}'})"
    if given is not None and len(given) != len(templates):
        raise ValueError(f"{call}: into names {len(templates)} parts, and sizes has {len(given)}. Give one for each.")
    change = functools.partial(_cut, call, len(templates), axis, given)
    return _rule(call, pattern, tuple(templates), change)


def drop(pattern: str) -> Rule:
    """The rule that leaves weights out, for those that the model has no use for.

    Raises:
        TypeError: a pattern that is not a string.
        ValueError: a place that is not written as in ``rename``.

    >>> from kaun.interop import safetensors
    >>> safetensors.drop("pooler.{*x}")
    drop('pooler.{*x}')
    """
    return _rule(f"drop({pattern!r})", pattern, (), _nothing)


def mapped(weights: Mapping[str, Any], mapping: Sequence[Rule]) -> tuple[dict[str, Array], dict[str, str], list[int]]:
    """The weights by their new names, the old name of each, and the places of the rules that matched none."""
    named = {name: np.asarray(array) for name, array in weights.items()}
    origins = {name: name for name in named}
    idle: list[int] = []
    for place, rule in enumerate(mapping):
        if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"safetensors.into expected a list of rules as mapping, received {type(rule).__name__} in it. Write "
                "mapping=[rename(pattern, template), ...]."
            )
        before, came, expression = named, origins, _expression(rule.pattern)
        named, origins, matched = {}, {}, False
        for name, array in before.items():
            match = expression.fullmatch(name)
            matched = matched or match is not None
            names = (name,) if match is None else [_filled(template, match) for template in rule.names]
            for new, part in zip(names, (array,) if match is None else rule.change(name, array), strict=True):
                if new in named:
                    raise ValueError(
                        f"safetensors.into: {rule} gives {came[name]!r} the name {new!r}, which {origins[new]!r} has. "
                        "Make its pattern narrower, or drop(pattern) one of the two first."
                    )
                named[new], origins[new] = part, came[name]
        if not matched:
            idle.append(place)
    return named, origins, idle


def unmatched(place: int, weights: Mapping[str, Any], mapping: Sequence[Rule]) -> str:
    """What to say of the rule at ``place`` of the mapping, which matches nothing."""
    rule, present = mapping[place], list(mapped(weights, mapping[:place])[0])
    near = difflib.get_close_matches(rule.pattern, present, n=3, cutoff=0.3) or present[:3]
    return (
        f"safetensors.into: rule {place} of the mapping, {rule}, matches no weight; where shapes fit by chance, "
        f"nothing else would show it. Of {len(present)} names, as the rules before it left them, near it: "
        f"{', '.join(map(repr, near)) or 'none'}. Correct its pattern, or take the rule out."
    )


def _rule(
    call: str,
    pattern: Any,
    templates: tuple[Any, ...],
    change: Callable[[str, Array], Sequence[Array]],
    needed: bool = False,
) -> Rule:
    for text in (pattern, *templates):
        if not isinstance(text, str):
            raise TypeError(f"{call} expected strings, received {type(text).__name__}. Write '{{*x}}' for any name.")
        if wrong := re.search(r"[{}]", _PLACE.sub("", text)) or re.search(r"\{\*?(\d\w*)?\}", text):
            raise ValueError(
                f"{call}: {wrong[0]!r} in {text!r} is no place. Write {{x}} for one or more characters without a dot, "
                "{*x} for one or more of any, with a name in the braces."
            )
    known = {place[0] for place in _PLACE.finditer(pattern)}
    for template in templates:
        strange = [place[0] for place in _PLACE.finditer(template) if place[0] not in known]
        if strange:
            raise ValueError(
                f"{call}: {template!r} has {strange[0]}, which the pattern {pattern!r} has not: it has "
                f"{', '.join(sorted(known)) or 'no places'}. Write the same place in both."
            )
    return Rule(call, pattern, templates, change, needed)


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression; a place that stands twice is the same text twice."""
    parts: list[str] = []
    end, seen = 0, set[str]()
    for place in _PLACE.finditer(pattern):
        group = f"any_{place[2]}" if place[1] else f"one_{place[2]}"
        parts.append(re.escape(pattern[end : place.start()]))
        parts.append(f"(?P={group})" if group in seen else f"(?P<{group}>{'.+' if place[1] else '[^.]+'})")
        seen.add(group)
        end = place.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]), re.DOTALL)


def _filled(template: str, match: re.Match[str]) -> str:
    return _PLACE.sub(lambda place: match[f"any_{place[2]}" if place[1] else f"one_{place[2]}"], template)


def _same(name: str, array: Array) -> Sequence[Array]:
    return (array,)


def _nothing(name: str, array: Array) -> Sequence[Array]:
    return ()


def _transposed(call: str, axes: tuple[int, ...] | None, name: str, array: Array) -> Sequence[Array]:
    try:
        return (np.transpose(array, axes),)
    except ValueError as err:
        raise ValueError(f"{call}: {name!r} is {tree.describe(array)}, {err}. Give each of its axes once.") from err


def _cut(call: str, parts: int, axis: int, sizes: list[int] | None, name: str, array: Array) -> Sequence[Array]:
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{call}: {name!r} is {tree.describe(array)} and has no axis {axis}. Give another axis=.")
    length = array.shape[axis]
    if sizes is None and length % parts:
        raise ValueError(
            f"{call}: axis {axis} of {name!r}, {tree.describe(array)}, cannot be cut into {parts} equal parts. Give "
            "sizes=[...], or another axis=."
        )
    each = [length // parts] * parts if sizes is None else sizes
    if sum(each) != length or min(each) < 0:
        raise ValueError(
            f"{call}: axis {axis} of {name!r}, {tree.describe(array)}, has {length}, and the sizes add up to "
            f"{sum(each)}. Give sizes that make {length}."
        )
    return np.split(array, [int(n) for n in np.cumsum(each)[:-1]], axis=axis)

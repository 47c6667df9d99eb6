"""Rules that convert the names and the layout of another library's weights to kaun's; a list of rules is a mapping.

In the pattern of a rule the placeholder ``{x}`` matches one or more characters except dots, and ``{*x}`` one or more
characters of any kind; all other text matches itself. ``h.{i}.attn.{*rest}`` matches ``h.0.attn.c_proj.bias``.
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
from kaun._messages import quoted

__all__ = ["COMPARED", "LONGEST", "Array", "Rule", "drop", "mapped", "rename", "split", "transpose", "unmatched"]

Array = np.ndarray[Any, Any]

COMPARED, LONGEST = 1000, 200  # names, and characters of each, among which near ones are looked for
_PLACEHOLDER = re.compile(r"\{(\*?)(\w*)\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of a mapping, made by ``rename``, ``transpose``, ``split`` or ``drop``. Its ``repr`` is that call.

    Attributes:
        call: The call that makes the rule, as text.
        pattern: Which weights it matches.
        names: The new name of each array that the rule makes of a weight, with the placeholders of the pattern.
        change: The function from a weight's name and array to those arrays.
        needed: Whether ``into`` requires that the rule matches a weight.

    Examples:
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
    return _rule(f"rename({pattern!r}, {template!r})", pattern, (template,), _same)


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
    order = None if axes is None else tuple(axes)
    call = f"transpose({pattern!r}{'' if order is None else f', {order}'})"
    return _rule(call, pattern, (pattern,), functools.partial(_transposed, call, order), needed=True)


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
    if isinstance(into, str):
        raise TypeError(f"split(pattern, into) expected a list of templates, received {into!r}. Write [{into!r}, ...].")
    templates, given = list(into), None if sizes is None else list(sizes)
    if not templates:
        raise ValueError("split(pattern, into) expected a template for each part, received none. Use drop(pattern).")
    call = f"split({pattern!r}, {templates!r}, axis={axis}{'' if given is None else f', sizes={given}'})"
    if given is not None and len(given) != len(templates):
        raise ValueError(
            f"{call}: into has {len(templates)} templates, and sizes has {len(given)} entries. Give one size for each "
            "template."
        )
    change = functools.partial(_cut, call, len(templates), axis, given)
    return _rule(call, pattern, tuple(templates), change)


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
    return _rule(f"drop({pattern!r})", pattern, (), _nothing)


def mapped(weights: Mapping[str, Any], mapping: Sequence[Rule]) -> tuple[dict[str, Array], dict[str, str], list[int]]:
    """Apply a mapping: the weights by new name, the old name of each, and the indices of rules that matched none."""
    named = {name: np.asarray(array) for name, array in weights.items()}
    origins = {name: name for name in named}
    unused: list[int] = []
    for index, rule in enumerate(mapping):
        if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"safetensors.into expected a list of rules as mapping, received {type(rule).__name__} in it. Write "
                "mapping=[rename(pattern, template), ...]."
            )
        before, old, expression = named, origins, _expression(rule.pattern)
        named, origins, matched = {}, {}, False
        for name, array in before.items():
            match = expression.fullmatch(name)
            matched = matched or match is not None
            names = (name,) if match is None else [_filled(template, match) for template in rule.names]
            for new, part in zip(names, (array,) if match is None else rule.change(name, array), strict=True):
                if new in named:
                    raise ValueError(
                        f"safetensors.into: {rule} gives {quoted(old[name])} the name {quoted(new)}, which "
                        f"{quoted(origins[new])} already has. Make its pattern narrower, or drop(pattern) one of the "
                        "two first."
                    )
                named[new], origins[new] = part, old[name]
        if not matched:
            unused.append(index)
    return named, origins, unused


def unmatched(index: int, weights: Mapping[str, Any], mapping: Sequence[Rule]) -> str:
    """The error message for the rule at this index of the mapping, which matches nothing."""
    rule, present = mapping[index], list(mapped(weights, mapping[:index])[0])
    compared = [name for name in present[:COMPARED] if len(name) <= LONGEST]
    near = difflib.get_close_matches(rule.pattern, compared, n=3, cutoff=0.3) or present[:3]
    return (
        f"safetensors.into: rule {index} of the mapping, {rule}, matches no weight; if shapes fit by chance, nothing "
        f"else would show the mistake. The nearest of the {len(present)} names after the rules before it: "
        f"{', '.join(map(quoted, near)) or 'none'}. Correct its pattern, or remove the rule."
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
        if wrong := re.search(r"[{}]", _PLACEHOLDER.sub("", text)) or re.search(r"\{\*?(\d\w*)?\}", text):
            raise ValueError(
                f"{call}: {wrong[0]!r} in {text!r} is not a placeholder. Write {{x}} for one or more characters except "
                "dots, {*x} for one or more characters of any kind, with a name in the braces."
            )
    known = {place[0] for place in _PLACEHOLDER.finditer(pattern)}
    for template in templates:
        unknown = [place[0] for place in _PLACEHOLDER.finditer(template) if place[0] not in known]
        if unknown:
            raise ValueError(
                f"{call}: {template!r} has {unknown[0]}, which is not in the pattern {pattern!r}; that has "
                f"{', '.join(sorted(known)) or 'no placeholders'}. Write the same placeholder in both."
            )
    return Rule(call, pattern, templates, change, needed)


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression; a placeholder that occurs twice matches the same text twice."""
    parts: list[str] = []
    end, seen = 0, set[str]()
    for place in _PLACEHOLDER.finditer(pattern):
        group = f"any_{place[2]}" if place[1] else f"one_{place[2]}"
        parts.append(re.escape(pattern[end : place.start()]))
        parts.append(f"(?P={group})" if group in seen else f"(?P<{group}>{'.+' if place[1] else '[^.]+'})")
        seen.add(group)
        end = place.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]), re.DOTALL)


def _filled(template: str, match: re.Match[str]) -> str:
    return _PLACEHOLDER.sub(lambda place: match[f"any_{place[2]}" if place[1] else f"one_{place[2]}"], template)


def _same(name: str, array: Array) -> Sequence[Array]:
    return (array,)


def _nothing(name: str, array: Array) -> Sequence[Array]:
    return ()


def _transposed(call: str, axes: tuple[int, ...] | None, name: str, array: Array) -> Sequence[Array]:
    try:
        return (np.transpose(array, axes),)
    except ValueError as err:
        raise ValueError(
            f"{call}: {quoted(name)} is {tree.describe(array)}, {err}. Give each of its axes once."
        ) from err


def _cut(call: str, parts: int, axis: int, sizes: list[int] | None, name: str, array: Array) -> Sequence[Array]:
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

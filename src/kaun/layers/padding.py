"""The argument ``padding=`` of convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import jax
from jax import lax

from kaun import tree
from kaun._calls import shown
from kaun.layers.arguments import AXES, size
from kaun.layers.path import here

__all__ = ["Pads", "must_fit", "padding_of", "pads_of", "too_small"]

Pads: TypeAlias = "str | tuple[tuple[int, int], ...]"
"""A checked padding: a word, or what is added before and after each axis."""


def padding_of(head: str, padding: Any, axes: int, words: Sequence[str] = ("SAME", "VALID")) -> Pads:
    """Check an argument that is a word, an int for all ends, or a pair ``(before, after)`` for each axis.

    For a single axis the pair stands alone.

    Raises:
        TypeError: If it is none of them.
        ValueError: If it is another word, or a number is negative.
    """
    if isinstance(padding, str):
        return _word(head, padding, axes, words)
    if not isinstance(padding, Sequence):
        count = size(head, "padding", padding, 0)
        return ((count, count),) * axes
    each = cast("Sequence[Any]", padding)
    pairs = [each] if axes == 1 else list(each)
    if len(pairs) != axes or not all(map(_is_pair, pairs)):
        flat = len(pairs) == axes > 1 and not any(isinstance(p, Sequence) for p in pairs)
        like = tuple((p, p) for p in pairs) if flat else (1, 1) if axes == 1 else ((1, 1),) * axes
        raise TypeError(
            f"{head}(padding=...) expected {_forms(axes, words)}, received {shown(padding)}. Write padding={like!r}."
        )
    return tuple((size(head, "padding", low, 0), size(head, "padding", high, 0)) for low, high in pairs)


def _is_pair(value: Any) -> bool:
    if not isinstance(value, Sequence):
        return False
    ends = cast("Sequence[Any]", value)
    return len(ends) == 2 and not any(isinstance(end, Sequence) for end in ends)


def _forms(axes: int, words: Sequence[str]) -> str:
    pairs = "(before, after)" if axes == 1 else f"a pair (before, after) for each of {AXES[axes]}"
    return f"one of {', '.join(map(repr, words))}, an int, or {pairs}"


def _word(head: str, padding: str, axes: int, words: Sequence[str]) -> str:
    if padding not in words:
        hint = " Only conv1d has causal padding." if padding == "CAUSAL" else ""
        if padding.upper() in words:
            hint = f' Write padding="{padding.upper()}".'
        raise ValueError(
            f"{head}(padding=...) expected {_forms(axes, words)}, received {shown(padding)}.{hint} For "
            "padding with other "
            'numbers than zeros put layers.fn(lambda x: jnp.pad(x, ...)) before it and write padding="VALID".'
        )
    return padding


def pads_of(
    padding: Pads, shape: Sequence[int], spans: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return what a padding adds before and after each axis of these lengths."""
    if padding == "CAUSAL":
        return tuple((span - 1, 0) for span in spans)
    if isinstance(padding, str):
        return tuple((low, high) for low, high in lax.padtype_to_pads(shape, spans, stride, padding))
    return padding


def too_small(x: jax.Array, spans: Sequence[int], pads: Sequence[tuple[int, int]]) -> str:
    """Return the sizes that an input needs to hold a kernel with its padding, as text; empty where it has them."""
    needed = [max(span - low - high, 1) for span, (low, high) in zip(spans, pads, strict=True)]
    small = any(least > n for least, n in zip(needed, x.shape[1:-1], strict=True))
    return " x ".join(map(str, needed)) if small else ""


def must_fit(name: str, x: jax.Array, spans: Sequence[int], pads: Sequence[tuple[int, int]]) -> None:
    """Check that an input with its padding is at least as large as the kernel spans.

    Raises:
        ValueError: If it is smaller.
    """
    needed = too_small(x, spans, pads)
    if needed:
        padded = " beyond its padding" if any(map(sum, pads)) else ""
        raise ValueError(
            f"{here(name)} expected at least {needed} positions, which its kernel spans{padded}, "
            f'received {tree.describe(x)}. Write padding="SAME", or use a smaller kernel.'
        )

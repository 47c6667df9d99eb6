"""A mapping applied to weights, and its inverse, from variables to the weights."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from kaun import tree
from kaun._calls import shown
from kaun._messages import quoted
from kaun.interop.rules import Array, Rule, expression, filled, group_name, placeholders

__all__ = ["COMPARED", "LONGEST", "mapped", "unmapped", "unmatched"]

COMPARED, LONGEST = 1000, 200  # names, and characters of each, among which near ones are looked for
_LISTED = 5
_LIKE = "safetensors.save(path, vars, mapping, like=safetensors.load(original))"


class Group(NamedTuple):
    """Weights that a rule converts together: a single one, or all those that ``stack`` puts into one array.

    Attributes:
        old: Their names.
        new: The names of what is made of them.
        matched: Whether the rule matches them; if not, they keep their names.
    """

    old: list[str]
    new: list[str]
    matched: bool


def mapped(
    weights: Mapping[str, Any], mapping: Sequence[Rule], where: str = "into"
) -> tuple[dict[str, Array], dict[str, str], list[int]]:
    """Apply a mapping: the weights by new name, the old name of each, and the indices of rules that matched none."""
    _check_rules(mapping, where)
    _check_weights("safetensors.into(vars, weights)", weights)
    named = {name: np.asarray(array) for name, array in weights.items()}
    origins = {name: name for name in named}
    unused: list[int] = []
    for index, rule in enumerate(mapping):
        before, (named, groups) = origins, _applied(rule, named, origins, where)
        origins = {new: before[group.old[0]] for group in groups for new in group.new}
        if not any(group.matched for group in groups):
            unused.append(index)
    return named, origins, unused


def _check_weights(call: str, weights: Any) -> None:
    if not isinstance(weights, Mapping):
        fix = f"safetensors.load({weights!r})" if isinstance(weights, (str, os.PathLike)) else "{'0.weight': array}"
        raise TypeError(f"{call} expected arrays by name, received {type(weights).__name__}. Write {fix}.")
    for name in cast("Mapping[Any, Any]", weights):
        if not isinstance(name, str):
            raise TypeError(f"{call} expected names that are strings, received {shown(name)}. Write {str(name)!r}.")


def _check_rules(mapping: Any, where: str) -> None:
    if not isinstance(mapping, Sequence):
        one = repr(mapping) if isinstance(mapping, Rule) else "rename(pattern, template), ..."
        raise TypeError(
            f"safetensors.{where} expected a list of rules as mapping, received {type(mapping).__name__}. Write "
            f"mapping=[{one}]."
        )
    for rule in cast("Sequence[Any]", mapping):
        if not isinstance(rule, Rule):
            raise TypeError(
                f"safetensors.{where} expected a list of rules as mapping, received {type(rule).__name__} in it. Write "
                "mapping=[rename(pattern, template), ...]."
            )


def _applied(
    rule: Rule, named: Mapping[str, Array], origins: Mapping[str, str], where: str
) -> tuple[dict[str, Array], list[Group]]:
    """The weights after one rule, and which were made of which."""
    groups, after, made_of = _groups(rule, named), dict[str, Array](), dict[str, str]()
    for group in groups:
        old = {name: named[name] for name in group.old}
        parts = rule.change(old) if group.matched else [*old.values()]
        for new, part in zip(group.new, parts, strict=True):
            name = origins[group.old[0]]
            if new in after:
                raise ValueError(
                    f"safetensors.{where}: {rule} gives {quoted(name)} the name {quoted(new)}, which "
                    f"{quoted(made_of[new])} already has. Make its pattern narrower, or drop(pattern) one of the two "
                    "first."
                )
            after[new], made_of[new] = part, name
    return after, groups


def _groups(rule: Rule, names: Iterable[str]) -> list[Group]:
    groups: list[Group] = []
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = expression(rule.pattern).fullmatch(name)
        if match is None:
            groups.append(Group([name], [name], matched=False))
            continue
        texts = match.groupdict()
        new = [filled(template, texts) for template in rule.names]
        if not rule.index:
            groups.append(Group([name], new, matched=True))
            continue
        number = filled(rule.index, texts)
        if not (number.isdecimal() and number.isascii()):
            raise ValueError(
                f"{rule}: {quoted(name)} has {quoted(number)} in the place of {rule.index}, which is not the number of "
                "a layer. Make the pattern narrower."
            )
        if new[0] not in stacks:
            stacks[new[0]] = []
            groups.append(Group([], new, matched=True))
        stacks[new[0]].append((int(number), name))
    for group in groups:
        if rule.index and group.matched:
            group.old.extend(_in_order(rule, stacks[group.new[0]]))
    return groups


def _in_order(rule: Rule, numbered: list[tuple[int, str]]) -> list[str]:
    numbered = sorted(numbered)
    numbers = [number for number, _ in numbered]
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f"{rule} found the numbers {', '.join(map(str, numbers[:20]))} for {quoted(numbered[0][1])} and those like "
            f"it, and expected 0 to {len(numbers) - 1}. Load all files of the model, or rename(pattern, template) "
            "layers that are numbered differently first."
        )
    return [name for _, name in numbered]


def unmatched(index: int, weights: Mapping[str, Any], mapping: Sequence[Rule], where: str = "into") -> str:
    """The error message for the rule at this index of the mapping, which matches nothing."""
    rule, present = mapping[index], list(mapped(weights, mapping[:index])[0])
    compared = [name for name in present[:COMPARED] if len(name) <= LONGEST]
    near = difflib.get_close_matches(rule.pattern, compared, n=3, cutoff=0.3) or present[:3]
    return (
        f"safetensors.{where}: rule {index} of the mapping, {rule}, matches no weight; if shapes fit by chance, "
        f"nothing else would show the mistake. The nearest of the {len(present)} names after the rules before it: "
        f"{', '.join(map(quoted, near)) or 'none'}. Correct its pattern, or remove the rule."
    )


def unmapped(leaves: Mapping[str, Array], mapping: Sequence[Rule], like: Mapping[str, Any] | None) -> dict[str, Array]:
    """Undo a mapping: the weights from which it makes these leaves.

    Args:
        leaves: The leaves by path.
        mapping: The rules.
        like: Weights with the names that the result has; those that the mapping drops are in the result too.

    Raises:
        ValueError: If there are no such weights, or their names are not known.
    """
    _check_rules(mapping, "save")
    dropping = [rule for rule in mapping if not rule.names]
    if like is None and dropping:
        raise ValueError(
            f"safetensors.save: {dropping[0]} cannot be undone, because it is not known what it drops. Write the "
            f"dropped weights of a file that you have, {_LIKE}, or leave them out, like={{}}."
        )
    if like is not None:
        _check_weights("safetensors.save(like=...)", like)
    named = {name: np.asarray(array) for name, array in (like or {}).items()}
    stages: list[tuple[dict[str, Array], list[Group]]] = []
    for rule in mapping:
        before, (named, groups) = named, _applied(rule, named, {name: name for name in named}, "save")
        stages.append((before, groups))
    left = [name for name in named if name not in leaves]
    if left:
        raise ValueError(
            f"safetensors.save: the mapping gives {len(left)} weights of like= names that the variables do not have, "
            f"{_listed(left)}. Correct the mapping, or drop(pattern) those that are to be written as they are."
        )
    arrays = dict(leaves)
    for rule, (before, groups) in reversed([*zip(mapping, stages, strict=True)]):
        arrays = _undone(rule, arrays, before, groups)
    _check(leaves, arrays, mapping)
    return arrays


def _undone(rule: Rule, arrays: dict[str, Array], before: dict[str, Array], groups: list[Group]) -> dict[str, Array]:
    """The weights before a rule, from those after it; ``before`` and ``groups`` are of weights with known names."""
    made: list[tuple[str, Array]] = []
    arrays = dict(arrays)
    for group in groups:
        parts = {name: arrays.pop(name) for name in group.new}
        if not parts:
            made += [(name, before[name]) for name in group.old]  # dropped
            continue
        undone = rule.undo(parts) if group.matched else [*parts.values()]
        if len(undone) != len(group.old):
            raise ValueError(
                f"safetensors.save: {quoted(group.new[0])} stacks {len(undone)} layers, and like= has "
                f"{len(group.old)}. Pass the weights of a model with as many layers, or like={{}}."
            )
        made += zip(group.old, undone, strict=True)
    made += _by_pattern(rule, arrays)
    found: dict[str, Array] = {}
    for name, array in made:
        if name in found:
            raise ValueError(
                f"safetensors.save: undoing {rule} gives two arrays the name {quoted(name)}. Pass the weights that the "
                f"mapping was written for, {_LIKE}."
            )
        found[name] = array
    return found


def _by_pattern(rule: Rule, arrays: Mapping[str, Array]) -> list[tuple[str, Array]]:
    """The weights before a rule, where a name that one of its templates fits is taken as made by it."""
    made: list[tuple[str, Array]] = []
    groups: dict[tuple[tuple[str, str], ...], dict[int, str]] = {}
    for name, array in arrays.items():
        fitting = (
            (i, match) for i, template in enumerate(rule.names) if (match := expression(template).fullmatch(name))
        )
        i, match = next(fitting, (0, None))
        if match is None:
            made.append((name, array))
            continue
        lost = placeholders(rule.pattern) - placeholders(rule.names[i]) - {rule.index}
        if lost:
            raise ValueError(
                f"safetensors.save: {rule} cannot be undone for {quoted(name)}, because its template lacks "
                f"{lost.pop()}. Write the placeholder in it, or pass weights with the names, {_LIKE}."
            )
        groups.setdefault(tuple(sorted(match.groupdict().items())), {})[i] = name
    for texts, members in groups.items():
        parts = {members[i]: arrays[members[i]] for i in sorted(members)}
        if len(parts) < len(rule.names):
            gone = next(filled(t, dict(texts)) for i, t in enumerate(rule.names) if i not in members)
            raise ValueError(
                f"safetensors.save: {rule} cannot be undone for {_listed(list(parts))}, because {quoted(gone)} is not "
                f"among the variables. Make its templates narrower, or pass weights with the names, {_LIKE}."
            )
        undone = rule.undo(parts)
        number = group_name(rule.index) if rule.index else ""
        made += [(filled(rule.pattern, dict(texts) | {number: str(n)}), array) for n, array in enumerate(undone)]
    return made


def _check(leaves: Mapping[str, Array], arrays: Mapping[str, Array], mapping: Sequence[Rule]) -> None:
    """Check that the mapping makes the leaves of these arrays, as ``into`` will."""
    again, _, unused = mapped(arrays, mapping, "save")
    for index in unused:
        if mapping[index].needed:
            raise ValueError(unmatched(index, arrays, mapping, "save"))
    lines = tree.difference(dict(leaves), again)
    if lines:
        more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise ValueError(
            "safetensors.save: the mapping cannot be undone; what it would make of the written weights differs from "
            "the variables:\n  "
            + "\n  ".join(lines[:_LISTED])
            + f"{more}\nMake the patterns narrower, or pass weights "
            f"with the names, {_LIKE}."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names[:_LISTED])) + (", ..." if len(names) > _LISTED else "")

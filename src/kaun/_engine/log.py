"""Compilation and CompilationLog: what was compiled, why again, and in how many seconds."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping

from kaun._engine.inputs import StepInputs
from kaun._messages import warn
from kaun.errors import RecompilationWarning

__all__ = ["Compilation", "CompilationLog"]

_MANY = 8
_ITEMS = "the items of a block"
_PLACE = "the place of "


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One program that was compiled: where, for which code, why (again), and how long it took.

    Attributes:
        where: ``"step"``, ``"fit"``, ``"flush"``, ``"predict"`` or ``"evaluate"``.
        code: The name, file and line of the loss, or of the first metric; empty for ``flush`` and ``predict``.
        why: ``"first"``, or what changed since the same code was compiled before, from what to what.
        seconds: How long tracing and compiling took, without the first run.
    """

    where: str
    code: str
    why: str
    seconds: float


class CompilationLog:
    """The newest thousand compilations of one trainer.

    Args:
        capacity: For how many pieces of code the log remembers what they were compiled for last.

    Attributes:
        compilations: The newest thousand, the newest last.
    """

    def __init__(self, capacity: int) -> None:
        self.compilations: deque[Compilation] = deque(maxlen=1000)
        self._capacity = capacity
        # What it was compiled for last, how often, and how items of each kind are passed.
        self._latest: OrderedDict[Hashable, tuple[dict[str, str], int, dict[Hashable, set[str]]]] = OrderedDict()
        self._lock = threading.Lock()

    def add(
        self, where: str, inputs: StepInputs, stacks: str, training: bool, seconds: float,
        wanted: Mapping[str, int] | None = None, *, places: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Log a compilation, and warn once where one piece of code is compiled again and again.

        A further program for items of a known kind, which are passed in another way, does not count.

        Args:
            where: As ``Compilation.where``.
            inputs: The inputs for which the program was compiled.
            stacks: How the items of a block are passed, in words.
            training: Whether the layers run in training mode.
            seconds: How long it took.
            wanted: The numbers that reports ask for, by name, with the n of "at every n-th step".
            places: Where state and item lie, in words by name.
        """
        now = {**inputs.describe(), "training": str(training), _ITEMS: stacks}
        now |= {f"the reports' {name!r}": f"each {n}. step" for name, n in (wanted or {}).items()}
        now |= {_PLACE + name: place for name, place in (places or {}).items()}
        kind = frozenset(now.items() - {(_ITEMS, stacks)})
        with self._lock:
            before, count, forms = self._latest.pop((where, inputs.subject), (None, 0, {}))
            known = kind in forms and stacks not in forms[kind]
            self._latest[(where, inputs.subject)] = (now, count := count + (not known), forms)
            if count <= _MANY:
                forms.setdefault(kind, set()).add(stacks)
            if len(self._latest) > self._capacity:
                self._latest.popitem(last=False)
        why = "first" if before is None else _change(before, now)
        self.compilations.append(Compilation(where=where, code=inputs.code, why=why, seconds=seconds))
        if count == _MANY and not known:
            warn(
                f"{where} has compiled {_MANY} programs for {inputs.code or 'one model'}; the last because {why}. "
                "Compiling takes time. Capture numbers that change as arrays, alpha = jnp.asarray(alpha), reuse one "
                "object instead of making equal ones, and use few different shapes of batches. trainer.compilations "
                "lists all programs.",
                RecompilationWarning,
            )


def _change(before: dict[str, str], now: dict[str, str]) -> str:
    names = [*now, *(n for n in before if n not in now)]
    pairs = [(n, before.get(n, "nothing"), now.get(n, "nothing")) for n in names]
    differ = [(n, a, b) for n, a, b in pairs if a != b and n != _ITEMS]
    moved = [(n.removeprefix(_PLACE), a, b) for n, a, b in differ if n.startswith(_PLACE) and n in before and n in now]
    changes = [f"{n} changed from {a} to {b}" for n, a, b in differ if not n.startswith(_PLACE)]
    changes += [f"{n} was {a}, is {b}" for n, a, b in moved]
    if not changes and before[_ITEMS] != now[_ITEMS]:
        return f"{_ITEMS} were {before[_ITEMS]} before and are {now[_ITEMS]}"
    return "; ".join(changes[:3]) or "its program was dropped from the cache, or the shardings of its arguments changed"

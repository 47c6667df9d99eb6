"""The interface between ``fit`` and a report: its members, their defaults, and the check that refuses near misses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from kaun import tree
from kaun._calls import shown
from kaun._messages import locate, nearest_member
from kaun.errors import EarlyStop
from kaun.state import TrainState

__all__ = [
    "NUMBERS", "Composite", "Report", "ReportFunction", "calls", "check_report", "check_takes", "measured_by_call",
    "member", "names_of", "numbers_of",
]  # fmt: skip

# What a step can compute for `Report.numbers`, and how the names of its values in a block begin.
NUMBERS = {"layer_norms": ("grad_norm/", "weight_norm/", "update_ratio/")}

_PARAMETERS = {
    "wants": "step",
    "block": "first_step, values",
    "begin": "first_step, total, measured, every, state",
    "end": "",
    "compiling": "where",
    "observe": "step, values, state",
    "snapshot": "",
    "restore": "values",
}
_NAMES = ("measures", "watches", "numbers")
# Methods that reports had before there was an interface, which would otherwise be ignored without a message.
_FORMER = {"compiled": "compiling", "judge": "observe", "beside": "begin", "thinned": "begin", "adds": "block"}


class ReportFunction(Protocol):
    """A plain function that is a report: called after every step, with the step, its loss and the state after it.

    Examples:
        >>> from kaun import reports
        >>> def shown(step, loss, state):
        ...     print(f"{step}: {loss:.2f}")
        >>> report: reports.ReportFunction = shown
        >>> report(1, 0.25, None)
        1: 0.25
    """

    def __call__(self, step: int, loss: float, state: TrainState, /) -> Mapping[str, float] | None: ...


class Report:
    """What ``fit`` calls while it trains. Subclass it and override what is needed; every member has a default.

    No member is abstract. An object of another class that is callable as ``(step, loss, state)`` is a report too, with
    any of these members; those that it lacks have the defaults given here. A method may take fewer arguments than it
    is listed with: it gets the first ones. A public method or attribute whose name is nearly one of these is refused,
    because ``fit`` would never use it.

    Between two steps that a report wants, ``fit`` does not wait for the device.

    Attributes:
        measures: The names of the values that the report measures for the other reports of one ``all_of``. Its call
            returns their values as floats, its ``block`` as arrays. Default none.
        watches: The names of values that a call of some report of the fit must measure; ``fit`` refuses to start
            otherwise. Default none.
        numbers: The names of numbers that the compiled step should compute in addition, or a dict from these names to
            n, for each n-th step of the state only. Blocks contain them, masked (``numpy.ma``) at other steps. Known
            is ``"layer_norms"``: for each layer with parameters that train, such as ``"0"``, ``"grad_norm/0"``,
            ``"weight_norm/0"``, of the weights before the update, and ``"update_ratio/0"``, the norm of the update
            over that of the weights. The first fit that asks for them compiles a program for it. Default none.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses, reports, rng
        >>> class Worst(reports.Report):
        ...     def begin(self, first_step, total, measured, every):
        ...         self.loss, self.total = 0.0, total
        ...     def block(self, first_step, values):
        ...         self.loss = max(self.loss, float(values["loss"].max()))
        >>> with rng.scope(0):
        ...     trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.5))
        ...     state = trainer.init()
        >>> data = Data.repeat(20, (jnp.ones((2, 1)), lambda out: losses.mse(out, jnp.zeros((2, 1)))))
        >>> state = trainer.fit(state, data, report=(worst := Worst()))
        >>> worst.total, worst.loss > 0
        (20, True)
    """

    measures: Collection[str] = ()
    watches: Collection[str] = ()
    numbers: Collection[str] | Mapping[str, int] = ()

    def __call__(self, step: int, loss: float, state: TrainState, /) -> Mapping[str, float] | None:
        """Take note of a step; called after each step that the report wants, when that step is done.

        Raise ``EarlyStop`` to end the fit after this step. The default does nothing.

        Args:
            step: The number of the step in this fit, from 1; a resumed run continues the count.
            loss: The loss of the step.
            state: The state after the step. It may be kept; the copy that this costs is made only if it is.

        Returns:
            The values of ``measures`` by name, or None. What a report without ``measures`` returns is ignored, but
            another TrainState is a TypeError: a report cannot change the state of the fit.
        """
        return None

    def wants(self, step: int) -> bool:
        """Return whether the report is to be called after this step.

        ``fit`` asks once for each step, in order, and possibly several steps before the step is run. The default is
        every step for a class that defines ``__call__``, and none for one that does not.
        """
        return calls(self)

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray] | None:
        """Record a block of consecutive steps that are done.

        Called for all steps in order, without gaps, before the call for the last step of the block. ``fit`` does not
        wait for the device to make a block. If no report defines this method, the values are not collected.

        Args:
            first_step: The number of the first step of the block in this fit.
            values: Arrays of shape (n,), one number for each step: ``"loss"`` (float32, or float64 where the loss is),
                ``"step"`` (int64, the ``state.step`` after the step), ``"step_time"`` in seconds, the scalars that the
                loss returned, each in its own dtype (half precision in float32), ``"examples_per_step"`` (int64, 1
                where x has no array with rows), ``"loss_weight"`` (float64, what the loss counts by in a mean over
                steps: the weight of a ``losses.Mean`` or the number of examples, 0 for a step that was skipped), the
                metrics that the loss returned as ``Counted.parts``, of each step alone, computed when they are read,
                and where they are known ``"grad_norm"``, ``"learning_rate"``, ``"examples_per_second"``,
                ``"skipped"``, ``"penalty"``, ``"updates"`` (up to the step, with ``accumulate`` or
                ``optax.MultiSteps``). Of an ensemble these are means over the members that run, and ``"losses"``, of
                shape (n, members), has the loss of each, masked where one did not run. Further,
                ``values.weights`` has what each scalar of the loss counts by, ``values.parts`` the parts, stacked along
                axis 0.

        Returns:
            None; or, from a report with ``measures``, further arrays of shape (n,) by name, which the blocks of the
            other reports of one ``all_of`` contain, in any order.
        """
        return None

    def begin(
        self,
        first_step: int,
        total: int | None,
        measured: frozenset[str],
        every: int,
        state: TrainState | None = None,
        /,
    ) -> None:
        """Prepare for a fit; called before its first step.

        Args:
            first_step: The number of the first step, 1 unless a run is resumed.
            total: The number of the last step, None if the length of the data is unknown.
            measured: The names that the calls of all reports of the fit measure.
            every: The ``n`` of the ``every(n, report)`` that contains the report, 1 without one. A block holds all
                steps nevertheless.
            state: The state before the first step. It may be kept, at the cost of its memory.
        """

    def end(self) -> None:
        """Finish a fit; called once, however the fit ends: end of the data, ``EarlyStop`` or any exception."""

    def compiling(self, where: str) -> Callable[[float], None] | None:
        """Take note that a program of the fit starts to compile.

        Args:
            where: The program, as in ``trainer.compilations``: ``"fit"``.

        Returns:
            None; or a function that is called with the seconds that it took, when the program is compiled.
        """
        return None

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        """Take note of values that another report of the same ``all_of`` measured after this step.

        Called when all reports were called for the step, also if this report did not want the step. It may raise
        ``EarlyStop``.

        Args:
            step: The number of the step in this fit.
            values: The values by name.
            state: The state that was measured: the one after the step, or what ``validate(of=)`` returned for it.
                Keeping it costs a copy; a state that is not read costs nothing.
        """

    def snapshot(self) -> dict[str, Any]:
        """Return what the report needs to continue in a resumed run; called when a checkpoint is made.

        The values are dicts and lists of numbers, strings, None, arrays and TrainStates. All blocks of steps up to the
        checkpoint were passed to ``block`` before. A class that defines this method defines ``restore`` too.
        """
        return {}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from what ``snapshot`` returned; called before ``begin`` in a resumed run.

        If the run was interrupted in the report's call for a step, the report is called for that step again, before
        the first block.
        """


class Composite(Report):
    """A report made of several, each of which keeps its own values in a checkpoint.

    Attributes:
        reports: These reports.
    """

    reports: Sequence[Any] = ()

    def call_all(self, step: int, loss: float, state: TrainState) -> tuple[dict[str, float], list[EarlyStop]]:
        """Call the reports, and return what they measured, and each EarlyStop that they raised."""
        try:
            values = self(step, loss, state)
        except EarlyStop as stop:
            return {}, [stop.with_traceback(None)]
        return dict(values or {}), []


def calls(report: Any) -> bool:
    """Whether a report does anything when it is called."""
    return not isinstance(report, Report) or type(report).__call__ is not Report.__call__


def names_of(report: Any, what: str) -> frozenset[str]:
    """The names in a report's ``measures``, ``watches`` or ``numbers``."""
    return frozenset(getattr(report, what, ()))


def numbers_of(report: Any) -> dict[str, int]:
    """A report's ``numbers`` by name, with the n of "at every n-th step"."""
    numbers = getattr(report, "numbers", ())
    return dict(numbers) if isinstance(numbers, Mapping) else dict.fromkeys(numbers, 1)


def measured_by_call(report: Any) -> frozenset[str]:
    """The names of the values that a report's call measures, which others can observe."""
    return names_of(report, "measures") if calls(report) else frozenset()


def member(report: Any, name: str) -> Callable[..., Any] | None:
    """A method of a report, to be called with all arguments of the interface; None if it has only the default.

    Raises:
        TypeError: If it cannot be called with these arguments, or the first ones of them.
    """
    method = getattr(report, name, None)
    if method is None or (_is_default(method, name) and (name != "wants" or calls(report))):
        return None
    parameters = [parameter for parameter in _PARAMETERS[name].split(", ") if parameter]
    taken = _taken(method, len(parameters))
    if taken is None:
        raise TypeError(
            f"`{name}` of the report {locate(report)} must be a method that takes ({_PARAMETERS[name]}), or the first "
            f"of these arguments, received {shown(method)}. Write def {name}({', '.join(['self', *parameters])})."
        )
    return method if taken == len(parameters) else lambda *arguments: method(*arguments[:taken])


def _is_default(method: Any, name: str) -> bool:
    return getattr(method, "__func__", None) is getattr(Report, name)


def _taken(method: Any, most: int) -> int | None:
    """How many of ``most`` positional arguments a callable takes; None if it takes no number of them."""
    if not callable(method):
        return None
    code = getattr(getattr(method, "__func__", None), "__code__", None)
    if code is not None and not code.co_kwonlyargcount and 1 <= code.co_argcount <= most + 1:
        # The usual case, without the 50 microseconds of a signature.
        return most if code.co_flags & inspect.CO_VARARGS else code.co_argcount - 1
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # some builtins have none
        return most
    for count in range(most, -1, -1):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return count
    return None


def check_report(report: Any, where: str, what: str = "a report") -> None:
    """Refuse an object that is not a report, and a report of which ``fit`` would ignore a part.

    Raises:
        TypeError: If it is not callable as ``(step, loss, state)``, or a member is of the wrong kind.
        ValueError: If it asks for numbers that no step computes.
    """
    check_takes(where, what, report, "step, loss, state")
    for name in _NAMES:
        _check_names(report, name)
    if unknown := sorted(names_of(report, "numbers") - NUMBERS.keys()):
        raise ValueError(
            f"The report {locate(report)} has {unknown[0]!r} in `numbers`, which no step can compute; known "
            f"names: {', '.join(map(repr, sorted(NUMBERS)))}. Return it from the loss: "
            f"(loss, {{{unknown[0]!r}: value}})."
        )
    for name, n in numbers_of(report).items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"`numbers` of the report {locate(report)} must have a number of steps of at least 1 for {name!r}, "
                f"received {shown(n)}. Write numbers = {{{name!r}: 100}}."
            )
    own = {name for name in _PARAMETERS if (method := member(report, name)) and not _is_default(method, name)}
    if "snapshot" in own and "restore" not in own:
        raise TypeError(
            f"The report {locate(report)} has snapshot() but no restore(values), so a resumed run could not restore "
            "what it saved. Write def restore(self, values): ..."
        )
    _check_near_misses(report, own)


def check_takes(where: str, what: str, f: Any, arguments: str) -> None:
    """Refuse a callable that does not take these arguments before the first step, not when it is called.

    Raises:
        TypeError: If it does not.
    """
    if isinstance(f, (list, tuple)):
        several = ", ".join(shown(each) for each in cast("Any", f))
        raise TypeError(
            f"{where} expected {what}, callable as ({arguments}), received a {type(f).__name__} of {len(f)}: "
            f"{several}. Write reports.all_of(a, b)."
        )
    if not callable(f):
        raise TypeError(
            f"{where} expected {what}, callable as ({arguments}), received {shown(f)}. Write def "
            f"report({arguments}): ..., "
            "or use kaun.reports."
        )
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        raise TypeError(
            f"{where} expected {what}, callable as ({arguments}), received {locate(f)}, which takes {signature}. "
            f"Write def report({arguments}): ..., or call it first if it makes a report."
        ) from None


def _check_names(report: Any, name: str) -> None:
    names = getattr(report, name, ())
    if not isinstance(names, Collection) or isinstance(names, (str, bytes)) or not _are_names(names):
        example = f'("{names}",)' if isinstance(names, str) else '("accuracy",)'
        raise TypeError(
            f"`{name}` of the report {locate(report)} must be a collection of names, received "
            f"{tree.describe(names)}. Write {name} = {example}."
        )


def _are_names(value: Any) -> bool:
    return all(isinstance(name, str) for name in value)


def _check_near_misses(report: Any, own: Collection[str]) -> None:
    """Refuse a method or attribute that is probably one of the interface, misspelled.

    A method is compared with the methods that the report does not define, and a collection of names with the
    attributes. An attribute ``blocks`` of a report with a method ``block`` is therefore accepted, as is any number.
    """
    missing = tuple([name for name in _PARAMETERS if name not in own])
    unset = tuple([name for name in _NAMES if not names_of(report, name)])
    for name in dir(report):
        if name.startswith("_") or name in _PARAMETERS or name in _NAMES:
            continue
        nearest = _FORMER.get(name) or nearest_member(name, missing)
        if nearest is not None and callable(getattr(report, name, None)):
            arguments = _PARAMETERS[nearest]
            raise TypeError(
                f"The report {locate(report)} has a method `{name}`, which fit does not call; the nearest name that it "
                f"calls is `{nearest}`. Write def {nearest}(self{', ' * bool(arguments)}{arguments}), or, if the "
                f"method is your own, _{name}."
            )
        nearest = nearest_member(name, unset)
        if nearest is not None and _holds_names(getattr(report, name, None)):
            raise TypeError(
                f"The report {locate(report)} has an attribute `{name}`, which fit does not read; the nearest name "
                f"that it reads is `{nearest}`. Write {nearest} = ..., or, if the attribute is your own, _{name}."
            )


def _holds_names(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (tuple, list, set, frozenset, dict)) and bool(value) and _are_names(value)

"""The exception for a call whose arguments Python refuses: it says what to write."""

from __future__ import annotations

import builtins
import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_overloads

from kaun import tree
from kaun._calls.texts import CALLS, FIT, FIT_TAKES, STEP, STEP_TAKES
from kaun._messages import hide_frames, nearest_member

__all__ = [
    "MISSING",
    "explained",
    "is_explained",
    "is_refused",
    "public",
    "shown",
    "shows_overload",
    "wrong_fit",
    "wrong_step",
]

F = TypeVar("F", bound=Callable[..., Any])

MISSING: Any = inspect.Parameter.empty
"""The default of an argument that is needed, where a function reports by itself that it is missing."""


def explained(name: str, family: str = "") -> Callable[[F], F]:
    """Return the decorator that replaces the TypeError of a call which Python refuses by one with what to write.

    A right call is passed on as it is: nothing is checked. The function keeps its signature, name and docstring. Kaun's
    own frames are hidden in its exceptions, as by ``frames_hidden``.

    Args:
        name: The function as users write it, ``"layers.linear"``.
        family: The entry of ``CALLS``, by default the name.
    """

    def decorate(function: F) -> F:
        # The function is a global of the wrapper and not in a cell: to ``kaun._loss`` a library's function is static
        # by identity only if it captures nothing. Losses and metrics are captured at each step.
        code = _call.__code__.replace(co_name=function.__name__)
        refused = functools.partial(_refusal, name, family or name, function)
        scope = {**_NAMES, "_function": function, "_refused": refused}
        return cast("F", functools.wraps(function)(types.FunctionType(code, scope, function.__name__)))

    return decorate


def public(function: F) -> F:
    """Decorate a public function as ``explained`` does, under its name in the package in which it is defined."""
    return explained(f"{function.__module__.split('.')[1]}.{function.__name__}")(function)


if TYPE_CHECKING:  # these two are in the globals of each decorated function
    _function: Callable[..., Any]
    _refused: Callable[[Sequence[Any], Mapping[str, Any]], TypeError | None]


def _call(*args: Any, **kwargs: Any) -> Any:
    """The code of every decorated function."""
    try:
        try:
            return _function(*args, **kwargs)  # noqa: F821
        except TypeError as error:
            refused = _refused(args, kwargs) if is_refused(error) else None  # noqa: F821
            if refused is None:
                raise
        raise refused
    except BaseException as error:
        hide_frames(error)
        raise


def is_refused(error: TypeError) -> bool:
    """Whether the call in this frame failed before its function ran: the traceback has no frame but a decorator's."""
    trace = error.__traceback__
    if trace is None or trace.tb_next is None:
        return trace is not None
    return trace.tb_next.tb_next is None and "_refused" in trace.tb_next.tb_frame.f_globals


_NAMES: dict[str, Any] = {
    "__name__": __name__,
    "__builtins__": builtins,
    "is_refused": is_refused,
    "hide_frames": hide_frames,
}


def is_explained(function: Any) -> bool:
    """Whether a function reports wrong calls itself: by ``explained``, or as one that ``shows_overload``."""
    return "_refused" in function.__globals__ or hasattr(function, "__signature__")


def shows_overload(function: F) -> F:
    """Decorate a function that takes any arguments, to report wrong ones itself: show the signature of its overload."""
    cast("Any", function).__signature__ = inspect.signature(get_overloads(function)[0])
    return function


def _refusal(
    name: str, entry: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TypeError | None:
    """Return the exception for arguments that do not fit a function, None if they do."""
    package = name.partition(".")[0]
    texts = {**(CALLS.get(package, {}) if package.islower() else {}), **CALLS.get(entry, {})}
    parameters = inspect.signature(function).parameters
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        named = {key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        unknown = {key: value for key, value in kwargs.items() if key not in named}
        if not unknown:
            twice = next((key for key in kwargs if str(error).endswith(f"values for argument {key!r}")), "")
            text, given = texts.get(twice) or texts.get("", ""), next(iter(args[1:] or args), None)
            said = str(error).replace("keyword-only ", "")  # as Python 3.11 says it, and later ones do not
            return TypeError(f"{name}: {said}; {_filled(text, name, given, _takes(parameters))}")
        takes = _takes(parameters)
        return TypeError("\n".join(_no_argument(name, texts, takes, *each) for each in unknown.items()))
    return None


def _no_argument(name: str, texts: Mapping[str, str], takes: str, key: str, value: Any) -> str:
    """Say that a function which takes other arguments has none of a name."""
    text = texts.get(key, "")
    if not text:
        names = re.findall(r"(\w+)(?:=|,|$)", takes)
        longer = [each for each in names if each.startswith(f"{key}_") or each.endswith(f"_{key}")]  # as `kernel_size`
        near = nearest_member(key, tuple(names)) or (longer[0] if len(longer) == 1 else None)
        text = f"write {near}={{value}}" if near else ""
    return f"{name} has no argument {key}=: {_filled(text, name, value, takes)}"


def _takes(parameters: Mapping[str, inspect.Parameter]) -> str:
    """The parameters of a function as users see them, without annotations."""
    simple = lambda value: value if isinstance(value, (bool, int, float, str, tuple, type(None))) else ...
    own = [p.replace(annotation=p.empty) for p in parameters.values() if p.name not in ("self", "cls")]
    plain = [p if p.default is p.empty else p.replace(default=simple(p.default)) for p in own]
    return str(inspect.Signature(plain))[1:-1].replace("=Ellipsis", "=...")


def _filled(text: str, name: str, value: Any, takes: str) -> str:
    text = text or _plain(name, takes)
    seed = value if isinstance(value, int) else 42
    text = text.format(value=shown(value), seed=seed, name=name, takes=takes, layer=_activation(value))
    return text if "\n" in text else f"{text}."


def _plain(name: str, takes: str) -> str:
    """What is said of a function without a text of its own: its arguments, and a call with those that it needs."""
    text = "its arguments are ({takes})" if takes else "it takes no argument"
    if "." not in name or not name.islower() or "**" in takes:  # a method, whose object has another name
        return text
    positional, _, named = takes.partition("*, ")
    needed = [part for part in positional.split(", ") if part.isidentifier()]
    needed += [f"{part}=..." for part in named.split(", ") if part.isidentifier()]
    return f"{text}. Write {{name}}({', '.join(needed)})" if needed or not takes else text


def _activation(value: Any) -> str:
    """The layer for the activation that a call was given, by name or as a function."""
    word = value if isinstance(value, str) else getattr(value, "__name__", "")
    word = {"swish": "silu"}.get(word, word)
    return f"layers.{word}()" if word.isidentifier() and word != "<lambda>" else "layers.relu()"


def shown(value: Any) -> str:
    """A value in one word: numbers and texts as Python writes them, shape and dtype of arrays, names, types of others.

    A repr may be many lines, and that of a function has its address.
    """
    if isinstance(value, (bool, int, float, str, type(None))):
        text = repr(value)
        return text if len(text) <= 40 else "..."
    if isinstance(value, dict) and not value:
        return "{}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(shown(inner) for inner in cast("Sequence[Any]", value)[:4])
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    layer: Any = getattr(value, "name", None) if hasattr(type(value), "apply") else None
    if isinstance(layer, str) and layer:
        return layer.splitlines()[0].rstrip("([{")
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else tree.describe(value)


def wrong_fit(given: Sequence[Any], unknown: Mapping[str, Any]) -> TypeError:
    """Return the exception for a call of ``fit`` with other arguments than it has.

    Args:
        given: The positional arguments, ``MISSING`` where one is missing.
        unknown: The arguments by name that it does not have.
    """
    given = [value for value in given if value is not MISSING]
    has_state = bool(given) and hasattr(type(given[0]), "opt_state")
    named = dict(unknown)
    if has_state and len(given) == 2:
        return TypeError("\n".join(_no_argument("fit", FIT, FIT_TAKES, *each) for each in named.items()))
    call = ", ".join([*map(shown, given), *(f"{key}={shown(value)}" for key, value in named.items())])
    if any(hasattr(type(value), "opt_state") for value in given[1:2]):
        return TypeError(f"fit expected the state first, received ({call}). Write trainer.fit(state, data).")
    if has_state and len(given) == 1 and not named:
        return TypeError("fit expected a state and data, received the state alone. Write trainer.fit(state, data).")
    if has_state and len(given) > 2 and not _is_array(given[2]):
        return TypeError(
            f"fit expected a state and data, and all else by name, received ({call}). Write trainer.fit(state, data, "
            "report=report)."
        )
    lines = [] if has_state else ["state = trainer.init()"]
    if any(map(_is_array, given)) or not given:
        size, shuffle = shown(named.pop("batch_size", 32)), bool(named.pop("shuffle", True))
        order = ", shuffle=True" if shuffle else ""
        lines.append(f"data = Data.batches((x, y), batch_size={size}{order}).with_loss(losses.mse)")
    passes = [named.pop(key) for key in ("epochs", "num_epochs", "max_epochs") if key in named]
    lines.append(f"state = trainer.fit(state, data{f'.epochs({shown(passes[0])})' if passes else ''})")
    rest = [f"\n{_no_argument('fit', FIT, FIT_TAKES, *each)}" for each in named.items()]
    program = "".join(f"\n    {line}" for line in lines)
    return TypeError(
        f"fit expected a state, and data of items (x, loss), received ({call}). Write{program}{''.join(rest)}"
    )


def wrong_step(given: Sequence[Any], loss: Any, unknown: Mapping[str, Any]) -> TypeError:
    """Return the exception for a call of ``step`` with other arguments than it has.

    Args:
        given: The positional arguments, ``MISSING`` where one is missing.
        loss: The argument ``loss``, likewise.
        unknown: The arguments by name that it does not have.
    """
    given = [value for value in given if value is not MISSING]
    if len(given) == 2 and loss is not MISSING and hasattr(type(given[0]), "opt_state"):
        return TypeError("\n".join(_no_argument("step", STEP, STEP_TAKES, *each) for each in unknown.items()))
    named = {**({} if loss is MISSING else {"loss": loss}), **unknown}
    call = ", ".join([*map(shown, given), *(f"{key}={shown(value)}" for key, value in named.items())])
    return TypeError(f"step expected a state, an input and loss=, received ({call}). {STEP['']}")


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")

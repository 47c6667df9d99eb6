"""The exception for a call whose arguments Python refuses: it says what to write."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_overloads

from kaun import tree
from kaun._calls.texts import CALLS, FIT, FIT_TAKES, OF_ALL, STEP, STEP_TAKES
from kaun._messages import hide_frames, nearest_member

__all__ = ["MISSING", "explained", "shown", "shows_overload", "wrong_fit", "wrong_step"]

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
    texts = CALLS.get(family or name, {})

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                try:
                    return function(*args, **kwargs)
                except TypeError as error:
                    refused = _refusal(name, texts, function, args, kwargs) if _is_refused(error) else None
                    if refused is None:
                        raise
                raise refused
            except BaseException as error:
                hide_frames(error)
                raise

        return cast("F", call)

    return decorate


def _is_refused(error: TypeError) -> bool:
    """Whether a call failed before its function began to run: then the traceback has no frame of it."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is None


def shows_overload(function: F) -> F:
    """Decorate a function that takes any arguments, to report wrong ones itself: show the signature of its overload."""
    cast("Any", function).__signature__ = inspect.signature(get_overloads(function)[0])
    return function


def _refusal(
    name: str, texts: Mapping[str, str], function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TypeError | None:
    """Return the exception for arguments that do not fit a function, None if they do."""
    parameters = inspect.signature(function).parameters
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        unknown = {key: value for key, value in kwargs.items() if key not in parameters}
        if not unknown:
            twice = next((key for key in kwargs if str(error).endswith(f"values for argument {key!r}")), "")
            text = texts.get(twice) or texts.get("", f"its arguments are ({_takes(parameters)})")
            return TypeError(f"{name}: {error}; {_filled(text, name, next(iter(args[1:] or args), None))}")
        takes = _takes(parameters)
        return TypeError("\n".join(_no_argument(name, texts, takes, *each) for each in unknown.items()))
    return None


def _no_argument(name: str, texts: Mapping[str, str], takes: str, key: str, value: Any) -> str:
    """Say that a function which takes other arguments has none of a name."""
    text = texts.get(key) or (OF_ALL.get(key, "") if name.startswith("layers.") else "")
    if not text:
        names = re.findall(r"(\w+)(?:=|,|$)", takes)
        longer = [each for each in names if each.startswith(f"{key}_")]  # `kernel` of `kernel_size`
        near = nearest_member(key, tuple(names)) or (longer[0] if len(longer) == 1 else None)
        text = f"write {near}={{value}}" if near else f"its arguments are ({takes})"
    return f"{name} has no argument {key}=: {_filled(text, name, value)}"


def _takes(parameters: Mapping[str, inspect.Parameter]) -> str:
    """The parameters of a function as users see them, without annotations."""
    simple = lambda value: value if isinstance(value, (bool, int, float, str, tuple, type(None))) else ...
    own = [p.replace(annotation=p.empty) for p in parameters.values() if p.name != "self"]
    plain = [p if p.default is p.empty else p.replace(default=simple(p.default)) for p in own]
    return str(inspect.Signature(plain))[1:-1].replace("=Ellipsis", "=...")


def _filled(text: str, name: str, value: Any) -> str:
    seed = value if isinstance(value, int) else 42
    text = text.format(value=shown(value), seed=seed, name=name, layer=_activation(value))
    return text if "\n" in text else f"{text}."


def _activation(value: Any) -> str:
    """The layer for the activation that a call was given, by name or as a function."""
    word = value if isinstance(value, str) else getattr(value, "__name__", "")
    word = {"swish": "silu"}.get(word, word)
    return f"layers.{word}()" if word.isidentifier() and word != "<lambda>" else "layers.relu()"


def shown(value: Any) -> str:
    """A value in one word: numbers and texts as Python writes them, shape and dtype of arrays, the type of others."""
    if isinstance(value, (bool, int, float, str, type(None))):
        text = repr(value)
        return text if len(text) <= 40 else "..."
    if isinstance(value, (list, tuple)):
        inside = ", ".join(shown(inner) for inner in cast("Sequence[Any]", value)[:4])
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
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

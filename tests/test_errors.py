"""The exceptions and warnings that users meet."""

import ast
import builtins
import pickle
from pathlib import Path

import jax.numpy as jnp
import pytest

import kaun
from kaun import errors


def test_exceptions_are_of_the_kinds_that_users_catch():
    assert issubclass(kaun.EarlyStop, Exception)
    assert issubclass(errors.CaptureError, TypeError)
    assert issubclass(errors.MissingContext, KeyError)
    assert issubclass(errors.RecompilationWarning, UserWarning)
    assert issubclass(errors.NonFiniteLoss, ArithmeticError)
    assert issubclass(errors.ResumeMismatch, ValueError)
    assert issubclass(errors.Locked, RuntimeError)
    assert issubclass(errors.FailedElsewhere, RuntimeError)
    assert issubclass(errors.Unavailable, AttributeError) and issubclass(errors.Unavailable, (RuntimeError, ValueError))


def test_every_exception_and_warning_of_the_package_that_leaves_it_is_here():
    # Internal: the callers put them into words, RefusedError as a CaptureError, the others as a ValueError of one file.
    # EndedElsewhere ends the loop of fit, which returns; _FoundError a walk over a program.
    internal = {"Damaged", "EndedElsewhere", "RefusedError", "Short", "TooLarge", "UnreadDtype", "_FoundError"}
    defined = {}
    for path in sorted(Path(kaun.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            bases = [getattr(base, "id", "") for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if any(isinstance(getattr(builtins, b, None), type) and issubclass(getattr(builtins, b), BaseException)
                   for b in bases):  # fmt: skip
                defined[node.name] = path.name
    assert {name for name, file in defined.items() if file != "errors.py"} == internal
    assert {name for name, file in defined.items() if file == "errors.py"} == set(errors.__all__)


def test_they_are_the_ones_that_are_known_under_other_names():
    assert kaun.EarlyStop is errors.EarlyStop
    assert kaun.NonFiniteLoss is errors.NonFiniteLoss
    assert kaun.checkpoint.ResumeMismatch is errors.ResumeMismatch


def test_an_error_comes_back_from_another_process_with_what_it_carries():
    error = errors.NonFiniteLoss("The loss is nan", 3, float("inf"), ("0.weight",))
    error.kaun_state = {"w": jnp.ones(2)}
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.step, back.loss, back.parameters) == ("The loss is nan", 3, float("inf"), ("0.weight",))
    assert back.kaun_state["w"].tolist() == [1.0, 1.0]
    assert str(pickle.loads(pickle.dumps(errors.MissingContext("no 'mask'")))) == "no 'mask'"
    failed = pickle.loads(pickle.dumps(errors.FailedElsewhere("Process 1 failed", 1, "OSError: disk full")))
    assert (str(failed), failed.process, failed.what) == ("Process 1 failed", 1, "OSError: disk full")


def test_missing_context_prints_its_message_as_it_is():
    assert str(errors.MissingContext("no 'mask'\nhere")) == "no 'mask'\nhere"
    assert str(errors.MissingContext()) == ""
    with pytest.raises(KeyError, match=r"^no 'mask'$"):
        raise errors.MissingContext("no 'mask'")

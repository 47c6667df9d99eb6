"""The shared words of error messages, and the exception types."""

import functools

import jax
import jax.numpy as jnp
import pytest

import kaun
from kaun import errors
from kaun._messages import locate


def plain(x):
    return x


FIRST_LINE = plain.__code__.co_firstlineno


class Model:
    def loss(self, x):
        return x

    def __call__(self, x):
        return x


noted = functools.partial(plain)
noted.note = "Python does not merge this partial with another around it"


@pytest.mark.parametrize(
    "function",
    [
        plain,
        functools.partial(plain, 1),
        functools.partial(noted, x=1),
        jax.jit(plain),
        functools.partial(jax.jit(plain)),
    ],
    ids=["plain", "partial", "nested partial", "jit", "partial of jit"],
)
def test_locate_says_name_file_and_line_of_what_the_user_wrote(function):
    assert locate(function) == f"`plain` (test_errors.py:{FIRST_LINE})"


def test_locate_of_methods_lambdas_and_inner_functions():
    def inner(x):
        return x

    line = Model.loss.__code__.co_firstlineno
    assert locate(Model().loss) == f"`Model.loss` (test_errors.py:{line})"
    assert locate(inner) == f"`inner` (test_errors.py:{inner.__code__.co_firstlineno})"
    assert locate(lambda: 0).startswith("`<lambda>` (test_errors.py:")


def test_locate_without_a_source_is_the_name_alone():
    assert locate(len) == "`len`"
    assert locate(Model()) == "`Model`"
    assert locate(3) == "`int`"


def test_exceptions_are_of_the_kinds_that_users_catch():
    assert issubclass(kaun.EarlyStop, Exception)
    assert issubclass(errors.CaptureError, TypeError)
    assert issubclass(errors.MissingContext, KeyError)
    assert issubclass(errors.RecompilationWarning, UserWarning)


def test_missing_context_prints_its_message_as_it_is():
    assert str(errors.MissingContext("no 'mask'\nhere")) == "no 'mask'\nhere"
    assert str(errors.MissingContext()) == ""
    with pytest.raises(KeyError, match=r"^no 'mask'$"):
        raise errors.MissingContext("no 'mask'")


def test_jitted_output_is_not_in_the_way_of_locate():
    assert locate(jax.jit(jnp.sin)).startswith("`sin`")

"""Where a function was written, and warnings at the user's line."""

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kaun
from kaun._messages import in_kaun, locate, quoted, warn
from kaun._messages import plain as plain_text


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
    assert locate(function) == f"`plain` (test_messages.py:{FIRST_LINE})"


def test_locate_of_methods_lambdas_and_inner_functions():
    def inner(x):
        return x

    line = Model.loss.__code__.co_firstlineno
    assert locate(Model().loss) == f"`Model.loss` (test_messages.py:{line})"
    assert locate(inner) == f"`inner` (test_messages.py:{inner.__code__.co_firstlineno})"
    assert locate(lambda: 0).startswith("`<lambda>` (test_messages.py:")


def test_locate_without_a_source_is_the_name_alone():
    assert locate(len) == "`len`"
    assert locate(Model()) == "`Model`"
    assert locate(3) == "`int`"


def test_jitted_output_is_not_in_the_way_of_locate():
    assert locate(jax.jit(jnp.sin)).startswith("`sin`")


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (warning,) = caught
    return warning


def test_a_warning_names_the_users_line():
    warning = warned(lambda: warn("the text"))
    assert (str(warning.message), warning.category, warning.filename) == ("the text", UserWarning, __file__)
    assert warning.lineno == test_a_warning_names_the_users_line.__code__.co_firstlineno + 1
    assert warned(lambda: warn("again", kaun.errors.RecompilationWarning)).category is kaun.errors.RecompilationWarning


@pytest.mark.parametrize(("file", "shown"), [("kaun/new/room.py", __file__), ("kaun_models/train.py", "itself")])
def test_files_of_kaun_are_passed_over_and_those_of_a_package_with_a_longer_name_are_not(file, shown):
    path = str(Path(kaun.__file__).parents[1] / file)
    code = compile("warn('the text')", path, "exec")
    assert warned(lambda: exec(code, {"warn": warn})).filename == (path if shown == "itself" else shown)


def test_plain_cuts_in_the_middle_and_escapes_what_does_not_print():
    assert plain_text("0.weight") == "0.weight"
    assert plain_text("a\x1b[2J\u202e\ud800b\n") == "a\\x1b[2J\\u202e\\ud800b\\n"
    cut = plain_text("a" * 300 + "b" * 300)
    assert (len(cut), cut[:3], cut[-3:], cut.count("...")) == (200, "aaa", "bbb", 1)
    assert plain_text("x" * 10, 10) == "x" * 10


def test_quoted_is_a_repr_of_bounded_length():
    assert quoted("0.weight") == "'0.weight'"
    assert quoted({"a": "\x1b"}) == "{'a': '\\x1b'}"
    assert quoted("x" * 500) == "'" + "x" * 96 + "..."


def test_a_package_whose_name_begins_with_kaun_is_the_users():
    folder = Path(kaun.__file__).parent
    assert in_kaun(kaun.__file__) and in_kaun(str(folder / "losses" / "functions.py"))
    assert not in_kaun(__file__) and not in_kaun(str(folder.with_name("kaun_models") / "a.py"))

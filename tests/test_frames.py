"""What is shown of an exception: the user's frames, the line of the call, and the message last; none of kaun's frames."""

import dataclasses
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, metrics, reports, rng

SRC = Path(kaun.__file__).parent
X, Y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
NARROW = X[:, :2]
WIDTH = "ValueError: linear(3, 2) expected float32[..., 3], received float32[4, 2]"


@pytest.fixture(scope="module")
def trained():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.sgd(0.1))
        return trainer, trainer.init()


def raised(call):
    """The exception that a call of the user's raises."""
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def shown(error):
    """The lines that a terminal shows of an exception."""
    return "".join(traceback.format_exception(error)).splitlines()


def files(error):
    return [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]


def is_own(file):
    return file.is_relative_to(SRC) or file.is_relative_to(Path(jax.__file__).parent) or file.name == "contextlib.py"


CALLS = {
    "fit": lambda t, s: t.fit(s, [(NARROW, lambda out: losses.mse(out, Y))]),
    "fit over a Data": lambda t, s: t.fit(s, Data.batches((NARROW, Y), 4).with_loss(losses.mse).epochs(2)),
    "step": lambda t, s: t.step(s, NARROW, loss=lambda out: losses.mse(out, Y)),
    "predict": lambda t, s: t.predict(s, NARROW),
    "predict of a Data": lambda t, s: t.predict(s, Data.batches(NARROW, 4)),
    "evaluate": lambda t, s: t.evaluate(s, [(NARROW, Y)], {"mse": losses.mse}),
    "apply": lambda t, s: t.model.apply(s.vars, NARROW),
    "summary": lambda t, s: kaun.summary(t, NARROW),
    "step of an ensemble": lambda t, s: (
        (many := kaun.Ensemble(t, 2)),
        many.step(many.init(), NARROW, loss=lambda out: losses.mse(out, Y)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_kauns_sentence_is_the_last_line_and_its_frames_are_not_shown(trained, name):
    error = raised(lambda: CALLS[name](*trained))
    lines = shown(error)
    assert lines[-1].startswith(WIDTH), lines
    assert len(lines) <= 30 and not [file for file in files(error) if is_own(file)], lines
    assert files(error)[-1] == Path(__file__), "the line of the call stays"


def test_other_entries_hide_their_frames_too(trained):
    trainer, state = trained
    wrong = [
        lambda: trainer.init(dtype=jnp.int32),
        lambda: trainer.make_state(state),
        lambda: trainer.flush(None),
        lambda: trainer.export(state, None),
        lambda: trainer.fit(None, []),
        lambda: trainer.fit(state, []),
        lambda: trainer.step(state, X, loss=1),
        lambda: trainer.model.init(dtype=jnp.int32),
        lambda: kaun.explain(trainer, ValueError()),
        lambda: kaun.lr_range(trainer, state, [], low=1, high=2, steps=1),
        lambda: kaun.averages.update_statistics(trainer, state, []),
        lambda: metrics.evaluate(lambda item: item, []),
        lambda: kaun.checkpoint.load("missing", like=state),
        lambda: kaun.checkpoint.Directory("missing").load(state),
        lambda: kaun.Ensemble(trainer, 2).fit(state, []),
    ]
    for call in wrong:
        error = raised(call)
        assert not [file for file in files(error) if is_own(file)], shown(error)


def test_the_users_functions_stay_visible(trained):
    trainer, state = trained

    def load(i):
        return {"there": i}["missing"]

    def loss(output):
        return jnp.dot(output, jnp.ones((3, 2))).sum()

    def report(step, value, state):
        raise OSError("disk full")

    def body(x):
        return jnp.dot(x, jnp.ones((9, 2)))

    inner = kaun.Trainer(model=layers.linear(3, 2) >> layers.fn(body), optimizer=optax.sgd(0.1))
    calls = {
        "load": lambda: trainer.fit(state, Data.from_fn(3, load)),
        "loss": lambda: trainer.fit(state, [(X, loss)]),
        "report": lambda: trainer.fit(state, [(X, jnp.mean)], report=reports.all_of(reports.every(1, report))),
        "body": lambda: inner.predict(inner.init(), X),
        "f": lambda: trainer.evaluate(state, [(X, Y)], {"f": _f}),
    }
    for name, call in calls.items():
        error = raised(call)
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        assert names[-1] in (name, "_f") and names[:2] == ["raised", "<lambda>"] and len(names) == 3, names
        assert len(shown(error)) <= 30
        assert not [note for note in getattr(error, "__notes__", ()) if "JAX has removed" in note]


def _f(predictions, targets):
    raise ValueError("no metric")


def test_a_cause_stays_where_it_has_lines_of_the_users(trained):
    class Broken:
        def init(self, params):
            return ()

        def update(self, gradient, state, params=None):
            raise KeyError("no such parameter")

    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=Broken())
        error = raised(trainer.init)
    assert isinstance(error.__cause__, KeyError) and [file.name for file in files(error.__cause__)] == [
        "test_frames.py"
    ]
    lines = shown(error)
    assert len(lines) <= 30 and not [line for line in lines if str(SRC) in line]


def test_a_context_without_lines_of_the_users_is_not_shown():

    for name, kept in (("kaun", False), ("user", True)):
        code = compile(
            "try: {}['x']\nexcept KeyError as e: failed = e", str(SRC / "tree.py" if name == "kaun" else name), "exec"
        )
        found = {}
        exec(code, found)
        error = ValueError("the sentence")
        error.__context__ = found["failed"]
        try:
            raise error
        except ValueError as caught:
            kaun._messages.hide_frames(caught)
        assert ("KeyError" in "".join(shown(error))) == kept


def test_all_frames_are_shown_on_request(trained, monkeypatch):
    monkeypatch.setenv("KAUN_TRACEBACK", "full")
    error = raised(lambda: CALLS["fit"](*trained))
    assert [file for file in files(error) if file.is_relative_to(SRC)] and "JAX has removed" in error.__notes__[0]


def test_jaxs_own_option_keeps_its_frames(trained):
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        error = raised(lambda: CALLS["fit"](*trained))
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert [file for file in files(error) if file.is_relative_to(Path(jax.__file__).parent)]
    assert not [file for file in files(error) if file.is_relative_to(SRC)]


def test_an_interrupt_says_where_the_state_is(trained):
    trainer, state = trained

    def report(step, loss, state):
        if step == 2:
            raise KeyboardInterrupt

    def nested(step, loss, state):
        trainer.fit(state, Data.repeat(5, (X, jnp.mean)), report=report)

    for call, step in ((report, 2), (nested, 1)):
        error = raised(lambda call=call: trainer.fit(state, Data.repeat(5, (X, jnp.mean)), report=call))
        assert int(error.kaun_state.step) == step
        assert error.__notes__ == [
            f"The state after step {step} is this exception's kaun_state: err.kaun_state, or at the next prompt "
            "sys.last_value.kaun_state."
        ]
        assert shown(error)[-1] == error.__notes__[0]


@dataclasses.dataclass(frozen=True)
class Refused(Exception):
    path: str


def test_an_exception_that_refuses_attributes_leaves_fit_as_it_is(trained):
    trainer, state = trained

    def report(step, loss, state):
        raise refused

    def load(i):
        raise refused

    def items():
        yield X, jnp.mean
        raise refused

    for data, given, step in (
        (Data.repeat(3, (X, jnp.mean)), report, 1),
        (Data.from_fn(3, load), None, 0),
        (items(), None, 1),
    ):
        refused = Refused("a/b")
        error = raised(lambda data=data, given=given: trainer.fit(state, data, report=given))
        assert error is refused and int(error.kaun_state.step) == step
        assert files(error)[-1] == Path(__file__)
        where = "In the data pipeline's Data.from_fn(3, load (test_frames.py"
        assert [note.split(":")[0] for note in getattr(error, "__notes__", ())] == [where] * (step == 0)


def test_a_scope_does_not_replace_an_exception_and_can_decorate():
    @rng.scope(0)
    def draw(depth=0):
        return draw(1) if depth == 0 else rng.next_key()

    assert draw() == draw()
    for refused in (Refused("a"), StopIteration(3), kaun.EarlyStop()):
        error = raised(lambda refused=refused: _in_scope(refused))
        assert error is refused and [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)] == [
            "raised", "<lambda>", "_in_scope",
        ]  # fmt: skip


def _in_scope(error):
    with rng.scope(0):
        raise error


def test_an_exception_that_refuses_new_attributes_stays_the_exception():
    error = raised(lambda: (_ for _ in ()).throw(Refused("a/b")))
    BaseException.__setattr__(error, "__context__", KeyError("inside"))
    kaun._messages.hide_frames(error)
    assert "KeyError" not in "".join(shown(error)) and shown(error)[-1].endswith("Refused: a/b")

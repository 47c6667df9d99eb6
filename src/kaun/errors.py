"""All exceptions and warnings of kaun that a user can meet; each is also of a built-in kind (``ValueError``, ...)."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CaptureError", "EarlyStop", "FailedElsewhere", "Locked", "MissingContext", "NonFiniteLoss", "RecompilationWarning",
    "ResumeMismatch", "Unavailable",
]  # fmt: skip


class EarlyStop(Exception):
    """Raise it inside ``report`` to end ``fit`` early; ``fit`` returns the state after that step.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses
        >>> trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1))
        >>> def report(step, loss, state):
        ...     if step == 3:
        ...         raise kaun.EarlyStop
        >>> item = (jnp.ones((2, 1)), lambda out: losses.mse(out, jnp.zeros((2, 1))))
        >>> trainer.fit(trainer.init(), Data.repeat(100, item), report=report)
        TrainState(step=3, 2 parameters in float32)
    """


class FailedElsewhere(RuntimeError):
    """Another process of the same program failed or is missing, so that this one ends too.

    An exception in one process ends the fit in all of them after the same step. That process has the exception itself,
    the others this one, all with the same state as ``kaun_state``.

    Attributes:
        process: The number of the process, as ``jax.process_index()`` in it.
        what: What happened there: the type and message of the exception, or that it did not come.

    Examples:
        >>> import kaun
        >>> error = kaun.errors.FailedElsewhere("Process 1 failed: OSError: disk full", 1, "OSError: disk full")
        >>> error.process, error.what
        (1, 'OSError: disk full')
    """

    process: int
    what: str

    def __init__(self, message: str, process: int, what: str) -> None:
        super().__init__(message)
        self.process, self.what = process, what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.process, self.what), self.__dict__


class NonFiniteLoss(ArithmeticError):
    """A step's loss, gradient or update is nan or infinite; the state before that step is its ``kaun_state``.

    ``kaun.explain(trainer, error)`` names the operation that made it so.

    Attributes:
        step: The number of the step in this fit, counted from 1; from ``flush``, ``state.step``.
        loss: The loss of the step; from ``flush``, the mean loss of the items in the window.
        parameters: The paths of the parameters whose gradient is not finite.
        leaves: Where loss and gradient are finite, the paths of what the update makes not finite: in ``"params"``,
            ``"state"`` (of the layers) and ``"opt_state"``. In a state of more than 1 MiB a parameter stands for the
            optimizer's arrays of it, too.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import layers, rng
        >>> with rng.scope(0):
        ...     trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        ...     state = trainer.init()
        >>> good, bad = jnp.ones((1, 2)), jnp.full((1, 2), jnp.nan)
        >>> try:
        ...     trainer.fit(state, [(good, jnp.mean), (bad, jnp.mean)])
        ... except kaun.errors.NonFiniteLoss as error:
        ...     error.step, error.parameters, error.kaun_state
        (2, ('weight',), TrainState(step=1, 3 parameters in float32))
    """

    step: int
    loss: float
    parameters: tuple[str, ...]
    leaves: tuple[str, ...]

    def __init__(
        self, message: str, step: int, loss: float, parameters: tuple[str, ...], leaves: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.step, self.loss, self.parameters, self.leaves = step, loss, parameters, leaves
        self.kaun_step: Any = None  # the step, with the state before it and its item, for kaun.explain
        self.kaun_flush = False  # whether it comes from flush, which has no item

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is pickled as its class and `args`, which have only the message. The item has the
        # loss, a closure, which does not pickle.
        given = (*self.args, self.step, self.loss, self.parameters, self.leaves)
        return type(self), given, {**self.__dict__, "kaun_step": None}


class CaptureError(TypeError):
    """A loss captures something that a compiled step cannot use faithfully; the message says how to write it instead.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import layers
        >>> trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1))
        >>> seen = []
        >>> def loss(output):
        ...     seen.append(output)
        ...     return output.mean()
        >>> try:
        ...     trainer.step(trainer.init(), jnp.ones((2, 1)), loss=loss)
        ... except kaun.errors.CaptureError as error:
        ...     print("refused before the step was compiled")
        refused before the step was compiled
    """


class MissingContext(KeyError):
    """A layer read a name from its Context that is not there; the message lists the names that are.

    Examples:
        >>> import jax.numpy as jnp, kaun
        >>> ctx = kaun.Context(mask=jnp.ones(3))
        >>> try:
        ...     ctx["attention_mask"]
        ... except kaun.errors.MissingContext as error:
        ...     print(str(error).split(". ")[0])
        Context has no 'attention_mask'; it has 'mask'
    """

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and escapes included.
        return str(self.args[0]) if self.args else ""


class RecompilationWarning(UserWarning):
    """The same code is compiled again and again; the message names the argument or value that keeps changing.

    Examples:
        In a test suite, make it an error:

        >>> import warnings, kaun
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", kaun.errors.RecompilationWarning)
    """


class ResumeMismatch(ValueError):
    """A checkpoint is intact, but belongs to another run; the message names what differs, and how to proceed.

    Examples:
        >>> import tempfile, jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, checkpoint, layers, losses, rng
        >>> def train(features, folder):
        ...     with rng.scope(0):
        ...         trainer = kaun.Trainer(model=layers.linear(2, features), optimizer=optax.sgd(0.1))
        ...         state = trainer.init()
        ...     item = (jnp.ones((1, 2)), lambda out: (out**2).mean())
        ...     return trainer.fit(state, Data.repeat(2, item), checkpoints=checkpoint.Directory(folder))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = train(3, folder)
        ...     try:
        ...         train(4, folder)
        ...     except kaun.errors.ResumeMismatch as error:
        ...         print("expected float32[2, 4], found float32[2, 3]" in str(error))
        True
    """


class Locked(RuntimeError):
    """Another run writes to the same directory of checkpoints; the message says which.

    Examples:
        >>> import tempfile, jax.numpy as jnp, optax, kaun
        >>> from kaun import checkpoint, layers, rng
        >>> trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1))
        >>> with rng.scope(0):
        ...     state = trainer.init()
        >>> items = [(jnp.ones((1, 1)), jnp.mean)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = checkpoint.Directory(folder)
        ...     def report(step, loss, state):
        ...         trainer.fit(state, items, checkpoints=place)
        ...     try:
        ...         trainer.fit(state, items, checkpoints=place, report=report)
        ...     except kaun.errors.Locked as error:
        ...         print("in use by another fit of this process" in str(error))
        True
    """


class Unavailable(RuntimeError, ValueError, AttributeError):
    """An attribute has no value here or yet, such as ``stopper.best`` before a value was measured.

    As it is an AttributeError, ``hasattr`` is False there, and ``inspect.getmembers`` and debuggers leave it out.

    Examples:
        >>> from kaun import reports
        >>> stopper = reports.early_stopping("accuracy", mode="max", patience=2)
        >>> hasattr(stopper, "best")
        False
    """

"""The exception and warning types of kaun, and the words they share."""

from __future__ import annotations

__all__ = [
    "CaptureError", "EarlyStop", "MissingContext", "NonFiniteLoss", "RecompilationWarning", "ResumeMismatch",
]  # fmt: skip


class EarlyStop(Exception):
    """Raise inside ``report`` to end ``fit`` early; ``fit`` returns the state after that step.

    >>> import kaun
    >>> def report(step, loss, state):
    ...     if loss < 0.01:
    ...         raise kaun.EarlyStop
    """


class NonFiniteLoss(ArithmeticError):
    """A step's loss or gradient is nan or infinite; the state before that step is its ``kaun_state``.

    Attributes:
        step: the number of the step in this fit.
        loss: its loss.
        parameters: the paths of the parameters whose gradient is not finite.

    >>> import jax.numpy as jnp, optax, kaun
    >>> from kaun import layers, losses, rng
    >>> with rng.scope(0):
    ...     trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    ...     state = trainer.init()
    >>> good, bad = jnp.ones((1, 2)), jnp.full((1, 2), jnp.nan)
    >>> try:
    ...     trainer.fit(state, [(good, jnp.mean), (bad, jnp.mean)])
    ... except kaun.NonFiniteLoss as error:
    ...     error.step, error.parameters, error.kaun_state
    (2, ('weight',), TrainState(step=1, 3 parameters in float32))
    """

    def __init__(self, message: str, step: int, loss: float, parameters: tuple[str, ...]) -> None:
        super().__init__(message)
        self.step, self.loss, self.parameters = step, loss, parameters


class CaptureError(TypeError):
    """A loss captures something that a compiled step cannot use faithfully; the message has the fix."""


class MissingContext(KeyError):
    """A layer asked its Context for a name that is not there; the message lists the names that are."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message, quotes and escapes included.
        return str(self.args[0]) if self.args else ""


class RecompilationWarning(UserWarning):
    """One piece of code compiles again and again; the message names what keeps changing."""


class ResumeMismatch(ValueError):
    """A checkpoint is sound, but not of this run; the message names what differs, and the way out.

    >>> import tempfile, jax.numpy as jnp, optax, kaun
    >>> from kaun import checkpoint, layers, rng
    >>> from kaun.checkpoint.store import Store
    >>> with rng.scope(0):
    ...     trainers = [kaun.Trainer(model=layers.linear(2, n), optimizer=optax.sgd(0.1)) for n in (3, 4)]
    ...     small, large = (trainer.init(dtype=jnp.float32) for trainer in trainers)
    >>> with tempfile.TemporaryDirectory() as folder, Store.open(checkpoint.Directory(folder)) as store:
    ...     store.save(1, small, {}, {})
    ...     store.newest(large)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    kaun.errors.ResumeMismatch: the checkpoint of step 1 ... expected float32[2, 4], found float32[2, 3]
    """

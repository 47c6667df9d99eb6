"""A forward pass and its loss outside of a compiled step, where layers and losses see numbers and check them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from kaun import rng
from kaun._messages import in_kaun
from kaun._step.precision import apply_model, cast_to_compute
from kaun._step.settings import Carry, Settings
from kaun._step.trainable import Partition
from kaun.context import Context

__all__ = ["refused_values"]


def refused_values(
    settings: Settings, carry: Carry, key: jax.Array, x: Any, ctx: Context, loss: Callable[[Any], Any]
) -> ValueError | None:
    """Return the error of a layer or loss of kaun that refuses the values of an item, None if all take them.

    In a compiled step indices out of range become nan, because their values are not known there.

    Args:
        settings: The trainer's settings.
        carry: Variables, optimizer state, number of steps.
        key: The run's key.
        x: The model's input.
        ctx: The context of the layers.
        loss: The loss, as the user wrote it.
    """
    vars, _, step = carry
    parts = Partition(settings.trainable, vars, functools.partial(cast_to_compute, settings.policy))
    try:
        # The whole batch at once, and loops in Python: inside of a loop or a jitted function values are not known.
        with jax.disable_jit(), rng.scope(jax.random.fold_in(key, step)), parts.frozen_layers():
            every = parts.forward(parts.vars.params)
            loss(apply_model(settings.policy, settings.model, every, x, ctx, training=True)[0])
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and in_kaun(trace.tb_frame.f_code.co_filename):
            return error.with_traceback(None)  # whose frames would keep all activations alive
    except Exception:
        pass  # what does not run outside of a compiled step is not the reason
    return None

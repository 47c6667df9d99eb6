"""Tokens per second, and how much of the device's peak a fit uses."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from kaun._calls import public, shown
from kaun._report import Report

__all__ = ["throughput"]


@public
def throughput(
    *, tokens: int | str | None = None, flops: float | None = None, peak_flops: float | None = None
) -> Report:
    """Return the report that adds ``"tokens_per_second"`` and ``"mfu"`` to the blocks of other reports.

    Loggers (``jsonl``, ``tensorboard``, ...) in the same ``all_of`` write them. Both come from the time of finished
    blocks of steps, without the time that compiling and other reports take, so that ``fit`` waits for nothing. The
    model FLOPs utilization ``mfu`` is ``flops`` over the time of a step and ``peak_flops``: 0.4 is 40 % of the peak.

    ``kaun.summary(trainer, x, loss).cost.flops`` is what XLA counts for a compiled step: a multiply-add is two
    operations, and update, loss and what ``layers.remat`` computes again count too. XLA counts the body of a loop once:
    with ``Trainer(microbatches=k)`` multiply it by k, and count a model with a ``lax.scan`` by hand. A usual estimate
    for transformers is ``6 * parameters * tokens``.

    Args:
        tokens: The number of tokens of each example; or, where that differs, the name of the scalar that the loss
            returns with the number of tokens of the step. By default there are no tokens per second.
        flops: The floating-point operations of one step, of the whole batch. By default there is no ``mfu``.
        peak_flops: The floating-point operations per second that all devices together can do, by their data sheet.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is not above 0, nothing is given, or one of ``flops`` and ``peak_flops`` is missing; in
            the fit, if the loss returns no scalar of the name ``tokens``.

    Examples:
        >>> import numpy as np
        >>> from kaun import reports
        >>> report = reports.throughput(tokens=512, flops=2.5e9, peak_flops=1e11)
        >>> seconds = np.full(2, 0.1, np.float32)
        >>> values = {"loss": np.zeros(2), "step_time": seconds, "examples_per_step": np.full(2, 32)}
        >>> found = report.block(1, values)  # fit does this
        >>> found["tokens_per_second"].round(), found["mfu"].round(2)
        (array([163840., 163840.], dtype=float32), array([0.25, 0.25], dtype=float32))
    """
    if not (isinstance(tokens, (str, type(None))) or type(tokens) is int):
        raise TypeError(
            f"throughput expected tokens as the number of tokens of an example, an int, or the name of a scalar that "
            f"the loss returns, received {shown(tokens)}. Write throughput(tokens=512)."
        )
    for name, value in (("flops", flops), ("peak_flops", peak_flops)):
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"throughput expected {name} as a number, received {shown(value)}. Write {name}=1e12.")
    for name, value in (("tokens", tokens), ("flops", flops), ("peak_flops", peak_flops)):
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            example = "512" if name == "tokens" else "1e12"
            raise ValueError(
                f"throughput expected {name} to be a finite number above 0, received {shown(value)}. Write "
                f"{name}={example}."
            )
    if (flops is None) != (peak_flops is None) or (tokens is None and flops is None):
        raise ValueError(
            "throughput expected tokens=, or flops= and peak_flops=, or all three. Write throughput(tokens=512, "
            "flops=kaun.summary(trainer, x, loss).cost.flops, peak_flops=312e12)."
        )
    return _Throughput(tokens, None if flops is None or peak_flops is None else flops / peak_flops)


class _Throughput(Report):
    def __init__(self, tokens: int | str | None, seconds: float | None) -> None:
        self.__name__ = "throughput"
        self._tokens, self._seconds = tokens, seconds  # of a step at the peak
        wanted = {"tokens_per_second": tokens is not None, "mfu": seconds is not None}
        self.measures: Collection[str] = tuple([name for name in wanted if wanted[name]])

    def __repr__(self) -> str:
        return f"<throughput: {', '.join(self.measures)}>"

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time, added = np.maximum(values["step_time"].astype(np.float64), 1e-9), dict[str, np.ndarray]()
        if isinstance(self._tokens, str):
            if self._tokens not in values:
                raise ValueError(
                    f"throughput(tokens={self._tokens!r}) needs a scalar of that name, which the loss does not return. "
                    f"Return it: (loss, {{{self._tokens!r}: mask.sum()}}), or give the tokens of an example as an int."
                )
            added["tokens_per_second"] = (values[self._tokens] / time).astype(np.float32)
        elif self._tokens is not None:
            added["tokens_per_second"] = (values["examples_per_step"] * self._tokens / time).astype(np.float32)
        if self._seconds is not None:
            added["mfu"] = (self._seconds / time).astype(np.float32)
        return added

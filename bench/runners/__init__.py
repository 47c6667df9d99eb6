"""Who trains: each runner is one function from a workload to a ``Session``. ``RUNNERS`` names them all."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Session:
    """A model in training.

    Attributes:
        run: ``run(steps)`` trains on the first batches of the pass, going on from where the model is, and returns when
            the weights are there.
        check: the loss of the first ``batch`` rows at the weights of now, a float.
    """

    run: Callable[[int], None]
    check: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Runner:
    """A way to train.

    Attributes:
        label: what the tables call it.
        where: ``module:function``, in this package.
        needs: the module without which it is skipped.
        only: the workloads that have it, none for all.
    """

    label: str
    where: str
    needs: str = "kaun"
    only: tuple[str, ...] = ()


RUNNERS = {
    "kaun": Runner("**kaun**, no report", "by_kaun:no_report"),
    "kaun-every100": Runner("**kaun**, `every(100)`", "by_kaun:every_hundred"),
    "kaun-each": Runner("**kaun**, a report at each step", "by_kaun:each_step"),
    "kaun-held": Runner("**kaun**, no report, `state = fit(state, data)`", "by_kaun:held", only=("adam50m",)),
    "kaun-hand": Runner("kaun's loop around the hand-written forward pass", "by_kaun:by_hand_inside"),
    "hand": Runner("by hand: jitted, donated, not synced", "by_hand:unsynced"),
    "hand-synced": Runner("by hand, `float(loss)` at each step", "by_hand:synced"),
    "hand-scan": Runner("by hand, `lax.scan`, data on the device", "by_hand:scanned"),
    "kaun-nnx": Runner("kaun's loop around the Flax NNX module", "by_nnx:in_kaun", "flax", only=("xor", "mlp")),
    "kaun-equinox": Runner(
        "kaun's loop around the Equinox module", "by_equinox:in_kaun", "equinox", only=("xor", "mlp")
    ),
    "nnx": Runner("Flax NNX, as in its docs", "by_nnx:session", "flax"),
    "equinox": Runner("Equinox, as in its docs", "by_equinox:session", "equinox"),
    "keras": Runner("Keras on JAX, `model.fit`", "by_keras:session", "keras"),
    "torch": Runner("PyTorch, eager", "by_torch:session", "torch"),
}

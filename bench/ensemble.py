"""Measure what many members of one trainer cost: ``python -m bench.ensemble``, or with a number of rounds.

Four ways to train xor for 1000 steps run in turn in one process: one model by ``fit``, one by a jitted step in a loop
written by hand, 256 members by ``Ensemble.fit``, and some of 256 models by one ``fit`` after another. Printed are the
least wall times, and the least CPU times of all threads, which other programs on the machine change less; and the
ratios that the design sets bars for: at most 12 times one fit, at most the loop written by hand, 20 times faster than
one by one. A ``stop=`` that is never true shows what it costs.
"""

import sys
import time

import jax
import jax.numpy as jnp
import optax

import kaun
from kaun import Data, layers, losses, rng

MEMBERS, STEPS, ALONE = 256, 1000, 16


def model():
    return layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])


def by_hand(vars, x, y, optimizer):
    """Return a function that trains one model by a jitted step, called in a loop that does not wait."""

    @jax.jit
    def step(params, opt_state):
        def objective(params):
            h = jnp.tanh(x @ params[0]["weight"] + params[0]["bias"])
            return losses.binary_cross_entropy(h @ params[2]["weight"] + params[2]["bias"], y)

        loss, gradient = jax.value_and_grad(objective)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def run():
        params, opt_state = vars.params, optimizer.init(vars.params)
        for _ in range(STEPS):
            params, opt_state, loss = step(params, opt_state)
        return loss

    return run


def ways():
    """Return by name the functions to time."""
    x = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]], jnp.float32)
    y = jnp.array([[0], [1], [1], [0]], jnp.float32)
    optimizer = optax.adam(0.01)
    with rng.scope(0):
        trainer = kaun.Trainer(model=model(), optimizer=optimizer)
        state, many = trainer.init(), kaun.Ensemble(trainer, MEMBERS)
        states = many.init()
    data = Data.repeat(STEPS, (x, lambda out: losses.binary_cross_entropy(out, y)))
    never = lambda loss: loss < 0
    return {
        "one fit": lambda: trainer.fit(state, data).vars,
        "one loop by hand": by_hand(state.vars, x, y, optimizer),
        f"{MEMBERS} members": lambda: many.fit(states, data).vars,
        f"{MEMBERS} members, stop=": lambda: many.fit(states, data, stop=never).vars,
        f"{ALONE} fits": lambda: [trainer.fit(state, data).vars for _ in range(ALONE)],
    }


def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """Return by name the least wall time and the least CPU time, in seconds."""
    functions = ways()
    found = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for number in range(rounds):
        order = list(functions.items())
        for name, function in order if number % 2 else reversed(order):
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    least = {name: tuple(map(min, zip(*seconds, strict=True))) for name, seconds in found.items()}
    for name, (wall, cpu) in least.items():
        print(f"{name:20} {wall * 1e3:9.2f} ms wall {cpu * 1e3:9.2f} ms CPU", flush=True)
    return least


def main(arguments: list[str]) -> None:
    least = measure(int(arguments[0]) if arguments else 15)
    for kind, seconds in zip(("wall", "CPU"), zip(*least.values(), strict=True), strict=True):
        one, by_hand, many, stopped, alone = seconds
        each = alone / ALONE * MEMBERS
        print(
            f"{kind}: {MEMBERS} members take {many / one:.1f} times one fit, {many / by_hand:.2f} times the loop by "
            f"hand, and 1/{each / many:.0f} of one by one; with stop= {stopped / many:.2f} times as long"
        )


if __name__ == "__main__":
    main(sys.argv[1:])

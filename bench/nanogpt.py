"""nanoGPT's setting for a CPU trained to its validation loss: ``python -m bench.nanogpt TEXT kaun`` (or ``torch``).

``TEXT`` is the file of tiny Shakespeare, which has 65 characters. The first nine tenths are trained on, in random
windows, the rest is validated on, all of it: 2,000 steps of AdamW with a warm-up and a cosine decay, which nanoGPT's
page says reach a loss of 1.88. It takes minutes, so it is no part of ``python -m bench``.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path

import numpy as np

from bench.networks import nanogpt as network

STEPS, BATCH, LENGTH = 2000, 12, network.LENGTH
RATE, LOWEST, WARMUP, DECAY, BETAS, LONGEST = 1e-3, 1e-4, 100, 0.1, (0.9, 0.99), 1.0


def windows(path, steps):
    """The windows to train on and to validate on, each with the same one a character further on."""
    symbols, text = np.unique(np.frombuffer(Path(path).read_bytes(), np.uint8), return_inverse=True)
    if len(symbols) != network.VOCAB:
        raise SystemExit(f"{path} has {len(symbols)} characters, expected the {network.VOCAB} of tiny Shakespeare.")
    text, cut = text.astype(np.int32), len(text) * 9 // 10
    starts = np.random.default_rng(0).integers(0, cut - LENGTH, steps * BATCH)
    train, valid = starts[:, None] + np.arange(LENGTH + 1), np.arange(cut, len(text) - LENGTH, LENGTH)
    return [(text[at][:, :-1], text[at][:, 1:]) for at in (train, valid[:, None] + np.arange(LENGTH + 1))]


def weights():
    """nanoGPT's initial weights: those of the layers whose outputs are added up are smaller."""
    made = network.weights(np.random.default_rng(1))
    for block in made["blocks"]:
        for key in ("out", "down"):
            block[key]["weight"] /= np.float32(math.sqrt(2 * network.BLOCKS))
    return made


def rate_at(step, steps, cos=math.cos):
    """The learning rate of a step after the warm-up."""
    return LOWEST + 0.5 * (RATE - LOWEST) * (1 + cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def by_kaun(train, valid, steps):
    """Seconds of all steps, compilation included, and the validation loss."""
    import jax
    import jax.numpy as jnp
    import optax

    import kaun
    from kaun import Data, losses, rng

    def rate(step):
        return jnp.where(step < WARMUP, RATE * (step + 1) / (WARMUP + 1), rate_at(step, steps, jnp.cos))

    matrices = functools.partial(jax.tree.map, lambda a: a.ndim > 1)
    adamw = optax.adamw(rate, *BETAS, weight_decay=DECAY, mask=matrices)
    model, params = network.kaun(weights())
    trainer = kaun.Trainer(model=model, optimizer=optax.chain(optax.clip_by_global_norm(LONGEST), adamw))
    with rng.scope(0):
        drawn = model.init(dtype=jnp.float32)
        state = trainer.make_state(drawn.replace(params=jax.tree.map(jnp.array, params)))
    start = time.perf_counter()
    state = trainer.fit(state, Data.batches(train, BATCH).with_loss(losses.cross_entropy_sparse))
    seconds = time.perf_counter() - start
    found = trainer.evaluate(state, Data.batches(valid, 100), {"loss": losses.cross_entropy_sparse})
    return seconds, float(found["loss"])


def by_torch(train, valid, steps):
    """The same in PyTorch, eager."""
    import torch
    from torch.nn import functional

    model = network.torch(weights())
    given = list(model.parameters())
    groups = [{"params": [p for p in given if p.ndim > 1], "weight_decay": DECAY}]
    groups.append({"params": [p for p in given if p.ndim == 1], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
    train, valid = ([torch.from_numpy(a).long() for a in arrays] for arrays in (train, valid))
    loss = lambda x, y: functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
    start = time.perf_counter()
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (i + 1) / (WARMUP + 1) if i < WARMUP else rate_at(i, steps)
        optimizer.zero_grad()
        loss(*(a[i * BATCH : (i + 1) * BATCH] for a in train)).backward()
        torch.nn.utils.clip_grad_norm_(given, LONGEST)
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        parts = [(loss(x, y).item(), len(x)) for x, y in zip(*(a.split(100) for a in valid), strict=True)]
    return seconds, sum(value * n for value, n in parts) / sum(n for _, n in parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.nanogpt", description=__doc__.splitlines()[0])
    parser.add_argument("text", help="the file of tiny Shakespeare")
    parser.add_argument("runner", choices=("kaun", "torch"))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"more than {WARMUP}; default: {STEPS}")
    given = parser.parse_args()
    run = {"kaun": by_kaun, "torch": by_torch}[given.runner]
    used = time.process_time()
    seconds, loss = run(*windows(given.text, given.steps), given.steps)
    found = {"runner": given.runner, "steps": given.steps, "seconds": seconds, "cpu": time.process_time() - used}
    print(json.dumps({**found, "validation loss": loss}))


if __name__ == "__main__":
    main()

"""A penalty: logistic regression with an elastic net, whose weights are those that scikit-learn finds.

Run it with: python examples/penalty.py           (needs pip install ".[examples]")
         or: python examples/penalty.py --strength 0.1
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import kaun
from kaun import Data, layers, losses, rng


def main(*, strength=0.02, steps=4000, seed=0):
    data = load_breast_cancer()
    x = ((data.data - data.data.mean(axis=0)) / data.data.std(axis=0)).astype(np.float32)
    y = data.target.astype(np.float32)[:, None]

    def elastic_net(params):
        weight = params["weight"]  # the bias is not penalized
        return strength * (0.8 * jnp.abs(weight).sum() + 0.2 * jnp.square(weight).sum() / 2)

    with rng.scope(seed):
        rate = optax.cosine_decay_schedule(0.02, decay_steps=steps)
        trainer = kaun.Trainer(model=layers.linear(30, 1), optimizer=optax.adam(rate), penalty=elastic_net)
        state = trainer.init()
    batch = (x, lambda logits: losses.binary_cross_entropy(logits, y))
    state = trainer.fit(state, Data.repeat(steps, batch))
    found = np.asarray(state.vars.params["weight"])[:, 0]

    reference = LogisticRegression(C=1 / (len(x) * strength), l1_ratio=0.8, solver="saga", tol=1e-6, max_iter=20_000)
    wanted = reference.fit(x, y[:, 0]).coef_[0]
    for name, ours, theirs in zip(data.feature_names, found, wanted, strict=True):
        if theirs != 0:
            print(f"{name:25} {ours:7.3f}   scikit-learn {theirs:7.3f}")
    print(
        f"{np.sum(np.abs(found) > 0.01)} of 30 features are used; weights differ by {np.abs(found - wanted).max():.4f}"
    )
    return found, wanted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Logistic regression with a penalty on its weights.")
    parser.add_argument("--strength", type=float, default=0.02, help="of the penalty (default 0.02)")
    main(**vars(parser.parse_args()))

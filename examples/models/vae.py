"""A variational autoencoder (Kingma and Welling, 2014), on made data whose distribution is known.

The data are normal: two latent factors, mixed to six features, and noise. So two things can be checked. What the model
draws should have the mean and the covariance of the data. And its loss, an upper bound of the negative log likelihood,
cannot be less than the entropy of the data on average, and comes close to it.

Run it with: python examples/models/vae.py            (some seconds)
         or: python examples/models/vae.py --steps 2000
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, rng


def make_model(*, features=6, latent=2, hidden=64):
    """Make the model: from ``{"data": [batch, features]}`` to what the loss needs, a dict of arrays.

    ``"mean"`` and ``"log_variance"`` ``[batch, latent]`` are the encoder's, ``"output"`` and ``"variance"`` ``[batch,
    features]`` are the decoder's for a latent vector drawn from them. Of ``{"latent": [batch, latent]}`` only the
    decoder's are returned.
    """

    def perceptron(inputs, outputs):
        return layers.sequential([layers.linear(inputs, hidden), layers.gelu(), layers.linear(hidden, outputs)])

    parts = {
        "encoder": perceptron(features, 2 * latent),
        "decoder": perceptron(latent, features),
        "noise": layers.parameter((features,)),  # the logarithm of its variance
    }

    def forward(m, x):
        def decode(z):
            output = m.decoder(z)
            return {"output": output, "variance": jnp.broadcast_to(jnp.exp(m.noise()), output.shape)}

        if "latent" in x:
            return decode(x["latent"])
        mean, log_variance = jnp.split(m.encoder(x["data"]), 2, axis=-1)
        # The reparametrization: a draw that can be differentiated by the mean and the variance.
        draw = jax.random.normal(rng.next_key(), mean.shape, mean.dtype)
        return {"mean": mean, "log_variance": log_variance, **decode(mean + jnp.exp(log_variance / 2) * draw)}

    return layers.module(parts, forward, name="vae")


def negative_elbo(out, x):
    """Return the negative evidence lower bound in nats for each row, and its two terms by name."""
    constant = np.log(2 * np.pi) / 2  # gaussian_nll is the mean over features, without this
    reconstruction = x.shape[1] * (losses.gaussian_nll(out["output"], out["variance"], x) + constant)
    terms = jnp.exp(out["log_variance"]) + out["mean"] ** 2 - 1 - out["log_variance"]
    kl = terms.sum(axis=1).mean() / 2
    return reconstruction + kl, {"reconstruction": reconstruction, "kl": kl}


def make_data(rows, *, seed=0):
    """Return made data [rows, 6], and the mean and the covariance of their distribution."""
    mixing, mean = np.random.default_rng(0).normal(size=(2, 6)), np.arange(6) - 2.5
    random = np.random.default_rng(seed)
    x = mean + random.normal(size=(rows, 2)) @ mixing + 0.5 * random.normal(size=(rows, 6))
    return x.astype(np.float32), mean, mixing.T @ mixing + 0.25 * np.eye(6)


def entropy(covariance):
    """Return the entropy of a normal distribution in nats."""
    return np.linalg.slogdet(2 * np.pi * np.e * covariance)[1] / 2


def draw_samples(trainer, state, rows):
    """Return what the model draws, [rows, 6], with keys from the RNG scope."""
    out = trainer.predict(state, {"latent": jax.random.normal(rng.next_key(), (rows, 2))})
    return np.asarray(out["output"] + jnp.sqrt(out["variance"]) * jax.random.normal(rng.next_key(), (rows, 6)))


def main(*, steps=600, rows=20_000, seed=0):
    x, mean, covariance = make_data(rows)
    test, _, _ = make_data(rows, seed=1)
    with rng.scope(seed):
        batches = Data.batches(x, 128, shuffle=True, drop_last=True)
        train = batches.map(lambda x: ({"data": x}, x)).with_loss(negative_elbo)
        schedule = optax.cosine_decay_schedule(0.01, decay_steps=steps)
        trainer = kaun.Trainer(model=make_model(), optimizer=optax.adam(schedule))
        state = trainer.init(dtype=jnp.float32)
        history = kaun.reports.history()
        state = trainer.fit(state, train.epochs(-(-steps // len(train))).take(steps), report=history)
        samples = draw_samples(trainer, state, rows)

    score = trainer.evaluate(state, [({"data": test}, test)], {"loss": lambda out, x: negative_elbo(out, x)[0]})["loss"]
    found = {
        "loss": score,
        "entropy": entropy(covariance),
        "mean": np.abs(samples.mean(axis=0) - mean).max(),
        "covariance": np.abs(np.cov(samples.T) - covariance).max() / covariance.max(),
    }
    print(f"The loss of test data is {score:.3f} nats; no model has less than their entropy, {found['entropy']:.3f}.")
    print(
        f"Samples: the largest error of the mean is {found['mean']:.3f}, of the covariance {found['covariance']:.1%}."
    )
    return trainer, state, history, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a variational autoencoder on normal data.")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    main(**vars(parser.parse_args()))

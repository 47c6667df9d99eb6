"""The variational autoencoder of examples/models/vae.py, and the same in PyTorch with torch.distributions."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import rng  # noqa: E402

NAMES = {f"params.{part}.{i}.{x}": f"{part}.{i}.{x}" for part in ("encoder", "decoder") for i in (0, 2) for x in ("weight", "bias")}  # fmt: skip
NAMES |= {"params.noise.weight": "noise"}


class Autoencoder(torch.nn.Module):
    def __init__(self, features, latent, hidden):
        super().__init__()

        def perceptron(i, o):
            gelu = torch.nn.GELU(approximate="tanh")
            return torch.nn.Sequential(torch.nn.Linear(i, hidden), gelu, torch.nn.Linear(hidden, o))

        self.encoder, self.decoder = perceptron(features, 2 * latent), perceptron(latent, features)
        self.noise = torch.nn.Parameter(torch.zeros(features))

    def forward(self, x, draw):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        posterior = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
        output = self.decoder(mean + posterior.stddev * draw)
        variance = torch.exp(self.noise).expand_as(output)
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
        log_density = torch.distributions.Normal(output, variance.sqrt()).log_prob(x).sum(dim=1)
        parts = {"log_variance": log_variance, "mean": mean, "output": output, "variance": variance}
        return list(parts.values()), (kl - log_density).mean()


def test_outputs_and_a_step(family, same_step):
    vae = family("vae")
    sizes = {"features": 6, "latent": 2, "hidden": 16}
    x, _, _ = vae.make_data(8)

    def theirs(module, key):
        with rng.scope(key):
            draw = jax.random.normal(rng.next_key(), (8, 2))
        return module(torch.from_numpy(x), torch.from_numpy(np.array(draw)))

    loss = lambda out: vae.negative_elbo(out, x)
    same_step(vae.make_model(**sizes), Autoencoder(**sizes), NAMES, ({"data": x}, loss), theirs, rate=0.01)

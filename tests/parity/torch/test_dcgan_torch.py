"""DCGAN of examples/models/dcgan.py, and the same layers of PyTorch: a step of each network."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import rng  # noqa: E402

nn = torch.nn
F = nn.functional


def norm(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


def make_generator(noise, channels):
    return nn.Sequential(
        nn.ConvTranspose2d(noise, channels, 4, bias=False), norm(channels), nn.ReLU(),
        nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1, bias=False), nn.Tanh(),
    )  # fmt: skip


def make_discriminator(channels):
    return nn.Sequential(
        nn.Conv2d(1, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), norm(2 * channels), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * channels, 1, 4, bias=False), nn.Flatten(0),
    )  # fmt: skip


GENERATOR = {f"params.{x}": x for x in ("0.weight", "1.weight", "1.bias", "3.weight")}
DISCRIMINATOR = {f"params.net.{x}": x for x in ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight")}


def images(seed, rows):
    return np.random.default_rng(seed).uniform(-1, 1, (rows, 8, 8, 1)).astype(np.float32)


def first(x):
    return torch.from_numpy(x).movedim(-1, 1)


def test_a_step_of_the_discriminator(family, same_step):
    dcgan = family("dcgan")
    x = {"real": images(0, 6), "drawn": images(1, 6)}

    def theirs(module, _):
        drawn, real = module(first(x["drawn"])), module(first(x["real"]))
        wrong = F.binary_cross_entropy_with_logits
        return [drawn, real], wrong(real, torch.ones(6)) + wrong(drawn, torch.zeros(6))

    _, model = dcgan.make_model(channels=4)
    same_step(model, make_discriminator(4), DISCRIMINATOR, (x, dcgan.judged), theirs, rate=0.1)


def test_a_step_of_the_generator(family, same_step):
    dcgan = family("dcgan")
    model, judge = dcgan.make_model(noise=5, channels=4)
    with rng.scope(3):
        variables = judge.init()
        z = np.array(jax.random.normal(rng.next_key(), (6, 1, 1, 5)))
    other = make_discriminator(4)
    with torch.no_grad():
        for name, held in other.named_parameters():
            layer, key = name.split(".")
            array = np.array(variables.params["net"][int(layer)][key])
            held.copy_(torch.from_numpy(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array))

    def theirs(module, _):
        drawn = module(first(z))
        return [drawn.movedim(1, -1)], F.binary_cross_entropy_with_logits(other(drawn), torch.ones(6))

    loss = dcgan.make_fooled(judge, variables)
    same_step(model, make_generator(5, 4), GENERATOR, (z, loss), theirs, rate=1.0)

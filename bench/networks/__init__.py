"""Larger networks, a module each: the weights, and the same network by hand, of kaun's layers, and of other libraries.

Each module has ``weights(g)``, in kaun's layout; ``hand(params, x)``, the forward pass; ``kaun(weights)``, a layer and
its parameters; ``torch(weights)``, a module; and ``nnx(weights)``, a module.
"""

import importlib
from types import ModuleType

NAMES = ("lstm", "nanogpt", "resnet")


def module(name: str) -> ModuleType:
    """The module of that name; the libraries that it compares with are imported by its functions."""
    return importlib.import_module(f"bench.networks.{name}")


def uniform(g, fan_in, fan_out, shape):
    """Glorot's initial weights."""
    numbers = g.random(shape, "float32")
    numbers -= 0.5
    numbers *= 2 * (6 / (fan_in + fan_out)) ** 0.5
    return numbers

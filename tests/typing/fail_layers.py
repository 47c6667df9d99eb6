"""Models that do not fit together, and layers that are not layers."""

# What a refused call returns is unknown: its own error is the one to mark.
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false

from typing import Any

import jax
import jax.numpy as jnp

from kaun import Layer, Vars, layers
from kaun.layers import Float, Int, Module

a = layers.linear(2, 4) >> layers.embedding(10, 4)  # E: reportOperatorIssue
b = layers.compose(layers.linear(2, 4), layers.embedding(10, 4))  # E: reportArgumentType
c = layers.embedding(10, 4) >> layers.embedding(10, 4)  # E: reportOperatorIssue
d: Layer[Float, Float] = layers.sequential([layers.linear(2, 4), layers.embedding(10, 4)])  # E: reportAssignmentType
e = layers.linear(2, 4) >> layers.sequential([layers.embedding(10, 4), layers.linear(4, 2)])  # E: reportOperatorIssue
f = layers.residual(layers.embedding(10, 4))  # E: reportArgumentType
g = layers.linear(2, 4) >> jnp.tanh  # E: reportOperatorIssue
h: Layer[Float, Float] = layers.embedding(10, 4)  # E: reportAssignmentType
i: Layer[Int, Int] = layers.embedding(10, 4) >> layers.relu()  # E: reportAssignmentType

layers.linear(2)  # E: reportCallIssue
layers.linear("2", 4)  # E: reportArgumentType
layers.conv2d(1, 8, padding="CAUSAL")  # E: reportArgumentType
layers.conv2d(1, 8, padding="same")  # E: reportArgumentType
w = layers.linear(2, 4).weight  # E: reportAttributeAccessIssue


def init(*, dtype: Any) -> Vars:
    return Vars(params={}, state={}, dtype=dtype)


def apply(vars: Vars, x: Any) -> Any:
    return x


j: Layer[Float, Float] = Layer(init=init, apply=apply)  # E: reportArgumentType
k = layers.linear(2, 4).init(jnp.float32)  # E: reportCallIssue


# sequential takes layers, and module a dict of them and a function of two arguments.
layers.sequential([layers.linear(2, 4), jnp.tanh])  # E: reportCallIssue, reportArgumentType
layers.sequential({"a": jnp.tanh})  # E: reportCallIssue, reportArgumentType


def images(m: Module, x: jax.Array) -> jax.Array:
    return m.a(x)


def tokens(m: Module, x: Int) -> jax.Array:
    return m.a(x)


layers.module({"a": jnp.tanh}, images)  # E: reportCallIssue, reportArgumentType
layers.module([layers.relu()], images)  # E: reportCallIssue, reportArgumentType
layers.module({"a": layers.relu()}, jnp.sin)  # E: reportCallIssue, reportArgumentType
m = layers.linear(2, 4) >> layers.module({"a": layers.embedding(10, 4)}, tokens)  # E: reportOperatorIssue
n: Layer[Int, Float] = layers.module({"a": layers.linear(2, 4)}, images)  # E: reportAssignmentType
o = layers.repeat(layers.embedding(10, 4), 2)  # E: reportArgumentType
p = layers.lora(layers.linear(2, 4), 2, where="weight")  # E: reportArgumentType

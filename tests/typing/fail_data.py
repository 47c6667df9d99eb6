"""Pipelines whose items are not what the next stage takes."""

# What a refused call returns is unknown: its own error is the one to mark.
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false

import jax
import jax.numpy as jnp

from kaun import Data, losses

words = Data.from_items(["a", "bc"])
lengths: Data[str] = words.map(len)  # E: reportAssignmentType
words.map(lambda w: w.shape)  # E: reportAttributeAccessIssue
words.map(3)  # E: reportCallIssue, reportArgumentType
words.random_map(len)  # E: reportArgumentType
words.batch("2")  # E: reportArgumentType
words.epochs()  # E: reportCallIssue
words.filter(lambda w: w.shape)  # E: reportAttributeAccessIssue
words.sample("ab", 3)  # E: reportArgumentType
Data.mix(words, [1])  # E: reportArgumentType
Data.concat([words])  # E: reportArgumentType
pair: Data[tuple[str, str]] = Data.zip(words, words.map(len))  # E: reportAssignmentType
number: int = next(iter(words))  # E: reportAssignmentType
row: str = next(iter(Data.from_arrays(jnp.zeros(3))))  # E: reportAssignmentType
Three = tuple[jax.Array, jax.Array, jax.Array]
three: Data[Three] = Data.from_arrays(jnp.zeros(3), jnp.zeros(3))  # E: reportAssignmentType
batches = Data.batches((jnp.zeros(3), jnp.zeros(3)), 2)
x, loss, ctx = next(iter(batches.with_loss(losses.mse)))  # E: reportAssignmentType
batches.with_loss(lambda output: output)  # E: reportCallIssue, reportArgumentType
Data.batches(jnp.zeros(3), 2, pad="yes")  # E: reportCallIssue, reportArgumentType
words.bucket(lambda w: w.shape, [4], 2)  # E: reportAttributeAccessIssue
words.bucket(len, 4, 2)  # E: reportArgumentType

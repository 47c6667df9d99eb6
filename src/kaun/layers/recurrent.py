"""Recurrent layers over sequences, ``lstm``, ``gru`` and ``rnn``, and ``bidirectional``.

Gates, weights and results are those of PyTorch with ``batch_first=True``; the weights are ``[in, out]`` here. In half
precision the gates are computed in float32.
"""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import explained, public
from kaun._jax import is_traced
from kaun._kernels import GRU, LSTM, RNN, Cell, matmul, recurrence
from kaun.context import Context
from kaun.layers.arguments import accumulation_dtype, along_last, call_text, size
from kaun.layers.core import Float, Layer, Vars, below, block_text, must_be_layer
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_param
from kaun.layers.inputs import float_input
from kaun.layers.path import at, here

__all__ = ["bidirectional", "gru", "lstm", "rnn"]

States = tuple[jax.Array, ...]


def _orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # JAX's own has no half precision on a CPU.
    return jax.nn.initializers.orthogonal()(key, shape, accumulation_dtype(dtype)).astype(dtype)


ORTHOGONAL: Initializer = _orthogonal


@overload
def lstm(
    in_features: int, hidden: int, return_state: Literal[False] = False, *, weight_init: Initializer = ...,
    recurrent_init: Initializer = ..., bias_init: Initializer = ...,
) -> Layer[Float, Float]: ...  # fmt: skip
@overload
def lstm(
    in_features: int, hidden: int, return_state: bool, *, weight_init: Initializer = ...,
    recurrent_init: Initializer = ..., bias_init: Initializer = ...,
) -> Layer[Any, Any]: ...  # fmt: skip
@explained("layers.lstm", "layers.recurrent")
def lstm(
    in_features: int,
    hidden: int,
    return_state: bool = False,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    recurrent_init: Initializer = ORTHOGONAL,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Any, Any]:
    """Make a long short-term memory over a sequence (Hochreiter and Schmidhuber, 1997).

    The input is ``[batch, length, in_features]`` in the model's dtype, or a pair of it and the state before it; the
    output is the hidden state at each position, ``[batch, length, hidden]``. The state is ``(h, c)``, each ``[batch,
    hidden]``; it starts at zero. Parameters: ``weight_ih`` ``[in_features, 4 * hidden]``, ``weight_hh`` ``[hidden, 4 *
    hidden]``, ``bias_ih`` and ``bias_hh`` ``[4 * hidden]``, with the gates in PyTorch's order: input, forget, cell,
    output.

    If the context has ``"lengths"``, integers ``[batch]``, row i ends after ``lengths[i]`` positions: outputs after its
    end are zero, and the state is that of its last position.

    Args:
        in_features: Size of the input's last axis.
        hidden: Size of the hidden state.
        return_state: Whether the output is a pair of the outputs and the state after the last position. Default: False.
        weight_init: Initializer of ``weight_ih``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        recurrent_init: Initializer of ``weight_hh``. Default: ``orthogonal()``, drawn in float32 in half precision.
        bias_init: Initializer of the biases. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input has another dtype, or ``lengths`` is not integer.
        ValueError: If a size is below 1; when applied, if the input, the state or ``lengths`` has another shape, or a
            length is outside of 0 to the length of the sequence where it is concrete.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import Context, layers
        >>> encoder = layers.lstm(3, 8, return_state=True)
        >>> variables = encoder.init(dtype=jnp.float32)
        >>> (y, (h, c)), _ = encoder.apply(variables, jnp.ones((2, 5, 3)), ctx=Context(lengths=jnp.array([5, 2])))
        >>> y.shape, h.shape, bool((y[1, 2:] == 0).all()), bool((h[1] == y[1, 1]).all())
        ((2, 5, 8), (2, 8), True, True)
    """
    name = call_text(lstm, in_features=in_features, hidden=hidden, return_state=return_state)
    inits = (weight_init, recurrent_init, bias_init)
    return _recurrent("lstm", name, LSTM, 4, 2, in_features, hidden, return_state, inits)


@overload
def gru(
    in_features: int,
    hidden: int,
    return_state: Literal[False] = False,
    *,
    weight_init: Initializer = ...,
    recurrent_init: Initializer = ...,
    bias_init: Initializer = ...,
) -> Layer[Float, Float]: ...
@overload
def gru(
    in_features: int, hidden: int, return_state: bool, *, weight_init: Initializer = ...,
    recurrent_init: Initializer = ..., bias_init: Initializer = ...,
) -> Layer[Any, Any]: ...  # fmt: skip
@explained("layers.gru", "layers.recurrent")
def gru(
    in_features: int,
    hidden: int,
    return_state: bool = False,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    recurrent_init: Initializer = ORTHOGONAL,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Any, Any]:
    """Make a gated recurrent unit over a sequence (Cho et al., 2014), in the form of PyTorch and cuDNN.

    The reset gate is applied to the product with ``weight_hh`` and not before it. The input is ``[batch, length,
    in_features]`` in the model's dtype, or a pair of it and the state before it, ``[batch, hidden]``; the output is the
    hidden state at each position, ``[batch, length, hidden]``. Parameters: ``weight_ih`` ``[in_features, 3 * hidden]``,
    ``weight_hh`` ``[hidden, 3 * hidden]``, ``bias_ih`` and ``bias_hh`` ``[3 * hidden]``, with the gates in PyTorch's
    order: reset, update, new. ``"lengths"`` in the context are those of ``layers.lstm``.

    Args:
        in_features: Size of the input's last axis.
        hidden: Size of the hidden state.
        return_state: Whether the output is a pair of the outputs and the state after the last position. Default: False.
        weight_init: Initializer of ``weight_ih``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        recurrent_init: Initializer of ``weight_hh``. Default: ``orthogonal()``, drawn in float32 in half precision.
        bias_init: Initializer of the biases. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input has another dtype, or ``lengths`` is not integer.
        ValueError: If a size is below 1; when applied, if the input, the state or ``lengths`` has another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.gru(3, 8)
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 5, 3)))[0].shape
        (2, 5, 8)
    """
    name = call_text(gru, in_features=in_features, hidden=hidden, return_state=return_state)
    inits = (weight_init, recurrent_init, bias_init)
    return _recurrent("gru", name, GRU, 3, 1, in_features, hidden, return_state, inits)


@overload
def rnn(
    in_features: int,
    hidden: int,
    return_state: Literal[False] = False,
    *,
    weight_init: Initializer = ...,
    recurrent_init: Initializer = ...,
    bias_init: Initializer = ...,
) -> Layer[Float, Float]: ...
@overload
def rnn(
    in_features: int, hidden: int, return_state: bool, *, weight_init: Initializer = ...,
    recurrent_init: Initializer = ..., bias_init: Initializer = ...,
) -> Layer[Any, Any]: ...  # fmt: skip
@explained("layers.rnn", "layers.recurrent")
def rnn(
    in_features: int,
    hidden: int,
    return_state: bool = False,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    recurrent_init: Initializer = ORTHOGONAL,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Any, Any]:
    """Make the recurrence ``h = tanh(x @ weight_ih + bias_ih + h @ weight_hh + bias_hh)`` over a sequence (Elman).

    The input is ``[batch, length, in_features]`` in the model's dtype, or a pair of it and the state before it,
    ``[batch, hidden]``; the output is ``h`` at each position, ``[batch, length, hidden]``. Parameters: ``weight_ih``
    ``[in_features, hidden]``, ``weight_hh`` ``[hidden, hidden]``, ``bias_ih`` and ``bias_hh`` ``[hidden]``.
    ``"lengths"`` in the context are those of ``layers.lstm``.

    Args:
        in_features: Size of the input's last axis.
        hidden: Size of the hidden state.
        return_state: Whether the output is a pair of the outputs and the state after the last position. Default: False.
        weight_init: Initializer of ``weight_ih``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        recurrent_init: Initializer of ``weight_hh``. Default: ``orthogonal()``, drawn in float32 in half precision.
        bias_init: Initializer of the biases. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input has another dtype, or ``lengths`` is not integer.
        ValueError: If a size is below 1; when applied, if the input, the state or ``lengths`` has another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.rnn(3, 8)
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 5, 3)))[0].shape
        (2, 5, 8)
    """
    name = call_text(rnn, in_features=in_features, hidden=hidden, return_state=return_state)
    inits = (weight_init, recurrent_init, bias_init)
    return _recurrent("rnn", name, RNN, 1, 1, in_features, hidden, return_state, inits)


@public
def bidirectional(layer: Layer[Any, Any]) -> Layer[Any, Any]:
    """Make the layer that reads a sequence in both directions and concatenates the outputs along the last axis.

    With ``"lengths"`` in the context, each row is reversed within its length. If ``layer`` returns its state, the
    state is a pair, and so is a state that is given: of the forward and the backward direction.

    Args:
        layer: A layer of ``[batch, length, features]``, such as ``layers.lstm(3, 8)``. Its parameters are ``forward``,
            those of its copy for the other direction ``backward``.

    Raises:
        TypeError: If ``layer`` is not a ``Layer``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.bidirectional(layers.gru(3, 8))
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 5, 3)))[0].shape
        (2, 5, 16)
    """
    must_be_layer("bidirectional", layer)
    name = block_text("bidirectional", [layer])

    def init(*, dtype: Any) -> Vars:
        one, two = layer.init(dtype=dtype), layer.init(dtype=dtype)
        params, state = {"forward": one.params, "backward": two.params}, {"forward": one.state, "backward": two.state}
        return Vars(params=params, state=state, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x, given = _with_state(name, x)
        x = float_input(name, x, ndim=3, layout="batch, length")
        lengths, starts = _lengths(name, x, ctx), _both(name, given)
        turned, state = (lambda a: _reversed(a, lengths)), dict[str, Any]()
        outputs: list[Any] = []
        for i, key in enumerate(("forward", "backward")):
            z = turned(x) if i else x
            with at(key):
                z = z if starts is None else (z, starts[i])
                y, after = layer.apply(below(vars, key), z, training=training, ctx=ctx)
            outputs.append(y)
            state[key] = after.state
        paired = isinstance(outputs[0], tuple)
        one, two = ([out[0] for out in outputs]) if paired else outputs
        y = jnp.concatenate([one, turned(two)], axis=-1)
        return (y, (outputs[0][1], outputs[1][1])) if paired else y, vars.replace(state=state)

    return Layer(init=init, apply=apply, name=name)


def _recurrent(
    kind: str, name: str, cell: Cell, gates: int, states: int, in_features: int, hidden: int, return_state: bool,
    inits: tuple[Initializer, Initializer, Initializer],
) -> Layer[Any, Any]:  # fmt: skip
    features, width = size(kind, "in_features", in_features), size(kind, "hidden", hidden)
    shapes = {"weight_ih": (features, gates * width), "weight_hh": (width, gates * width)}
    shapes |= {"bias_ih": (gates * width,), "bias_hh": (gates * width,)}
    arguments = {"weight_ih": ("weight_init", inits[0]), "weight_hh": ("recurrent_init", inits[1])}
    arguments |= {"bias_ih": ("bias_init", inits[2]), "bias_hh": ("bias_init", inits[2])}

    def init(*, dtype: Any) -> Vars:
        params = {key: init_param(name, *arguments[key], shape, dtype) for key, shape in shapes.items()}
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x, given = _with_state(name, x)
        x = float_input(name, x, vars.dtype, features=features, ndim=3, layout="batch, length")
        start = _start(name, given, states, (x.shape[0], width), vars.dtype)
        lengths, p, wide = _lengths(name, x, ctx), vars.params, accumulation_dtype(vars.dtype)
        # The product with the input has no recurrence: one for all positions, which are the first axis from here on.
        inputs, bias = matmul(x.swapaxes(0, 1), p["weight_ih"]), p["bias_hh"].astype(wide)
        if cell.sums:
            inputs, bias = inputs.astype(wide), p["bias_ih"].astype(wide) + bias
        else:
            inputs = (inputs + along_last(p["bias_ih"], 3)).astype(wide)
        keep = None if lengths is None else (jnp.arange(x.shape[1])[:, None] < lengths[None])[:, :, None]
        start = tuple(a.astype(wide) for a in start)
        y, end = jnp.zeros((0, *start[0].shape), wide), start
        if x.shape[1]:
            y, end = recurrence(cell, inputs, p["weight_hh"], bias, start, keep)
        y = (y if keep is None else jnp.where(keep, y, 0.0)).astype(vars.dtype).swapaxes(0, 1)
        end = tuple(a.astype(vars.dtype) for a in end)
        return ((y, end if states > 1 else end[0]) if return_state else y), vars

    return Layer(init=init, apply=apply, name=name)


def _with_state(name: str, x: Any) -> tuple[Any, Any]:
    """The input, and the state that it is given with, or None."""
    if not isinstance(x, tuple):
        return x, None
    pair: tuple[Any, ...] = x
    if len(pair) != 2:
        raise ValueError(
            f"{here(name)} expected an array [batch, length, features] or a pair (x, state), received a tuple of "
            f"{len(pair)}. Pass one array, jnp.concatenate([...], axis=-1) of several."
        )
    return pair


def _both(name: str, given: Any) -> tuple[Any, Any] | None:
    """The states before the first position in both directions; None where none is given."""
    if given is not None and not (isinstance(given, tuple) and len(cast("tuple[Any, ...]", given)) == 2):
        raise ValueError(
            f"{here(name)} expected (x, (forward, backward)), the state of each direction, received the state "
            f"{tree.describe(given)}. Pass what a bidirectional layer returns with return_state=True, or (state, "
            "state)."
        )
    return given


def _start(name: str, given: Any, states: int, shape: tuple[int, int], dtype: Any) -> States:
    """The state before the first position, as a tuple; zeros where none is given."""
    if given is None:
        return (jnp.zeros(shape, dtype),) * states
    found: Any = given if states > 1 else (given,)
    one = f"{jnp.dtype(dtype).name}{list(shape)}"
    described = [tree.describe(a) for a in found] if isinstance(found, tuple) else [tree.describe(found)]
    if described != [one] * states:
        wanted = f"({one}, {one})" if states > 1 else one
        raise ValueError(
            f"{here(name)} expected (x, state) with the state {wanted}, received {', '.join(described)}. Pass what a "
            "layer of that size returns with return_state=True."
        )
    return tuple(jnp.asarray(a) for a in found)


def _lengths(name: str, x: jax.Array, ctx: Context) -> jax.Array | None:
    """The lengths of the rows of a context, checked; None where it has none."""
    if "lengths" not in ctx:
        return None
    lengths = ctx["lengths"]
    expected = f"{here(name)} expected ctx['lengths'] as int[{x.shape[0]}], the length of each row"
    if not (tree.is_array(lengths) and jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise TypeError(f"{expected}, received {tree.describe(lengths)}. Write jnp.array([5, 3]).")
    if lengths.shape != x.shape[:1]:
        raise ValueError(
            f"{expected}, received {tree.describe(lengths)}. Write jnp.full({x.shape[0]}, {x.shape[1]}) for whole rows."
        )
    if not is_traced(lengths):
        values = np.asarray(lengths)
        outside = values[(values < 0) | (values > x.shape[1])]
        if len(outside):
            raise ValueError(
                f"{expected}, in 0 to {x.shape[1]}, received {int(outside[0])}. Cut the lengths to that of the batch, "
                f"jnp.minimum(lengths, {x.shape[1]})."
            )
    # The difference of unsigned lengths and 1 would not be negative for an empty row.
    return jnp.asarray(lengths).astype(jnp.int32)


def _reversed(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """A sequence in reverse order, each row within its length; positions after its end stay in place."""
    if lengths is None:
        return x[:, ::-1]
    places = jnp.arange(x.shape[1])[None]
    last = lengths[:, None] - 1
    return jnp.take_along_axis(x, jnp.where(places <= last, last - places, places)[:, :, None], axis=1)

"""Every layer compared with PyTorch's, from equal parameters in float32: output, and gradients of input and parameters.

Two arrays agree when their largest difference is at most 1e-5 of the largest number of PyTorch's. Run with -rP to see
the differences.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import Context, layers, rng, tree

torch = pytest.importorskip("torch")
F = torch.nn.functional

TOLERANCE = 1e-5
IMAGE, SEQUENCE = (2, 9, 8, 4), (3, 7, 8)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(layer):
    """Variables of the layer with random numbers in params, so that weights of norms and biases show."""
    with rng.scope(0):
        variables = layer.init(dtype=jnp.float32)
    random = np.random.default_rng(1)
    noisy = tree.map_with_path(
        lambda _, a: a + jnp.asarray(0.3 * random.normal(size=a.shape), a.dtype), variables.params
    )
    return variables.replace(params=noisy)


def ours(layer, variables, x, weights, training, ctx):
    """Output, state after it, and the gradients of ``sum(output * weights)`` by name."""

    def total(params, x):
        y, after = layer.apply(variables.replace(params=params), x, training=training, ctx=ctx)
        return (y * weights).sum(), (y, after.state)

    slopes, (y, state) = jax.grad(total, argnums=0 if x.dtype == np.int32 else (0, 1), has_aux=True)(
        variables.params, x
    )
    parts = {"params": slopes} if x.dtype == np.int32 else {"params": slopes[0], "input": slopes[1]}
    return np.asarray(y), state, tree.flatten(parts)[0]


def theirs(function, variables, x, weights):
    """The same of a function ``(params by name, x) -> y`` on PyTorch tensors."""
    params = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in tree.flatten(variables.params)[0].items()}
    given = torch.tensor(x, requires_grad=x.dtype == np.float32)
    y = function(params, given)
    (y * torch.tensor(weights)).sum().backward()
    grads = {f"params.{k}": v.grad.numpy() for k, v in params.items()}
    return y.detach().numpy(), {**grads, "input": given.grad.numpy()} if given.grad is not None else grads


def agree(name, a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, name
    largest = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    print(f"{name}: {largest:.1e}")
    assert largest <= TOLERANCE, f"{name}: {largest:.1e}"


def compare(layer, x, function, training=False, ctx=None, zero=()):
    """Compare a layer with a function of PyTorch; the gradients named in ``zero`` are zero but for rounding."""
    variables = filled(layer)
    y, _ = layer.apply(variables, x, training=training, ctx=ctx)
    weights = normal(7, y.shape)
    y, state, grads = ours(layer, variables, x, weights, training, ctx)
    expected, expected_grads = theirs(function, variables, x, weights)
    head = layer.name
    agree(f"{head} output", y, expected)
    assert set(grads) == set(expected_grads)
    for key, grad in grads.items():
        if key in zero:
            assert max(np.abs(grad).max(), np.abs(expected_grads[key]).max()) <= TOLERANCE
        else:
            agree(f"{head} gradient of {key}", grad, expected_grads[key])
    return state


def last(f):
    """A function on channels-first tensors, applied to channels-last ones."""
    return lambda x: f(x.movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    compare(layers.linear(8, 5, bias), normal(0, SEQUENCE), lambda p, x: F.linear(x, p["weight"].T, p.get("bias")))


@pytest.mark.parametrize(
    ("options", "pads"),
    [
        ({}, (1, 1, 1, 1)),
        ({"padding": "VALID", "stride": 2, "groups": 2}, (0, 0, 0, 0)),
        ({"kernel_size": (3, 5), "dilation": (2, 1), "bias": False}, (2, 2, 2, 2)),
        # A stride that does not divide evenly: the odd zero goes to the end of the width, 8 = 2 * 4.
        ({"stride": 2}, (0, 1, 1, 1)),
    ],
)
def test_conv2d(options, pads):
    def function(p, x):
        y = F.pad(x.movedim(-1, 1), pads)
        weight = p["weight"].permute(3, 2, 0, 1)
        rest = {key: options.get(key, 1) for key in ("stride", "dilation", "groups")}
        return F.conv2d(y, weight, p.get("bias"), **rest).movedim(1, -1)

    compare(layers.conv2d(4, 6, **options), normal(0, IMAGE), function)


@pytest.mark.parametrize(
    ("options", "pads"),
    [
        ({}, (1, 1)),
        ({"padding": "CAUSAL", "dilation": 2}, (4, 0)),
        ({"padding": "VALID", "groups": 4, "stride": 2}, (0, 0)),
    ],
)
def test_conv1d(options, pads):
    def function(p, x):
        y = F.pad(x.movedim(-1, 1), pads)
        rest = {key: options.get(key, 1) for key in ("stride", "dilation", "groups")}
        return F.conv1d(y, p["weight"].permute(2, 1, 0), p["bias"], **rest).movedim(1, -1)

    compare(layers.conv1d(8, 4, **options), normal(0, SEQUENCE), function)


def test_layer_norm():
    compare(layers.layer_norm(8), normal(0, SEQUENCE), lambda p, x: F.layer_norm(x, (8,), p["weight"], p["bias"]))


def test_rms_norm():
    compare(layers.rms_norm(8), normal(0, SEQUENCE), lambda p, x: F.rms_norm(x, (8,), p["weight"], 1e-6))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm(groups):
    function = lambda p, x: last(lambda z: F.group_norm(z, groups, p["weight"], p["bias"]))(x)
    compare(layers.group_norm(groups, 4), normal(0, IMAGE), function)


def test_batch_norm_in_training():
    mean, var = torch.zeros(4), torch.ones(4)

    def function(p, x):
        # PyTorch's momentum is the share of the new batch.
        return last(lambda z: F.batch_norm(z, mean, var, p["weight"], p["bias"], training=True, momentum=0.1))(x)

    state = compare(layers.batch_norm(4, momentum=0.9), 2 + normal(0, IMAGE), function, training=True)
    agree("batch_norm running_mean", state["running_mean"], mean)
    # The documented difference: PyTorch's running variance is the unbiased one.
    n = math.prod(IMAGE[:-1])
    agree("batch_norm running_var", (state["running_var"] - 0.9) * (n / (n - 1)) + 0.9, var)


def test_batch_norm_in_evaluation():
    mean, var = torch.tensor(normal(2, 4)), torch.tensor(normal(3, 4)) ** 2 + 0.5

    def function(p, x):
        return last(lambda z: F.batch_norm(z, mean, var, p["weight"], p["bias"], training=False))(x)

    layer = layers.batch_norm(4)
    moved = {"running_mean": jnp.asarray(mean.numpy()), "running_var": jnp.asarray(var.numpy())}
    fixed = layers.Layer(
        init=lambda *, dtype: layer.init(dtype=dtype).replace(state=moved),
        apply=lambda vars, x, *, training, ctx: layer.apply(vars, x, training=training, ctx=ctx),
        name="batch_norm(4) in evaluation",
    )
    state = compare(fixed, normal(0, IMAGE), function)
    assert all(jnp.array_equal(state[key], moved[key]) for key in moved)


@pytest.mark.parametrize("scale", [True, False])
def test_embedding(scale):
    x = np.random.default_rng(0).integers(0, 6, (3, 5)).astype(np.int32)
    factor = 8**0.5 if scale else 1.0
    compare(layers.embedding(6, 8, scale), x, lambda p, x: F.embedding(x.long(), p["weight"]) * factor)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", F.relu), ("gelu", lambda x: F.gelu(x, approximate="tanh")), ("silu", F.silu), ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid), ("flatten", lambda x: x.flatten(1)), ("leaky_relu", F.leaky_relu), ("elu", F.elu),
        ("selu", F.selu), ("softplus", F.softplus), ("mish", F.mish), ("softmax", lambda x: F.softmax(x, -1)),
        ("log_softmax", lambda x: F.log_softmax(x, -1)), ("glu", F.glu),
        ("swiglu", lambda x: F.silu(x[..., :4]) * x[..., 4:]), ("global_avg_pool", lambda x: x.mean(1)),
        ("global_max_pool", lambda x: x.amax(1)),
    ],
)  # fmt: skip
def test_functions_of_the_input_alone(name, function):
    compare(getattr(layers, name)(), normal(0, SEQUENCE), lambda p, x: function(x))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(2, None), ((3, 2), None), (3, 2), ((2, 3), (1, 2))])
def test_pooling(kernel, stride, ties):
    x = normal(0, IMAGE)
    if ties:
        x = np.round(2 * x)  # after a relu most windows have equal numbers
    compare(layers.max_pool2d(kernel, stride), x, lambda p, x: last(lambda z: F.max_pool2d(z, kernel, stride))(x))
    compare(layers.avg_pool2d(kernel, stride), x, lambda p, x: last(lambda z: F.avg_pool2d(z, kernel, stride))(x))


def rotated(x, theta):
    """LLaMA's rotary embedding of [batch, heads, seq, size], as it is usually written for PyTorch."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("kv_heads", "rope"), [(4, False), (2, True), (1, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_multi_head_attention(is_causal, kv_heads, rope, masked):
    heads, size = 4, 2
    batch, seq, embed = SEQUENCE
    # Each row keeps its first position, so that no query is without a key: there PyTorch would say NaN.
    keep = np.random.default_rng(3).random((batch, seq)) < 0.6 if masked else np.ones((batch, seq), bool)
    keep[:, 0] = True
    allowed = torch.tensor(keep)[:, None, None, :] & (
        torch.ones(seq, seq).tril() > 0 if is_causal else torch.tensor(True)
    )

    def function(p, x):
        q, k, v = ((x @ p[f"{n}_proj.weight"]).unflatten(-1, (-1, size)).transpose(1, 2) for n in "qkv")
        if rope:
            q, k = rotated(q, 100.0), rotated(k, 100.0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        return y.transpose(1, 2).flatten(2) @ p["out_proj.weight"]

    layer = layers.multi_head_attention(embed, heads, kv_heads, is_causal=is_causal, rope=rope, rope_theta=100.0)
    ctx = Context(attention_mask=keep) if masked else None
    compare(layer, normal(0, SEQUENCE), function, ctx=ctx)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [None, "key_padding_mask", "attn_mask", "attn_mask by head", "added", "both"])
@pytest.mark.parametrize("kv_dim", [None, 8, 5], ids=["self", "cross", "kdim"])
def test_torch_multihead_attention(kv_dim, bias, masked):
    """PyTorch's own module, of which each query has a key; queries are the first three positions in cross-attention."""
    heads, (batch, seq, embed) = 4, SEQUENCE
    queries, keys = (3, seq - 3) if kv_dim else (seq, seq)
    random = np.random.default_rng(3)
    by_key, by_query = random.random((batch, keys)) < 0.6, random.random((batch, heads, queries, keys)) < 0.6
    by_query = by_query if masked == "attn_mask by head" else by_query[:, :1]
    by_key[:, 0], by_query[..., 0] = True, True
    added = normal(4, (1, heads, queries, keys))
    ctx, rest = {}, {}
    if masked in ("key_padding_mask", "both"):
        ctx["attention_mask"], rest["key_padding_mask"] = by_key, torch.tensor(~by_key)
    if masked in ("attn_mask", "attn_mask by head"):
        ctx["attention_mask"] = by_query if masked == "attn_mask by head" else by_query[:, 0]
        rest["attn_mask"] = torch.tensor(~np.broadcast_to(by_query, (batch, heads, queries, keys))).flatten(0, 1)
    if masked in ("added", "both"):
        ctx["attention_bias"] = added
        rest["attn_mask"] = torch.tensor(added).expand(batch, -1, -1, -1).flatten(0, 1)
        if masked == "both":  # torch wants both masks of one type
            rest["key_padding_mask"] = torch.zeros(batch, keys).masked_fill_(torch.tensor(~by_key), -math.inf)
    layer = layers.multi_head_attention(embed, heads, bias=bias, kv_dim=kv_dim)
    module = torch.nn.MultiheadAttention(embed, heads, bias=bias, kdim=kv_dim, vdim=kv_dim, batch_first=True)

    def function(p, x):
        own = [p[f"{n}_proj.weight"].T for n in "qkv"]
        together = {"in_proj_weight": torch.cat(own)} if kv_dim in (None, embed) else {}
        apart = {} if together else {f"{n}_proj_weight": w for n, w in zip("qkv", own, strict=True)}
        weights = {**together, **apart, "out_proj.weight": p["out_proj.weight"].T}
        if bias:
            weights["in_proj_bias"] = torch.cat([p[f"{n}_proj.bias"] for n in "qkv"])
            weights["out_proj.bias"] = p["out_proj.bias"]
        q, kv = (x[:, :queries], x[:, queries:, :kv_dim]) if kv_dim else (x, x)
        return torch.func.functional_call(module, weights, (q, kv, kv), {"need_weights": False, **rest})[0]

    def apply(vars, x, *, training, ctx):
        x = (x[:, :queries], x[:, queries:, :kv_dim]) if kv_dim else x
        return layer.apply(vars, x, training=training, ctx=ctx)

    paired = layers.Layer(init=lambda *, dtype: layer.init(dtype=dtype), apply=apply, name="attention")
    # A bias of the keys adds the same number to all logits of a query.
    compare(paired, normal(0, SEQUENCE), function, ctx=Context(ctx), zero=("params.k_proj.bias",))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("both", [False, True], ids=["one direction", "both"])
@pytest.mark.parametrize("lengths", [None, [7, 2, 5]], ids=["whole", "lengths"])
def test_recurrent(kind, both, lengths):
    """Outputs and last states with torch's own weights, in one array, so that the gradients are those of both."""
    features = SEQUENCE[-1]
    layer = getattr(layers, kind)(features, 6, return_state=True)
    layer = layers.bidirectional(layer) if both else layer
    module = getattr(torch.nn, kind.upper())(features, 6, batch_first=True, bidirectional=both)

    def joined(y, state, cat, axis):
        """[batch, seq + states, features]: each state once for each direction, as it stands."""
        states = [s for one in (state if both else [state]) for s in (one if isinstance(one, tuple) else (one,))]
        width = y.shape[-1] // states[0].shape[-1]
        return cat([y, *(cat([s] * width, -1)[:, None] for s in states)], axis)

    def apply(vars, x, *, training, ctx):
        (y, state), after = layer.apply(vars, x, training=training, ctx=ctx)
        return joined(y, state, jnp.concatenate, 1), after

    def function(p, x):
        names = {"": "forward.", "_reverse": "backward."} if both else {"": ""}
        weights = {
            f"{name}_l0{end}": p[f"{under}{name}"].T if "weight" in name else p[f"{under}{name}"]
            for end, under in names.items()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        given = x
        if lengths:
            given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, state = torch.func.functional_call(module, weights, (given,))
        if lengths:
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        state = state if isinstance(state, tuple) else (state,)
        directions = [tuple(s[i] for s in state) for i in range(2 if both else 1)]
        return joined(y, directions if both else directions[0], torch.cat, 1)

    whole = layers.Layer(init=lambda *, dtype: layer.init(dtype=dtype), apply=apply, name=layer.name.split("(")[0])
    ctx = Context(lengths=np.array(lengths)) if lengths else None
    compare(whole, normal(0, SEQUENCE), function, ctx=ctx)

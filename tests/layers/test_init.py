"""What holds for every layer of the catalogue."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import layers, rng

IMAGE, SEQUENCE, INDICES = (2, 6, 6, 4), (2, 6, 4), (2, 6)

CATALOGUE = {
    "linear": (layers.linear(4, 3), SEQUENCE),
    "conv1d": (layers.conv1d(4, 6, padding="CAUSAL", groups=2), SEQUENCE),
    "conv2d": (layers.conv2d(4, 3, stride=2), IMAGE),
    "layer_norm": (layers.layer_norm(4), SEQUENCE),
    "group_norm": (layers.group_norm(2, 4), IMAGE),
    "batch_norm": (layers.batch_norm(4), IMAGE),
    "embedding": (layers.embedding(5, 4), INDICES),
    "dropout": (layers.dropout(0.4), SEQUENCE),
    "relu": (layers.relu(), SEQUENCE),
    "max_pool2d": (layers.max_pool2d(2), IMAGE),
    "flatten": (layers.flatten(), IMAGE),
    "multi_head_attention": (layers.multi_head_attention(4, 2, num_kv_heads=1, dropout=0.4, rope=True), SEQUENCE),
    "lstm": (layers.lstm(4, 3), SEQUENCE),
    "parameter": (layers.parameter((2, 3)), SEQUENCE),
    "positions": (layers.positions(8, 4), SEQUENCE),
    "sinusoidal_positions": (layers.sinusoidal_positions(4), SEQUENCE),
}
# Made of the parts of those above, or of their families: for these the same tests run in the long form.
ALIKE = {
    "gelu": (layers.gelu(), SEQUENCE),
    # Without the default of lstm, an orthogonal matrix, which takes a second to compile for each shape and dtype.
    "gru": (layers.gru(4, 3, recurrent_init=jax.nn.initializers.normal(0.3)), SEQUENCE),
    "rms_norm": (layers.rms_norm(4), SEQUENCE),
    "silu": (layers.silu(), SEQUENCE),
    "tanh": (layers.tanh(), SEQUENCE),
    "sigmoid": (layers.sigmoid(), SEQUENCE),
    "avg_pool2d": (layers.avg_pool2d(3, 2), IMAGE),
    "rnn": (layers.rnn(4, 3, recurrent_init=jax.nn.initializers.normal(0.3)), SEQUENCE),
    "conv3d": (layers.conv3d(2, 4, (1, 3, 2), padding=1, groups=2), (1, 2, 4, 4, 2)),
    "conv_transpose1d": (layers.conv_transpose1d(4, 3, 4, 2, 1), SEQUENCE),
    "conv_transpose2d": (layers.conv_transpose2d(4, 3, 3, 2, 1, 1), IMAGE),
    "instance_norm": (layers.instance_norm(4), IMAGE),
    "spatial_dropout": (layers.spatial_dropout(0.4), IMAGE),
    "drop_path": (layers.drop_path(0.4), IMAGE),
    "max_pool1d": (layers.max_pool1d(3, 2, 1), SEQUENCE),
    "avg_pool1d": (layers.avg_pool1d(3, 2, 1, False), SEQUENCE),
    "global_avg_pool": (layers.global_avg_pool(), IMAGE),
    "global_max_pool": (layers.global_max_pool(), IMAGE),
    "upsample2d": (layers.upsample2d(2, "bilinear"), IMAGE),
    "leaky_relu": (layers.leaky_relu(0.2), SEQUENCE),
    "elu": (layers.elu(0.5), SEQUENCE),
    "selu": (layers.selu(), SEQUENCE),
    "softplus": (layers.softplus(), SEQUENCE),
    "mish": (layers.mish(), SEQUENCE),
    "softmax": (layers.softmax(), SEQUENCE),
    "log_softmax": (layers.log_softmax(), SEQUENCE),
    "glu": (layers.glu(), SEQUENCE),
    "swiglu": (layers.swiglu(), SEQUENCE),
}
CATALOGUE |= ALIKE

every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in CATALOGUE]
)


def run(layer, variables, x, training, key):
    with rng.scope(key):
        return layer.apply(variables, x, training=training)


@functools.cache
def case(name, dtype="float32"):
    layer, shape = CATALOGUE[name]
    random = np.random.default_rng(0)
    x = random.integers(0, 5, shape) if shape is INDICES else random.normal(size=shape)
    with rng.scope(0):
        variables = layer.init(dtype=dtype)
    return layer, variables, jnp.asarray(x, "int32" if shape is INDICES else dtype)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_nothing_is_missing():
    protocol = {
        "Float", "Int", "Layer", "Module", "Vars", "activation", "bidirectional", "compose", "fn", "from_function", "is_lora", "lora", "merge_lora",
        "module", "remat", "repeat", "residual", "rope", "sequential",
    }  # fmt: skip
    public = {name for name in vars(layers) if callable(getattr(layers, name)) and not name.startswith("_")}
    assert public - protocol == set(CATALOGUE)


@every
def test_compiled_it_is_the_same(name):
    layer, variables, x = case(name)
    eager = run(layer, variables, x, True, jax.random.key(1))
    compiled = jax.jit(functools.partial(run, layer), static_argnums=2)(variables, x, True, jax.random.key(1))
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), eager, compiled)


@every
def test_evaluation_is_deterministic_and_moves_nothing(name):
    layer, variables, x = case(name)
    outputs = [run(layer, variables, x, False, seed) for seed in (1, 2)]
    assert jnp.array_equal(outputs[0][0], outputs[1][0])
    assert all(after is variables for _, after in outputs)


@every
def test_training_moves_state_and_nothing_else(name):
    layer, variables, x = case(name)
    before = {path: np.array(leaf) for path, leaf in leaves(variables).items()}
    _, after = run(layer, variables, x, True, 0)
    assert after.params is variables.params and after.dtype == variables.dtype
    assert {k: (v.shape, v.dtype) for k, v in leaves(after).items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert all(np.array_equal(leaf, before[path]) for path, leaf in leaves(variables).items())
    moved = {path for path, leaf in leaves(after).items() if not np.array_equal(leaf, before[path])}
    assert moved == {path for path in before if "running" in path}


@every
def test_variables_may_be_numpy_arrays(name):
    layer, variables, x = case(name)
    expected, y = (run(layer, v, x, False, 0)[0] for v in (variables, jax.tree.map(np.asarray, variables)))
    assert isinstance(y, jax.Array) and jnp.array_equal(y, expected)


@every
def test_parameters_have_the_models_dtype_and_strong_types(name):
    for dtype in ("bfloat16", "float32"):
        _, variables, _ = case(name, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables.params)} <= {jnp.dtype(dtype)}
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(variables))


@every
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_compiled_training_pass_returns_the_models_dtype(name, dtype):
    layer, variables, x = case(name, dtype)

    def loss(params):
        y, after = run(layer, variables.replace(params=params), x, True, jax.random.key(0))
        assert y.dtype == dtype and not y.weak_type
        return y.astype(jnp.float32).sum(), after

    (total, after), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables.params)
    assert jnp.isfinite(total)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(variables)]


@every
@pytest.mark.parametrize(
    ("dtype", "training"),
    [
        ("float32", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("float32", False), ("float64", True), ("float64", False))
        ),
    ],
)
def test_with_x64_every_dtype_is_the_models(name, dtype, training):
    layer, shape = CATALOGUE[name]

    def both(key, x):
        with rng.scope(key):
            variables = layer.init(dtype=dtype)
        return variables, run(layer, variables, x, training, key)

    with jax.enable_x64(True):
        x = jnp.zeros(shape, "int32" if shape is INDICES else dtype)
        made = jax.eval_shape(both, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}


@every
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_program_is_the_same_without_strict_mode_and_holds_no_array(name, training):
    layer, variables, x = case(name)
    trace = jax.make_jaxpr(functools.partial(run, layer), static_argnums=2)
    strict = trace(variables, x, training, jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loose = trace(variables, x, training, jax.random.key(0))
    assert str(strict) == str(loose)
    assert strict.consts == []


@every
def test_the_name_is_the_call(name):
    layer, _ = CATALOGUE[name]
    assert repr(eval(f"layers.{layer!r}", {"layers": layers})) == repr(layer)

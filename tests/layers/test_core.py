"""The layer protocol and composition, on small layers of the tests' own."""

import copy
import dataclasses
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Context, Layer, Vars, layers, rng, tree
from kaun.layers import inputs


def affine(n, m=None):
    """x @ weight + bias."""
    m = m or n

    def init(*, dtype):
        weight = jax.random.normal(rng.next_key(), (n, m), dtype)
        return Vars(params={"weight": weight, "bias": jnp.full(m, 0.5, dtype)}, state={}, dtype=dtype)

    def apply(vars, x, /, *, training, ctx):
        x = inputs.float_input(f"affine({n}, {m})", x, vars.dtype, features=n)
        return jnp.matmul(x, vars.params["weight"]) + jnp.broadcast_to(vars.params["bias"], (*x.shape[:-1], m)), vars

    return Layer(init=init, apply=apply, name=f"affine({n}, {m})")


def counter():
    """The input; its state counts the passes made in training."""

    def init(*, dtype):
        return Vars(params={}, state={"passes": jnp.zeros((), jnp.int32)}, dtype=dtype)

    def apply(vars, x, /, *, training, ctx):
        passes = vars.state["passes"] + jnp.int32(training)
        return x, vars.replace(state={"passes": passes})

    return Layer(init=init, apply=apply, name="counter()")


def noise():
    """The input plus noise, in training."""

    def init(*, dtype):
        return Vars(params={}, state={}, dtype=dtype)

    def apply(vars, x, /, *, training, ctx):
        return (x + jax.random.normal(rng.next_key(), x.shape, x.dtype) if training else x), vars

    return Layer(init=init, apply=apply, name="noise()")


def masked():
    def init(*, dtype):
        return Vars(params={}, state={}, dtype=dtype)

    def apply(vars, x, /, *, training, ctx):
        return x * ctx["mask"], vars

    return Layer(init=init, apply=apply, name="masked()")


PARTS = {
    "affine": lambda: affine(3),
    "counter": counter,
    "noise": noise,
    "fn": lambda: layers.fn(jnp.sin),
    "residual": lambda: layers.residual(affine(3)),
    "sequential": lambda: layers.sequential([affine(3), counter()]),
}
parts = st.sampled_from(sorted(PARTS)).map(lambda name: PARTS[name]())
X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


def made(model, seed=0, dtype=jnp.float32):
    with rng.scope(seed):
        return model.init(dtype=dtype)


def applied(model, vars, x=X, seed=1, training=True, ctx=None):
    with rng.scope(seed):
        return model.apply(vars, x, training=training, ctx=ctx)


def same_leaves(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def renamed(model, vars):
    """These variables' leaves under the paths of another model with equal leaves."""
    return jax.tree.unflatten(jax.tree.structure(made(model)), jax.tree.leaves(vars))


# The laws


@given(a=parts, b=parts, c=parts)
@settings(max_examples=15, deadline=None)
def test_composition_is_associative_in_values(a, b, c):
    left, right, flat = (a >> b) >> c, a >> (b >> c), layers.sequential([a, b, c])
    assert same_leaves(made(left), made(right))
    assert same_leaves(made(left), made(flat))
    y, after = applied(left, made(left))
    for other in (right, flat):
        found, state = applied(other, made(other))
        assert np.array_equal(y, found)
        assert same_leaves(after, state)


@given(a=parts, b=parts)
@settings(max_examples=15, deadline=None)
def test_composition_is_one_after_the_other(a, b):
    model = a >> b
    vars = made(model)
    y, after = applied(model, vars)
    with rng.scope(1):
        middle, left = a.apply(
            Vars(params=vars.params["left"], state=vars.state["left"], dtype=vars.dtype), X, training=True
        )
        last, right = b.apply(
            Vars(params=vars.params["right"], state=vars.state["right"], dtype=vars.dtype), middle, training=True
        )
    assert np.array_equal(y, last)
    assert same_leaves(after.state, {"left": left.state, "right": right.state})
    assert after.params is vars.params


@given(a=parts)
@settings(max_examples=10, deadline=None)
def test_the_identity_is_neutral(a):
    identity = layers.fn(lambda x: x)
    y, _ = applied(a, made(a))
    for model in (identity >> a, a >> identity, layers.sequential([identity, a])):
        assert np.array_equal(applied(model, made(model))[0], y)


@given(a=parts)
@settings(max_examples=10, deadline=None)
def test_residual_adds_the_input(a):
    model = layers.residual(a)
    y, after = applied(model, made(model))
    inner, state = applied(a, renamed(a, made(model)))
    np.testing.assert_allclose(y, X + inner, rtol=1e-6)
    assert same_leaves(after.state, state.state)


@given(a=parts, b=parts)
@settings(max_examples=10, deadline=None)
def test_layers_are_pure(a, b):
    model = layers.residual(a >> b)
    vars = made(model)
    before = [np.array(leaf) for leaf in jax.tree.leaves(vars)]
    first, second = applied(model, vars), applied(model, vars)
    assert same_leaves(first, second)
    assert same_leaves(vars, before)
    assert same_leaves(made(model), vars)


@given(a=parts, b=parts)
@settings(max_examples=10, deadline=None)
def test_jit_changes_nothing(a, b):
    model = layers.sequential([a, b])
    vars = made(model)

    @jax.jit
    def compiled(key, vars, x):
        with rng.scope(key):
            return model.apply(vars, x, training=True)

    y, after = compiled(jax.random.key(1), vars, X)
    eager, state = applied(model, vars, seed=jax.random.key(1))
    np.testing.assert_allclose(y, eager, rtol=1e-5, atol=1e-6)
    assert isinstance(after, Vars)
    assert after.dtype == vars.dtype
    assert same_leaves(after.state, state.state)


# Structure


def test_paths():
    model = layers.residual(layers.sequential([affine(3), counter(), affine(3)])) >> affine(3, 2)
    vars = made(model)
    assert list(tree.flatten(vars.params)[0]) == [
        "left.inner.0.bias",
        "left.inner.0.weight",
        "left.inner.2.bias",
        "left.inner.2.weight",
        "right.bias",
        "right.weight",
    ]
    assert list(tree.flatten(vars.state)[0]) == ["left.inner.1.passes"]
    assert list(tree.flatten(made(layers.sequential([affine(2), affine(2)])).params)[0]) == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.weight",
    ]


def test_repr_shows_the_structure():
    model = layers.residual(layers.sequential([affine(3), layers.fn(jnp.sin)])) >> affine(3, 2)
    assert repr(model) == "\n".join(
        [
            "compose(",
            "  residual(",
            "    sequential([",
            "      affine(3, 3),",
            "      fn(sin),",
            "    ]),",
            "  ),",
            "  affine(3, 2),",
            ")",
        ]
    )
    assert repr(layers.fn(jnp.sin, name="wave")) == "wave"
    assert repr(Layer(init=affine(2).init, apply=affine(2).apply)) == "layer"


def test_state_moves_in_training_only():
    model = layers.sequential([counter(), layers.residual(counter())])
    vars = made(model)
    for _ in range(3):
        vars = applied(model, vars)[1]
        vars = applied(model, vars, training=False)[1]
    assert [int(leaf) for leaf in jax.tree.leaves(vars.state)] == [3, 3]


def test_the_context_reaches_every_layer_and_is_empty_without_one():
    model = layers.residual(layers.sequential([masked(), masked()]))
    y, _ = applied(model, made(model), ctx=Context(mask=jnp.full((2, 3), 2.0)))
    np.testing.assert_array_equal(y, X + 4 * X)
    with pytest.raises(KeyError, match="no 'mask'; it has nothing") as error:
        applied(model, made(model))
    assert error.value.__notes__ == ["In the model's layer 'inner.0'."]


def test_training_is_off_unless_asked_for():
    model = counter()
    _, after = model.apply(made(model), X)
    assert int(after.state["passes"]) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, "float32", np.dtype("float16")], ids=str)
def test_init_makes_every_part_in_the_dtype(dtype):
    vars = made(layers.sequential([affine(3), layers.residual(affine(3))]), dtype=dtype)
    assert vars.dtype == jnp.dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(vars)} == {jnp.dtype(dtype)}


def test_init_is_float32_unless_asked_otherwise():
    assert affine(2).init().dtype == jnp.float32


def test_float64_with_x64():
    with jax.enable_x64(True):
        model = affine(3)
        vars = made(model, dtype=jnp.float64)
        assert vars.params["weight"].dtype == jnp.float64
        assert applied(model, vars, jnp.ones((2, 3), jnp.float64))[0].dtype == jnp.float64


def test_numpy_inputs_are_canonicalized_on_the_way_in():
    for model in (affine(3), layers.residual(affine(3)), layers.sequential([affine(3), affine(3)])):
        assert applied(model, made(model), X.astype(np.float64))[0].dtype == jnp.float32


def test_residual_takes_an_array_in_default_mode_too():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = layers.residual(affine(3))
        assert applied(model, made(model))[0].shape == (2, 3)


# Vars


def test_vars_is_a_pytree_of_params_and_state():
    vars = Vars(params=[{"w": jnp.ones(2)}], state={"m": jnp.zeros(1)}, dtype=jnp.float32)
    assert list(tree.flatten(vars)[0]) == ["params.0.w", "state.m"]
    doubled = jax.tree.map(lambda a: a * 2, vars)
    assert isinstance(doubled, Vars)
    assert float(doubled.params[0]["w"][0]) == 2.0
    assert doubled.dtype == np.dtype("float32")
    both = jax.tree.map(jnp.add, vars, doubled)
    assert float(both.params[0]["w"][0]) == 3.0
    through = jax.jit(lambda v: v.replace(state={}))(vars)
    assert isinstance(through, Vars)
    assert through.state == {}
    slopes = jax.grad(lambda v: (v.params[0]["w"] ** 2).sum())(vars)
    np.testing.assert_array_equal(slopes.params[0]["w"], [2, 2])
    stacked = jax.vmap(lambda v: v.replace(params=v.params[0]["w"] * 2, state=()))(
        Vars(params=[{"w": jnp.ones((3, 2))}], state={}, dtype=jnp.float32)
    )
    assert stacked.params.shape == (3, 2)


def test_vars_of_another_dtype_are_another_structure():
    a = Vars(params={}, state={}, dtype=jnp.float32)
    assert jax.tree.structure(a) == jax.tree.structure(a.replace(dtype="float32"))
    assert jax.tree.structure(a) != jax.tree.structure(a.replace(dtype=jnp.float16))


def test_vars_are_frozen():
    vars = Vars(params={}, state={}, dtype=jnp.float32)
    with pytest.raises(dataclasses.FrozenInstanceError, match="params"):
        vars.params = {}
    assert vars.replace(params={"a": 1}).params == {"a": 1}
    assert vars.params == {}
    with pytest.raises(TypeError, match="paramz"):
        vars.replace(paramz={})


def test_vars_need_a_dtype():
    with pytest.raises(TypeError, match=r"Vars\(dtype=\.\.\.\) expected a dtype, received None. Use dtype=jnp.float32"):
        Vars(params={}, state={}, dtype=None)


def test_copies():
    vars = Vars(params={"w": np.ones(2)}, state={}, dtype=jnp.float16)
    for again in (copy.copy(vars), copy.deepcopy(vars), pickle.loads(pickle.dumps(vars))):
        assert same_leaves(again, vars)
        assert again.dtype == vars.dtype
    model = layers.sequential([affine(3), counter()])
    for again in (copy.copy(model), copy.deepcopy(model), copy.deepcopy([model])[0]):
        assert again is model
    assert copy.deepcopy(Vars(params={"w": [1.0]}, state={}, dtype=jnp.float32)).params["w"] is not vars.params["w"]


def init_of_a_module(*, dtype):
    return Vars(params={}, state={}, dtype=dtype)


def apply_of_a_module(vars, x, /, *, training, ctx):
    return x + 1, vars


def test_a_layer_of_closures_is_not_pickled_and_the_message_says_what_to_pickle():
    text = (
        r"^layer linear\(2, 1\) cannot be pickled: its init and apply are closures\. Pickle the function that builds "
    )
    for value in (layers.linear(2, 1), {"model": layers.linear(2, 1)}):
        with pytest.raises(
            TypeError, match=text + r".*pickle\.dumps\(\(build_model, state\.vars\)\)\. Or use cloudpickle"
        ):
            pickle.dumps(value)
    with pytest.raises(TypeError, match=r"^layer sequential cannot be pickled"):
        pickle.dumps(layers.sequential([layers.relu()]))


def test_a_layer_of_functions_that_a_module_has_is_pickled():
    # pytest imports this file under a name that is not in sys.modules.
    module = types.ModuleType("a_module_of_layers")
    for function in (init_of_a_module, apply_of_a_module):
        copied = types.FunctionType(function.__code__, globals(), function.__name__)
        copied.__kwdefaults__, copied.__module__ = function.__kwdefaults__, module.__name__
        setattr(module, function.__name__, copied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        model = Layer(init=module.init_of_a_module, apply=module.apply_of_a_module, name="plus one")
        again = pickle.loads(pickle.dumps(model))
    assert repr(again) == "plus one"
    assert float(again.apply(again.init(), 1.0)[0]) == 2.0


def test_cloudpickle_takes_layers_of_closures():
    cloudpickle = pytest.importorskip("cloudpickle")
    model = layers.embedding(3, 2) >> layers.linear(2, 1)
    again = pickle.loads(cloudpickle.dumps([model]))[0]
    assert repr(again) == repr(model)
    vars = made(model)
    assert np.array_equal(again.apply(vars, jnp.arange(3))[0], model.apply(vars, jnp.arange(3))[0])


def test_dir_shows_what_a_user_calls():
    assert dir(layers.relu()) == ["apply", "init", "name"]
    assert dir(layers.relu().init()) == ["dtype", "params", "replace", "state"]


# Errors


@pytest.mark.parametrize(
    ("dtype", "error", "text"),
    [
        (
            jnp.int32,
            TypeError,
            r"init\(dtype=\.\.\.\) expected a floating dtype, received int32. Use dtype=jnp.float32",
        ),
        (jnp.complex64, TypeError, "expected a floating dtype, received complex64"),
        (bool, TypeError, "expected a floating dtype, received bool"),
        (None, TypeError, r"init\(dtype=\.\.\.\) expected a floating dtype, received None. Use dtype=jnp.float32"),
        ("floaty", TypeError, "floaty"),
        (
            jnp.float64,
            ValueError,
            r"init\(dtype=float64\) needs JAX's x64 mode, which is off.*jax_enable_x64.*or use dtype=jnp.float32",
        ),
        (float, ValueError, r"init\(dtype=float64\) needs JAX's x64 mode"),
    ],
)
def test_dtypes_that_a_model_cannot_have(dtype, error, text):
    for model in (affine(2), layers.residual(affine(2)), counter()):
        with pytest.raises(error, match=text):
            model.init(dtype=dtype)


@pytest.mark.parametrize("argument", ["init", "apply"])
def test_init_and_apply_are_functions(argument):
    functions = {"init": affine(2).init, "apply": affine(2).apply, argument: 3}
    with pytest.raises(TypeError, match=rf"Layer\({argument}=\.\.\.\) expected a function, received 3"):
        Layer(**functions)


def test_init_must_return_vars():
    def wrong(*, dtype):
        return {"weight": jnp.ones(2)}

    model = Layer(init=wrong, apply=affine(2).apply, name="mine()")
    line = wrong.__code__.co_firstlineno
    text = rf"init of layer mine\(\) must return kaun.Vars, received dict from `wrong` \(test_core.py:{line}\).*return Vars"
    with pytest.raises(TypeError, match=text):
        model.init()


@pytest.mark.parametrize("result", [lambda y, vars: y, lambda y, vars: (y, vars.params), lambda y, vars: (y, vars, 1)])
def test_apply_must_return_output_and_vars(result):
    def wrong(vars, x, /, *, training, ctx):
        return result(x, vars)

    model = layers.sequential([counter(), Layer(init=affine(3).init, apply=wrong, name="mine()")])
    text = r"apply of layer mine\(\) at '1' must return \(y, vars\), received .* from `wrong` \(test_core.py:\d+\)"
    with pytest.raises(TypeError, match=text):
        model.apply(made(model), X)


def test_apply_takes_vars():
    model = affine(3)
    with pytest.raises(
        TypeError, match=r"apply of layer affine\(3, 3\) expected kaun.Vars, received dict.*state\.vars"
    ):
        model.apply(made(model).params, X)


def test_layers_are_immutable():
    model = affine(3)
    with pytest.raises(
        AttributeError,
        match=r"Layer is immutable: instead of \.name = \.\.\., make another layer, Layer\(init=\.\.\., apply=\.\.\.\)\.",
    ):
        model.name = "other"
    with pytest.raises(AttributeError, match="immutable"):
        model.apply = None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: layers.compose(affine(2), jnp.sin),
            r"compose expected layers, received sin\. For a plain function write layers\.fn\(jnp\.sin\)\.$",
        ),
        (
            lambda: layers.compose(3, affine(2)),
            r"compose expected layers, received 3\. For a plain function write layers\.fn\(f\)",
        ),
        (lambda: affine(2) >> 3, r"compose expected layers, received 3\."),
        (
            lambda: layers.sequential([affine(2), affine]),
            r"sequential expected layers, received .*\. Did you forget to call",
        ),
        (
            lambda: layers.sequential(affine(2)),
            r"sequential expected a list of layers, received affine\(2, 2\)\. Write",
        ),
        (lambda: layers.residual(None), r"residual expected layers, received None\."),
        (lambda: layers.fn(3), "fn expected a function of one argument, received 3"),
    ],
)
def test_what_is_not_a_layer_is_an_error(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def test_an_empty_sequential_is_an_error():
    with pytest.raises(ValueError, match="sequential expected at least one layer, received an empty list"):
        layers.sequential([])


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        (
            affine(3, 2),
            r"residual adds its input float32\[2, 3\] to .*float32\[2, 2\].*Change affine\(3, 2\) so that it keeps both",
        ),
        (
            layers.fn(lambda x: jnp.asarray(x, jnp.float16)),
            r"float32\[2, 3\] to its inner layer's output float16\[2, 3\]",
        ),
    ],
)
def test_a_residual_that_changes_shape_or_dtype_is_an_error(inner, text):
    model = layers.residual(inner)
    with pytest.raises(ValueError, match=text):
        applied(model, made(model))


def test_errors_name_the_layer_by_its_path():
    model = layers.residual(layers.sequential([affine(3), affine(3) >> affine(4, 3)]))
    with pytest.raises(
        ValueError, match=r"affine\(4, 3\) at 'inner.1.right' expected float32\[\.\.\., 4\], received float32"
    ):
        applied(model, made(model))
    with pytest.raises(ValueError, match=r"affine\(3, 3\) at 'inner.0' expected"):  # the path starts anew
        applied(model, made(model), np.ones((2, 5), np.float32))


def test_other_errors_get_a_note_with_the_path_of_the_innermost_layer():
    def broken(x):
        raise ZeroDivisionError("mine")

    model = layers.sequential([counter(), layers.residual(layers.fn(broken))])
    with pytest.raises(ZeroDivisionError, match="mine") as error:
        applied(model, made(model))
    assert str(error.value) == "mine"
    assert error.value.__notes__ == ["In the model's layer '1.inner'."]


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            jnp.ones((2, 3), jnp.int32),
            TypeError,
            r"received int32\[2, 3\]: the layer needs floating-point input.*x\.astype\(jnp\.float32\)",
        ),
        (
            jnp.ones((2, 3), jnp.float16),
            TypeError,
            r"received float16\[2, 3\]: the parameters are float32.*jnp\.float16\)",
        ),
        (
            jnp.ones((2, 5)),
            ValueError,
            r"received float32\[2, 5\]: the last axis has size 5, not 3\. Make the layer with 5 input features",
        ),
        (jnp.ones(()), ValueError, r"received float32\[\]: it has 0 axes instead of one or more"),
        ({"a": jnp.ones(3)}, TypeError, r"an array, received dict.*a layer that takes a tree: Layer\("),
        (None, TypeError, "an array, received NoneType"),
    ],
    ids=str,
)
def test_float_inputs_that_do_not_fit(x, error, text):
    with pytest.raises(error, match=rf"affine\(3, 3\) at '0' expected .*{text}"):
        applied(MODELS["sequential"], made(MODELS["sequential"]), x)


def test_float_inputs_of_the_wrong_number_of_axes():
    with pytest.raises(
        ValueError, match=r"conv expected float\[batch, length, channels\].*: it has 2 axes instead of 3\."
    ):
        inputs.float_input("conv", jnp.ones((2, 3)), ndim=3, layout="batch, length")


def test_int_inputs():
    assert inputs.int_input("table", np.arange(3)).dtype == jnp.int32
    with pytest.raises(
        TypeError, match=r"table expected int\[batch\], received float32\[2\]: the layer needs integer indices"
    ):
        inputs.int_input("table", jnp.ones(2), layout="batch")
    with pytest.raises(TypeError, match="table expected an array, received list"):
        inputs.int_input("table", [1, 2])


MODELS = {
    "sequential": layers.sequential([affine(3), counter()]),
    "longer": layers.sequential([affine(3), counter(), counter()]),
    "compose": affine(3) >> counter(),
    "residual": layers.residual(affine(3)),
    "affine": affine(3),
}


@pytest.mark.parametrize(
    ("model", "other", "text"),
    [
        (
            "sequential",
            "longer",
            r"sequential has 2 layers, received variables with params list of 3 and state list of 3",
        ),
        ("longer", "sequential", "sequential has 3 layers, received .* list of 2"),
        ("sequential", "compose", r"'0' expected variables with a part 0 in .* received \['left', 'right'\]"),
        ("compose", "sequential", r"'left' expected variables with a part 'left' in .* list of 2"),
        ("compose", "affine", r"'left' expected .* received \['weight', 'bias'\] and \[\]"),
        ("residual", "sequential", r"'inner' expected variables with a part 'inner' in .* list of 2"),
    ],
)
def test_variables_of_another_model_are_an_error(model, other, text):
    with pytest.raises(ValueError, match=f"(?s){text}.*they belong to another model"):
        applied(MODELS[model], made(MODELS[other]))


@pytest.mark.parametrize("part", [None, 3, (), {"other": 1}])
@pytest.mark.parametrize("model", ["sequential", "compose", "residual"])
def test_variables_that_are_no_trees_of_a_model_are_an_error(model, part):
    vars = made(MODELS[model])
    for wrong in (vars.replace(params=part), vars.replace(state=part), vars.replace(params=part, state=part)):
        with pytest.raises(ValueError, match="they belong to another model"):
            applied(MODELS[model], wrong)

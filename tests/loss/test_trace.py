"""A loss traced on its own: it is what it would be if it were called, and its constants are seen."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import losses, metrics, rng
from kaun._loss import capture
from kaun._loss.trace import trace_loss
from kaun.errors import CaptureError
from kaun.evaluation.totals import PackedMetrics
from kaun.evaluation.trace import trace_metrics


def compiled(loss, output):
    """Value and gradient of a traced loss under jit, as a step runs it."""
    key, arrays = capture.capture_loss(loss)

    def run(output, arrays, draw):
        with rng.scope(draw):
            return jax.value_and_grad(lambda out: trace_loss(key, arrays, out)[0])(output)

    return jax.jit(run)(output, arrays, jax.random.key(0))


def test_value_and_gradient_are_those_of_a_plain_call():
    y = np.array([1.0, 2.0], np.float32)
    out = jnp.array([3.0, 5.0])
    for loss in (lambda o: losses.mse(o, y), lambda o: losses.huber(o, y), lambda o: jax.nn.relu(o - y).sum()):
        value, gradient = compiled(loss, out)
        expected, reference = jax.value_and_grad(loss)(out)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, reference, rtol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o: (o > 1).mean(dtype=jnp.float32),
        lambda o: jnp.float32(1),
        lambda o: losses.Mean(jnp.round(jax.lax.stop_gradient(o)).sum(), 2),
        lambda o: (jax.lax.stop_gradient(o).mean(), {"seen": o.mean()}),
    ],
)
def test_a_loss_without_a_gradient_is_refused(loss):
    with pytest.raises(
        TypeError, match=r"loss `<lambda>` \(test_trace\.py:\d+\) has no gradient: no parameter would train"
    ):
        compiled(loss, jnp.array([3.0, 0.5]))
    key, arrays = capture.capture_loss(loss)
    with rng.scope(0):  # where nothing is differentiated, it has a value
        assert jnp.isfinite(trace_loss(key, arrays, jnp.array([3.0, 0.5])).value)


def test_a_loss_that_has_a_gradient_in_a_part_of_the_output_alone_is_not_refused():
    for loss in (lambda o: jax.checkpoint(jnp.sum)(o), lambda o: jax.jit(jnp.max)(o), lambda o: 0 * o.sum()):
        compiled(loss, jnp.array([3.0, 0.5]))
    mask = jnp.array([1, 0])
    compiled(lambda o: jax.lax.scan(lambda c, v: (c + v, None), jnp.float32(0), jnp.where(mask, o, 0))[0], jnp.ones(2))


def test_the_python_of_a_loss_runs_once_for_a_trace(capsys):
    def loss(o):
        print("traced")
        return o.sum()

    compiled(loss, jnp.ones(2))
    assert capsys.readouterr().out == "traced\n"


def test_constants_are_found_inside_inner_programs():
    hidden = {"y": jnp.ones(3)}

    class Box:
        pass

    kept = Box()
    kept.y = hidden["y"]
    box = weakref.ref(kept)
    for loss in (
        lambda o: jax.jit(lambda z: (z * box().y).sum())(o),
        lambda o: jax.lax.cond(o.sum() > 0, lambda z: (z * box().y).sum(), lambda z: z.sum(), o),
        lambda o: jax.lax.scan(lambda c, z: (c + (z * box().y).sum(), None), jnp.float32(0), o[None])[0],
        lambda o: jax.checkpoint(lambda z: (z * box().y).sum())(o),
    ):
        with pytest.raises(CaptureError, match=r"reads an array float32\[3\] through an object"):
            compiled(loss, jnp.ones(3))


def test_effects_inside_a_loss_survive(capfd):
    def loss(o):
        jax.debug.print("loss is {}", o.sum())
        return o.sum()

    compiled(loss, jnp.ones(2))
    jax.effects_barrier()
    assert "loss is 2.0" in capfd.readouterr().out


def test_draws_of_a_loss_come_from_the_steps_scope():
    loss = lambda o: (o * jax.random.normal(rng.next_key(), (2,))).sum()
    a, _ = compiled(loss, jnp.ones(2))
    b, _ = compiled(loss, jnp.ones(2))
    assert float(a) == float(b)


def run_metrics(metrics, output, targets):
    key, arrays = capture.capture_loss({name: capture.snapshot_loss(f) for name, f in metrics.items()})
    found = jax.jit(lambda arrays, *given: trace_metrics(key, arrays, jax.random.key(0), *given))(
        arrays, output, targets
    )
    return PackedMetrics.stacked(found.form, [PackedMetrics(found.form, [np.asarray(v)[None] for v in found.vectors])])


def test_metrics_come_as_parts_and_their_python_runs_once_for_a_trace(capsys):
    y = np.array([1.0, 2.0], np.float32)

    def first(p, t):
        print("traced")
        return (p * y).sum() + t.sum()

    found = run_metrics({"first": first, "second": lambda p, t: (p.sum(), 2)}, jnp.ones(2), jnp.ones(2))
    assert capsys.readouterr().out == "traced\n"
    assert tuple(found["first"]) == (5.0, 2)
    assert tuple(found["second"]) == (2.0, 2)


def test_what_a_metric_may_not_do_names_it():
    held = {}

    class Box:
        y = jnp.ones(3)

    def writes(p, t):
        held["p"] = p
        return p.sum()

    kept = Box()
    kept.y = jnp.ones(3)
    box = weakref.ref(kept)
    good = lambda p, t: p.sum()
    with pytest.raises(
        CaptureError, match=r"metric 'b' `writes` \(test_trace\.py:\d+\) writes to a list.* A compiled metric runs"
    ):
        run_metrics({"a": good, "b": writes}, jnp.ones(3), jnp.ones(3))
    assert held == {}
    with pytest.raises(
        CaptureError, match=r"(?s)metric 'b' .* through an object.*the compiled metric would.*metric = lambda p, t"
    ):
        run_metrics({"a": good, "b": lambda p, t: (p * box().y).sum()}, jnp.ones(3), jnp.ones(3))
    with pytest.raises(TypeError, match=r"metric 'b' `<lambda>` .* must return a real scalar"):
        run_metrics({"a": good, "b": lambda p, t: p}, jnp.ones(3), jnp.ones(3))
    with pytest.raises(
        jax.errors.ConcretizationTypeError, match=r"(?s)In metric 'b' `<lambda>` .* sees shapes and dtypes"
    ):
        run_metrics({"b": lambda p, t: float(p.sum())}, jnp.ones(3), jnp.ones(3))


def test_scalars_beside_the_loss_come_by_name_in_their_own_dtype():
    def loss(out):
        return out.mean(), {"right": (out > 0).sum(), "half": out.astype(jnp.bfloat16).mean(), "three": 3}

    key, arrays = capture.capture_loss(loss)
    with rng.scope(0):
        value, weight, scalars, weights, parts = trace_loss(key, arrays, jnp.array([-1.0, 3.0]))
    assert weight is None and not weights and not parts
    assert value == 1.0 and list(scalars) == ["half", "right", "three"]
    assert {n: (float(v), str(v.dtype)) for n, v in scalars.items()} == {
        "half": (1.0, "float32"), "right": (1.0, "int32"), "three": (3.0, "int32"),
    }  # fmt: skip


PARTS = metrics.Counted(lambda predictions, targets: {"all": targets, "rows": targets.size}, lambda sums: 0.0)


def test_parts_of_a_metric_beside_the_loss_come_by_name_as_arrays():
    key, arrays = capture.capture_loss(lambda out: (out.mean(), {"b": PARTS.parts(out, out > 0), "a": out.max()}))
    with rng.scope(0):
        given = trace_loss(key, arrays, jnp.array([-1.0, 3.0]))
    assert list(given.scalars) == ["a"] and list(given.parts) == ["b"] and not given.weights
    counts = given.parts["b"].counts
    assert given.parts["b"].counted is PARTS and counts["all"].dtype == bool and not counts["rows"].weak_type
    assert list(given.numbers()) == ["a", "b"] and given.numbers()["a"].weight is None


def test_a_mean_and_means_beside_it_come_with_their_weights():
    def loss(out):
        return losses.Mean(out.sum(), jnp.array(4)), {"part": losses.Mean(jnp.array(3), 2.0), "plain": out.sum()}

    key, arrays = capture.capture_loss(loss)
    with rng.scope(0):
        given = trace_loss(key, arrays, jnp.array([-1.0, 3.0]))
    assert (given.value, given.weight) == (0.5, 4)
    assert list(given.scalars) == ["part", "plain"] and given.scalars["part"] == 1.5
    assert given.weights == {"part": 2.0}


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (lambda out: {"rows": out}, r"'rows': received float32\[2\]"),
        (lambda out: {"name": "x"}, "'name': received str"),
        (lambda out: {"none": None}, "'none': received NoneType"),
        (lambda out: {3: 1.0}, "3: received float"),
        (lambda out: {"loss": 1.0}, "'loss': the name is kaun's own"),
        (lambda out: {"loss_weight": 1.0}, "'loss_weight': the name is kaun's own"),
        (lambda out: {"epoch": 1.0}, "'epoch': the name is kaun's own"),
        (lambda out: {"c": PARTS.parts(out, out.astype(jnp.complex64))}, r"'c': received parts of complex64\[2\]"),
        (lambda out: {"z": out.sum().astype(jnp.complex64)}, r"'z': received complex64\[\]"),
    ],
)
def test_what_is_no_scalar_beside_a_loss_is_refused(given, what):
    with pytest.raises(TypeError, match=rf"must return \(loss, dict of scalars by name\); {what}"):
        compiled(lambda out: (out.mean(), given(out)), jnp.ones(2))

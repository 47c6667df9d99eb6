"""Situations in which a run ended at a loss or gradient that is nan, and the message sent the user to the wrong place."""

import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, Layer, checkpoint, layers, losses, reports, rng
from kaun.errors import NonFiniteLoss

CLASSES = 3
RECIPE = "print(kaun.explain(trainer, err))"


def trained(model=None, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model or layers.linear(2, CLASSES), optimizer=optax.sgd(0.1), **options)
        return trainer, trainer.init()


def large():
    """A model whose state is more than a megabyte, so that its memory is taken over."""
    return layers.sequential([layers.linear(2, 60_000), layers.linear(60_000, CLASSES)])


def labelled(batches, wrong, value):
    """Rows for batches of four; in batch number ``wrong`` (from 1) the labels of rows 1 and 3 have a value."""
    x = np.random.default_rng(0).normal(size=(4 * batches, 2)).astype(np.float32)
    y = np.arange(4 * batches) % CLASSES
    y[4 * wrong - 3], y[4 * wrong - 1] = value, value
    return x, y


def from_one_buffer(x, y):
    """A loader that fills the same two arrays again and again."""
    a, b = np.zeros((4, 2), np.float32), np.zeros(4, int)
    for i in range(0, len(x), 4):
        a[:], b[:] = x[i : i + 4], y[i : i + 4]
        yield a, lambda output: losses.cross_entropy_sparse(output, b)
    a[:], b[:] = 7, 0


LOADERS = {
    "batches": lambda x, y: Data.batches((x, y), 4).with_loss(losses.cross_entropy_sparse),
    "on the device": lambda x, y: Data.batches((jnp.asarray(x), jnp.asarray(y)), 4).with_loss(losses.cross_entropy_sparse),
    "mapped": lambda x, y: Data.batches((x, y), 4).map(
        lambda b: (b[0], lambda output: losses.cross_entropy_sparse(output, b[1]))
    ),
    "one buffer": from_one_buffer,
}  # fmt: skip


# In the short form a loader of a small model, and another one of a large model.
SHORT = [("one buffer", None), ("mapped", large)]
CASES = [
    pytest.param(*case, marks=[] if case in SHORT else pytest.mark.slow)
    for case in [*((loader, None) for loader in LOADERS), ("mapped", large), ("one buffer", large)]
]


@pytest.mark.parametrize(("loader", "model"), CASES)
def test_a_label_of_minus_100_in_a_fused_run_is_named_by_the_losses_own_sentence(loader, model):
    """26. Hugging Face's label for ignored tokens in batch 21 of 40: the advice was a smaller learning rate."""
    trainer, state = trained(model and model())
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit(state, LOADERS[loader](*labelled(40, 21, -100)))
    sentence = "cross_entropy_sparse expected indices in 0 to 2, received indices[1] = -100 (2 of 4 are outside)."
    assert str(caught.value).startswith("The loss is nan at step 21; ")
    assert f"Run outside of the compiled step, it is refused: {sentence}" in str(caught.value)
    assert "learning rate" not in str(caught.value) and RECIPE in str(caught.value)
    cause = caught.value.__cause__
    assert isinstance(cause, ValueError) and str(cause).startswith(sentence)
    found = kaun.explain(trainer, caught.value)
    assert (found.step, found.part, found.operation, found.rows) == (21, "loss", "select_n", (1, 3))
    assert found.refused == str(cause) and sentence in str(found)


@pytest.mark.parametrize("every", [1, 7], ids=["each step", "each seventh"])
def test_a_label_out_of_range_in_a_reported_run_with_checkpoints(tmp_path, every):
    """26. Ten classes and an output for nine, in a run that reports and saves: the newest checkpoint is the step before."""
    trainer, state = trained()
    runs = checkpoint.Directory(tmp_path, every=5)
    data = LOADERS["batches"](*labelled(20, 12, CLASSES))
    with pytest.raises(
        NonFiniteLoss, match=r"at step 12; .* received indices\[1\] = 3 \(2 of 4 are outside\)"
    ) as caught:
        trainer.fit(state, data, report=reports.every(every, lambda *_: None), checkpoints=runs)
    assert int(caught.value.kaun_state.step) == 11 and (tmp_path / "step-00000011").is_dir()
    assert kaun.explain(trainer, caught.value).rows == (1, 3)


def test_a_padding_id_of_minus_one_under_a_mask_is_named_by_the_embeddings_own_sentence():
    """31. Padding of -1 that the mask leaves out: every output was nan, from the first step on."""
    model = layers.sequential([layers.embedding(10, 4), layers.multi_head_attention(4, 2)])
    trainer, state = trained(model)
    tokens = np.array([[1, 2, -1], [3, 4, 5]])
    ctx = Context(attention_mask=np.array([[1, 1, 0], [1, 1, 1]]))
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit(state, [(tokens, jnp.mean, ctx)])
    sentence = "embedding(10, 4) at '0' expected indices in [0, 10), received -1 at position [0, 2]."
    assert f"it is refused: {sentence} Use an index below 10 for padding" in str(caught.value)
    assert str(caught.value.__cause__).startswith(sentence)
    found = kaun.explain(trainer, caught.value)
    assert (found.operation, found.layer, found.rows) == ("gather", "0", (0,))


def test_labels_beyond_their_range_of_a_loss_of_numbers():
    """26. Grey values from 0 to 255 as labels of a binary cross entropy that a jitted loss calls, and a log of them."""
    y = np.full((4, 1), 200.0, np.float32)

    @jax.jit
    def loss(output):
        return losses.binary_cross_entropy(output, jnp.asarray(y)) + jnp.log(-jnp.abs(output) - 1).mean()

    trainer, state = trained(layers.linear(2, 1))
    with pytest.raises(
        NonFiniteLoss, match=r"it is refused: binary_cross_entropy expected labels in 0 to 1, received l"
    ):
        trainer.fit(state, [(np.ones((4, 2), np.float32), loss)])


def test_an_item_that_nothing_refuses_keeps_the_general_advice():
    """26. What fails outside of a compiled step for a reason of its own is no cause."""
    trainer, state = trained(layers.linear(2, 1))

    def only_compiled(output):
        if not isinstance(output, jax.core.Tracer):
            raise ValueError("this loss runs in a compiled step alone")
        return output.mean() * jnp.inf

    with pytest.raises(NonFiniteLoss, match=r"Try a smaller learning rate, or optax\.chain\(") as caught:
        trainer.fit(state, [(np.ones((4, 2), np.float32), only_compiled)])
    assert caught.value.__cause__ is None and "refused" not in str(caught.value) and RECIPE in str(caught.value)


def test_the_item_is_let_go_with_the_exception():
    """26. A batch that only the exception holds is freed with it."""
    trainer, state = trained(layers.linear(2, 1))
    x = jnp.full((4, 2), jnp.nan)
    alive = weakref.ref(x)
    try:
        trainer.fit(state, [(x, jnp.mean)])
    except NonFiniteLoss as error:
        assert error.kaun_step.inputs.leaves[0] is x
    del x
    gc.collect()
    assert alive() is None


def test_a_run_without_a_failure_holds_no_items():
    """26. Dispatches that are done let their batches go, and runs that end at no step hold none at all."""
    for mode in ("raise", "skip"):
        trainer, state = trained(layers.linear(2, 1), on_nonfinite=mode)
        items = [(jnp.full((4, 2), i, jnp.float32), jnp.mean) for i in range(3)]
        alive = [weakref.ref(x) for x, _ in items]
        trainer.fit(state, iter(items))
        del items
        gc.collect()
        assert not any(each() for each in alive)


def test_the_layer_of_the_user_is_named_at_its_line():
    """26. ``jax.debug_nans`` answered "nan in scan"; a normalization by the sum of a row of zeros is at fault."""

    def normalized(x):
        return x / x.sum(axis=-1, keepdims=True)

    model = layers.sequential([layers.fn(normalized), layers.linear(2, 1)])
    trainer, state = trained(model)
    x = np.ones((32, 2), np.float32)
    x[[5, 29]] = 0
    data = Data.batches((x, np.ones((32, 1), np.float32)), 8, shuffle=False).with_loss(losses.mse).epochs(2)
    with pytest.raises(NonFiniteLoss, match="at step 1; ") as caught:
        trainer.fit(state, data)
    found = kaun.explain(trainer, caught.value)
    line = normalized.__code__.co_firstlineno + 1
    assert (found.operation, found.layer, found.rows) == ("div", "0", (5,))
    assert (found.file, found.line) == (str(Path(__file__)), line)


def test_an_error_of_a_nested_fit_is_explained_by_its_own_state():
    """26. Of nested fits the outermost's state is on the exception; the step that failed is the inner one's."""
    inner, start = trained(layers.linear(2, 1))
    outer, state = trained(
        Layer(init=lambda *, dtype: layers.linear(2, 2).init(dtype=dtype), apply=layers.linear(2, 2).apply)
    )

    def report(step, loss, now):
        inner.fit(start, [(np.full((4, 2), np.nan, np.float32), jnp.mean)])

    with pytest.raises(NonFiniteLoss) as caught:
        outer.fit(state, [(np.ones((4, 2), np.float32), jnp.mean)], report=report)
    assert caught.value.kaun_state.vars.params["weight"].shape == (2, 2)
    assert kaun.explain(inner, caught.value).given == "x"

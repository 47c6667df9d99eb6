"""Pipelines in several processes."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, _processes, averages, layers, losses, metrics, reports, rng, sharding, tree
from kaun._run.identity import describe_data, digest_item

N = 23
X, Y = np.arange(2.0 * N, dtype=np.float32).reshape(N, 2), np.arange(N)
LENGTHS = np.arange(N) % 4 + 1


def pipelines(load=lambda i: (X[i], Y[i])):
    with rng.scope(0):
        return {
            "shuffled": Data.batches((X, Y), 8, shuffle=True).epochs(2),
            "weighted": Data.batches((X, Y), 8, shuffle=True, pad=True, sample_weights=np.arange(N)),
            "rows": Data.from_fn(N, load).shuffle().batch(8),
            "augmented": Data.from_fn(16, load)
            .random_map(lambda key, row: (row[0] + jax.random.uniform(key), row[1]))
            .batch(4),
            "bucket": Data.from_fn(N, lambda i: (np.arange(LENGTHS[i]), Y[i])).bucket(LENGTHS, [2, 4], 4).shuffle(),
            "keys": Data.batches((X[:8], jax.random.split(jax.random.key(0), 8)), 4),
        }


def words(leaf):
    return jax.random.key_data(leaf) if tree.is_key(leaf) else leaf


def whole_items():
    """The items of each pipeline, as NumPy arrays."""
    return {
        name: [[np.asarray(words(a)) for a in jax.tree.leaves(item)] for item in data]
        for name, data in pipelines().items()
    }


def parts_of(item):
    """Of each array the parts of this process, with their rows in the whole."""
    return [
        [(p.index[0], np.asarray(words(p.data))) for p in leaf.addressable_shards] for leaf in jax.tree.leaves(item)
    ]


def assembled_items():
    """The parts of this process of the same items, as global arrays; and how many calls read a row."""
    s, read, found = sharding.data_parallel(), [], {}
    for name, data in pipelines(lambda i: read.append(i) or (X[i], Y[i])).items():
        read.clear()
        placed = data.local(s).map(lambda batch: batch).assemble(s).prefetch(2)
        found[name] = [parts_of(item) for item in placed], len(read)
    return found


def split_loader():
    """Batches of 8 rows of a loader that gives each process its half; and one whose rows the devices do not divide."""
    s = sharding.data_parallel()
    half = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
    items = list(Data.from_iterable(lambda: (X[8 * i : 8 * i + 8][half] for i in range(2))).assemble(s))
    try:
        list(Data.from_iterable([X[:3]]).assemble(s))
    except ValueError as error:
        return [parts_of(item) for item in items], str(error)


def compared(how, same):
    """The first item of a pipeline, the same in both processes or not; and a warning, if there is one."""
    x = X[:8] + (0 if same else jax.process_index())
    data = Data.from_iterable(lambda: iter([x])) if how == "split" else Data.batches(x, 8)
    if how == "local":
        data = data.local(sharding.data_parallel()).map(lambda rows: (rows, np.concatenate([rows, rows])))
    channel = _processes.Channel(f"compared {how} {same}")
    if jax.process_index():  # after the first, which learns of nothing
        channel.exchange("", repr)
    with warnings.catch_warnings(record=True) as caught:
        try:
            return [item.shape for item in data.assemble(sharding.data_parallel())], [str(w.message) for w in caught]
        finally:
            if not jax.process_index():
                channel.exchange("", repr)


AUC = metrics.Counted.of(metrics.auc)
METRICS = {
    "accuracy": metrics.accuracy,
    "auc": metrics.Counted(lambda p, y, weights=None: AUC.counts(p[:, 1], y == 1, weights=weights), AUC.result),
    "entropy": losses.cross_entropy_sparse,
    "f1": metrics.f1,
}
F, CLASSES = np.sin(X), Y % 3


@functools.cache
def trained(several=True):
    """A trainer and its first state, in several processes or one."""
    s = sharding.fsdp(min_size=8) if several else None
    with rng.scope(0):
        model = layers.linear(2, 8) >> layers.tanh() >> layers.linear(8, 3)
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), sharding=s)
        state = trainer.init()
    return trainer, state


def evaluated(several=True, options=None):
    """Metrics and outputs of a model over batches that are whole or made of parts."""
    trainer, state = trained(several)
    place = lambda data: data.local(trainer.sharding).assemble(trainer.sharding).prefetch(2) if several else data
    data = Data.batches((F, CLASSES), 8, **(options or {"pad": True, "sample_weights": np.arange(N) % 3}))
    return [
        *(trainer.evaluate(state, each, METRICS) for each in (data, place(data))),
        *(trainer.predict(state, each.map(lambda b: b[0])) for each in (data, place(data))),
    ]


def fitted(several=True):
    """The weights after a fit on parts of padded, weighted batches; whether they are those of the fold of step."""
    trainer, state = trained(several)
    with rng.scope(1):
        data = Data.batches((F, CLASSES), 8, shuffle=True, pad=True, sample_weights=np.arange(N) % 3)
    placed = data.local(trainer.sharding).assemble(trainer.sharding).prefetch(2) if several else data
    train = placed.with_loss(losses.cross_entropy_sparse).epochs(2)
    host = lambda state: jax.tree.map(tree.on_host, state.vars.params)
    fitted, whole, folded = (
        trainer.fit(state, train),
        trainer.fit(state, data.with_loss(losses.cross_entropy_sparse).epochs(2)),
        state,
    )
    for x, loss, ctx in train:
        _, folded = trainer.step(folded, x, loss=loss, ctx=ctx)
    return [host(fitted), host(whole), host(folded)]


def read_by_users(several=True):
    """Outputs and metrics that the user's own code reads, and a metric that gets the real rows alone."""
    trainer, state = trained(several)
    place = lambda data: data.local(trainer.sharding).assemble(trainer.sharding) if several else data
    measure = jax.jit(lambda p, y: {"auc": METRICS["auc"].parts(p, y), "mean": losses.Mean(p.sum(), 1.0 * p.size)})
    batches = place(Data.batches((F, CLASSES), 8, drop_last=True))
    return [
        trainer.evaluate(
            state, place(Data.batches((F, CLASSES), 8, pad=True)), {"sum": lambda p, y: (p.sum(), p.size)}
        ),
        metrics.evaluate_many(lambda b: measure(trainer.predict(state, b[0]), b[1]), batches),
        *(np.asarray(trainer.predict(state, F[:n])) for n in (8, 7)),
        np.asarray(trainer.export(state, F).call(F)),
    ]


def tools(several=True):
    """What validate, update_statistics, lr_range and explain say of a trainer."""
    about = {"sharding": sharding.fsdp(min_size=8)} if several else {}
    model = layers.linear(2, 8) >> layers.batch_norm(8) >> layers.fn(jnp.exp) >> layers.linear(8, 3)
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), average=averages.ema(0.5), **about)
        state = trainer.init()
    s = trainer.sharding
    place = lambda data: data.local(s).assemble(s) if several else data
    entropy = losses.cross_entropy_sparse
    train = place(Data.batches((F, CLASSES), 8, pad=True)).with_loss(entropy)
    check = reports.validate(
        trainer, place(Data.batches((F, CLASSES), 8)), {"entropy": entropy}, 2, of=lambda s: s.averaged
    )
    state = trainer.fit(state, train.epochs(2), report=check)
    averaged = averages.update_statistics(trainer, state, train).averaged.vars.state
    found = [[values["entropy"] for _, values in check.results], jax.tree.map(tree.on_host, averaged)]
    found.append(kaun.lr_range(trainer, state, train.epochs(5), low=1e-3, high=1.0, steps=10).losses)
    try:
        trainer.fit(state, place(Data.batches((F[:8] * 1e38, CLASSES[:8]), 8)).with_loss(entropy))
    except kaun.errors.NonFiniteLoss as error:
        explained = kaun.explain(trainer, error)
        return [*found, explained.rows, np.array([explained.operation == "dot_general", explained.layer is not None])]


def digests():
    """The digest of an item that a run was saved after, and the facts of its pipeline."""
    s = sharding.data_parallel()
    with rng.scope(0):
        data = Data.batches((F, CLASSES), 8, shuffle=True).skip(1).take(1)
    (item,) = data.local(s).map(lambda b: b).assemble(s).with_loss(losses.mse)
    return digest_item(item), describe_data(data.local(s).assemble(s)) == describe_data(data)


def uneven(entry, fails):
    """An evaluation in which the data of process 1 ends or fails after one item, and that of process 0 has two."""

    def loader():
        yield F[:4], CLASSES[:4]
        if jax.process_index():
            if fails:
                raise OSError("no such file")
            return
        yield F[4:8], CLASSES[4:8]

    trainer, state = trained()
    data = Data.from_iterable(loader)
    if entry == "evaluate":
        return trainer.evaluate(state, data, {"accuracy": metrics.accuracy})
    return trainer.predict(state, data.map(lambda b: b[0]))


def on_devices_of_the_first():
    s = sharding.data_parallel(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]))
    return [item.shape for item in Data.batches(X, 8).local(s).assemble(s)]


def own_arrays():
    """A fit on parts of arrays that are other ones in each process."""
    trainer, state = trained()
    data = Data.batches((F + jax.process_index(), CLASSES), 8).local(trainer.sharding).assemble(trainer.sharding)
    trainer.fit(state, data.with_loss(losses.cross_entropy_sparse))

"""A tabular transformer (FT-Transformer, Gorishniy et al., 2021): a row's numbers and categories as tokens.

Run it with: python examples/models/tabular.py
         or: python examples/models/tabular.py --wine

The table is made: what a number says depends on a category, so that logistic regression on the numbers and one-hot
categories is little better than a guess. With --wine it is that of load_wine (scikit-learn), which has only numbers.
The script prints how often both are right on rows that they have not seen.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression

import kaun
from kaun import Data, layers, losses, metrics, reports, rng

PAPER = {"width": 192, "heads": 8, "blocks": 3, "dropout": 0.2}
SMALL = {"width": 16, "heads": 2, "blocks": 2, "dropout": 0.0}


def make_model(*, numbers, categories, outputs, width, heads, blocks, dropout):
    """Make the model: from {"numbers": [batch, n], "categories": [batch, c]} to [batch, outputs].

    ``numbers`` is n, and ``categories`` has the number of values of each of the c columns of integers, from 0. Each
    column is a token; one more collects the answer.
    """
    bound = width**-0.5
    draw = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    # The columns share one table, in which the values of a column follow those of the column before.
    starts = np.cumsum([0, *categories])[:-1]
    parts = {
        "answer": layers.parameter((1, 1, width), init=draw),
        "number_weight": layers.parameter((1, numbers, width), init=draw),
        "number_bias": layers.parameter((1, numbers, width), init=draw),
        "blocks": [block(width, heads, dropout, first=i == 0) for i in range(blocks)],
        "head": layers.sequential([layers.layer_norm(width), layers.relu(), layers.linear(width, outputs)]),
    }
    if categories:
        parts["category"] = layers.embedding(sum(categories), width, scale=False, weight_init=draw)
        parts["category_bias"] = layers.parameter((1, len(categories), width), init=draw)

    def forward(m, x):
        tokens = [
            jnp.broadcast_to(m.answer(), (len(x["numbers"]), 1, width)),
            x["numbers"][:, :, jnp.newaxis] * m.number_weight() + m.number_bias(),
        ]
        if categories:
            tokens.append(m.category(x["categories"] + starts[np.newaxis]) + m.category_bias())
        h = jnp.concatenate(tokens, axis=1)
        for layer in m.blocks:
            h = layer(h)
        return m.head(h[:, 0])

    return layers.module(parts, forward, name="ft_transformer")


def block(width, heads, dropout, *, first):
    """Make a block with its norms before attention and mlp; the first one has none before its attention."""
    hidden = 4 * width // 3

    def reglu(h):
        value, gate = jnp.split(h, 2, axis=-1)
        return value * jax.nn.relu(gate)

    mlp = [
        layers.layer_norm(width), layers.linear(width, 2 * hidden), layers.fn(reglu), layers.dropout(dropout / 2),
        layers.linear(hidden, width),
    ]  # fmt: skip
    attention = layers.multi_head_attention(width, heads, bias=True, dropout=dropout)
    if not first:
        attention = layers.sequential([layers.layer_norm(width), attention])
    return layers.sequential({"attention": layers.residual(attention), "mlp": layers.residual(layers.sequential(mlp))})


def made_table(rows=1000):
    """Return a table {"numbers", "categories"}, labels, and the number of values of each category.

    There are 4 numbers and 2 categories of 4 and 3 values. The first category says which number counts, and whether it
    counts for or against the label depends on the second.
    """
    draw = np.random.default_rng(np.asarray(jax.random.key_data(rng.next_key())))
    numbers = draw.standard_normal((rows, 4), dtype=np.float32)
    categories = np.stack([draw.integers(0, 4, rows), draw.integers(0, 3, rows)], axis=1).astype(np.int32)
    which, sign = categories[:, 0], np.where(categories[:, 1] == 0, -1, 1)
    labels = (sign * numbers[np.arange(rows), which] > 0).astype(np.int32)
    return {"numbers": numbers, "categories": categories}, labels, [4, 3]


def wine_table():
    """Return the same for load_wine, of 178 rows with 13 numbers, in an order that is drawn."""
    numbers, labels = load_wine(return_X_y=True)
    order = np.asarray(jax.random.permutation(rng.next_key(), len(labels)))
    numbers = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0)
    x = {"numbers": numbers[order].astype(np.float32), "categories": np.zeros((len(labels), 0), np.int32)}
    return x, labels[order].astype(np.int32), []


def baseline(train, test, categories):
    """Return how often logistic regression is right on ``test``; both are pairs (table, labels)."""

    def columns(x):
        one_hot = [np.eye(count)[x["categories"][:, i]] for i, count in enumerate(categories)]
        return np.concatenate([x["numbers"], *one_hot], axis=1)

    model = LogisticRegression(max_iter=1000).fit(columns(train[0]), train[1])
    return float(model.score(columns(test[0]), test[1]))


def main(*, epochs=30, wine=False, seed=0, **sizes):
    with rng.scope(seed):
        x, labels, categories = wine_table() if wine else made_table()
        cut = 4 * len(labels) // 5
        train, test = jax.tree.map(lambda a: a[:cut], (x, labels)), jax.tree.map(lambda a: a[cut:], (x, labels))
        columns = {"numbers": x["numbers"].shape[1], "categories": categories, "outputs": int(labels.max()) + 1}
        data = Data.batches(train, batch_size=40, shuffle=True).with_loss(losses.cross_entropy_sparse)
        trainer = kaun.Trainer(model=make_model(**columns, **SMALL | sizes), optimizer=optax.adamw(0.005))
        state = trainer.init(dtype=jnp.float32)
    history = reports.history()
    state = trainer.fit(state, data.epochs(epochs), report=history)
    scores = trainer.evaluate(state, Data.batches(test, batch_size=200), {"accuracy": metrics.accuracy})
    right, plain = scores["accuracy"], baseline(train, test, categories)
    print(f"Of {len(test[1])} rows the transformer is right for {100 * right:.1f}%,", end=" ")
    print(f"logistic regression for {100 * plain:.1f}%.")
    return trainer, state, history, right, plain


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a tabular transformer, beside logistic regression.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the rows (default 30)")
    parser.add_argument("--wine", action="store_true", help="the wines of scikit-learn, not a table that is made")
    main(**vars(parser.parse_args()))

"""Runs on several pipelines in one: killed and resumed, their facts, and what is refused."""

import functools
import json
import random

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, losses, rng
from kaun._run.differences import differences
from kaun._run.generators import captured_generators
from kaun._run.identity import check_facts, describe_data, unscoped
from kaun._run.position import resume_from
from kaun.checkpoint import Directory
from kaun.data import every_stage_of, has_exact_length, random_passes
from kaun.errors import ResumeMismatch
from kaun.reports import each_epoch


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def made():
    with rng.scope(0):
        trainer = kaun.Trainer(model=kaun.layers.linear(1, 1), optimizer=optax.sgd(0.01))
        return trainer, trainer.init()


class Shuffling:
    """A loader of other rows in each pass, by a generator of its own."""

    def __init__(self, n, base, seed):
        self.n, self.base, self.generator = n, base, np.random.default_rng(seed)

    def __len__(self):
        return self.n

    def __iter__(self):
        for i in self.generator.permutation(self.n):
            yield np.full((2, 1), self.base + i, np.float32)


def stream(n, base, seed=0):
    return Data.from_iterable(Shuffling(n, base, seed))


def rows(n, base):
    return Data.from_items([np.full((2, 1), base + i, np.float32) for i in range(n)])


def first(item):
    return item[0]


def large(item):
    return item[0, 0] % 3 != 1


PIPELINES = {
    "two loaders, one after the other": lambda: Data.concat(stream(3, 0), stream(3, 10)),
    "two loaders mixed": lambda: Data.mix([stream(6, 0), stream(6, 10)], [1, 1]),
    "two loaders zipped": lambda: Data.zip(stream(5, 0), stream(5, 10)).map(first),
    "a loader among rows": lambda: Data.concat(rows(2, 20), stream(3, 0), rows(2, 30)),
    "a filtered loader": lambda: stream(7, 0).filter(large),
    "filtered rows": lambda: rows(7, 0).shuffle().filter(large),
    "sampled rows": lambda: rows(4, 0).sample([1, 2, 3, 4], 5),
    "shuffled sources": lambda: Data.mix([rows(6, 0).shuffle(), rows(3, 10).shuffle().epochs(3)], [2, 1]),
}


def trained_on(made, make, path=None, kill=0):
    trainer, state = made
    with rng.scope(2):
        data = make().map(lambda x: (x, x)).with_loss(losses.mse).epochs(2)

    def report(step, loss, state):
        if step == kill:
            raise Killed

    checkpoints = None if path is None else Directory(path / "runs", every=2)
    return trainer.fit(state, data, report=report, checkpoints=checkpoints)


@pytest.mark.parametrize(
    ("kill", "kind"),
    [
        pytest.param(kill, kind, marks=[] if (i + n) % 2 == 0 else pytest.mark.slow)
        for n, kill in enumerate((1, 5))
        for i, kind in enumerate(PIPELINES)
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, made, kind, kill):
    whole = trained_on(made, PIPELINES[kind])
    assert whole.step > 6
    with pytest.raises(Killed):
        trained_on(made, PIPELINES[kind], tmp_path, kill)
    resumed = trained_on(made, PIPELINES[kind], tmp_path)
    assert resumed.step == whole.step
    assert all(map(np.array_equal, jax.tree.leaves(resumed.vars), jax.tree.leaves(whole.vars)))


class ByGlobal:
    """A loader whose order is drawn from NumPy's global generator when a pass begins."""

    def __iter__(self):
        return iter([np.full((2, 1), i, np.float32) for i in np.random.permutation(6)])


@pytest.mark.parametrize(
    ("kind", "kill"),
    [
        ("after rows", 3),
        ("mixed", 2),
        ("mixed", 7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("after rows", 2), ("after rows", 7), ("mixed", 3)]),
    ],
)
def test_a_loader_that_is_opened_late_draws_its_order_from_a_state_that_is_compared(tmp_path, made, kind, kill):
    def make(seed=0):
        np.random.seed(seed)
        loader = Data.from_iterable(ByGlobal())
        return Data.concat(rows(4, 10), loader) if kind == "after rows" else Data.mix([rows(9, 10), loader], [2, 1])

    whole = trained_on(made, make)
    with pytest.raises(Killed):
        trained_on(made, make, tmp_path, kill)
    resumed = trained_on(made, make, tmp_path)
    assert all(map(np.array_equal, jax.tree.leaves(resumed.vars), jax.tree.leaves(whole.vars)))
    with pytest.raises(Killed):
        trained_on(made, make, tmp_path / "other", 7)
    with pytest.raises(ResumeMismatch, match=r"NumPy's global generator .*has another state, and the loader draws"):
        trained_on(made, lambda: make(1), tmp_path / "other")


def words(old, new):
    saved = json.loads(json.dumps(describe_data(old)))
    return differences(saved, describe_data(new), 0)


def scoped(make, seed=0):
    with rng.scope(seed):
        return make()


def test_a_difference_names_the_source_and_its_stage(tmp_path, made):
    def twice(item):
        return item * 2

    make = lambda n=3, f=first, base=0: Data.concat(rows(n, base), rows(2, 9).map(f).prefetch(2))
    assert words(make(), make()) == []
    assert words(make(), Data.concat(rows(3, 0), rows(2, 9).map(first))) == []
    (line,) = words(make(), make(base=1))
    assert line.startswith("Data.concat, source 0 (counted from 0): Data.from_items:") and "content" in line
    (line,) = words(make(), make(f=twice))
    assert line.startswith("Data.concat, source 1 (counted from 0): Data.map: the function was first, is ")
    (line,) = words(make(), Data.concat(rows(3, 0)))
    assert line == "Data.concat: it had 2 sources, and has 1"
    assert words(make(), Data.zip(rows(2, 0), rows(2, 9)))[-1].startswith(
        "the stages were Data.concat; they are Data.zip"
    )
    mix = lambda weights=(1, 2), seed=0: scoped(lambda: Data.mix([rows(3, 0), rows(2, 9)], list(weights)), seed)
    assert words(mix(), mix()) == []
    assert words(mix(), mix((1, 3))) == ["Data.mix: the content of weights has changed (float64[2])"]
    (line,) = words(mix(), mix(seed=1))
    assert line.startswith("Data.mix: the key was 0x") and "another seed" in line
    sample = lambda w=(1, 2), n=3: scoped(lambda: rows(2, 0).sample(list(w), n))
    assert words(sample(), sample((1, 3))) == ["Data.sample: the content of weights has changed (float64[2])"]
    assert words(sample(), sample(n=4)) == ["Data.sample: n was 3, is 4"]
    (line,) = words(rows(3, 0).filter(first), rows(3, 0).filter(large))
    assert line == "Data.filter: the function was first, is large"
    with pytest.raises(Killed):
        trained_on(made, lambda: make(f=np.copy), tmp_path, 3)
    with pytest.raises(ResumeMismatch, match=r"Data\.concat, source 0 \(counted from 0\): Data\.from_items"):
        trained_on(made, lambda: make(f=np.copy, base=1), tmp_path)


def test_facts_of_sources_have_a_form_that_is_checked(tmp_path):
    facts = {"key": "", "start": 0, "data": [{"stage": "Data.concat", "length": 3, "sources": [[{"stage": 1}]]}]}
    with pytest.raises(ResumeMismatch, match=r"its facts \(data, machine"):
        check_facts(Directory(tmp_path), 1, facts)


def test_what_a_source_holds_is_found():
    draw = random.Random(0)
    jitter = Data.concat(rows(2, 0), rows(2, 0).map(lambda x: x + draw.random()))
    assert "reads `draw` (Random)" in captured_generators(jitter)[0]
    assert "filter(<lambda>" in captured_generators(rows(2, 0).filter(lambda x: draw.random() < 1))[0]
    outside = Data.concat(rows(2, 0), rows(2, 0).shuffle())
    assert unscoped(outside) == [".shuffle()"] and unscoped(scoped(lambda: Data.concat(rows(2, 0).shuffle()))) == []
    assert [s.name for s in every_stage_of(outside)] == [
        "Data.from_items", "Data.from_items", "Data.shuffle", "Data.concat",
    ]  # fmt: skip
    assert has_exact_length(outside) and not has_exact_length(Data.concat(rows(2, 0), stream(2, 0)))
    once = Data.concat(rows(2, 0), Data.from_iterable(iter([1])))
    with pytest.raises(TypeError, match=r"data that can be iterated again, received list_iterator"):
        resume_from(once, 0)


def test_a_mix_alone_is_the_same_in_each_pass_and_a_shuffle_in_it_is_not():
    mix = functools.partial(Data.mix, weights=[1, 1])
    assert random_passes(scoped(lambda: mix([rows(2, 0), rows(2, 0)]))._stages) is None
    one, other = (scoped(lambda s=s: mix([rows(2, 0).shuffle(), rows(2, 0)]), s) for s in (0, 1))
    found = random_passes(one.epochs(2)._stages)
    assert found is not None and found[1] == range(2)
    assert found[0] != random_passes(other.epochs(2)._stages)[0]
    epochs = lambda n: Data.concat(rows(2, 0).shuffle().epochs(n))
    assert random_passes(scoped(lambda: epochs(2))._stages)[0] != random_passes(scoped(lambda: epochs(3))._stages)[0]


def test_each_epoch_counts_the_steps_of_all_sources(made):
    trainer, state = made
    train = Data.concat(rows(2, 0), rows(3, 0)).map(lambda x: (x, x)).with_loss(losses.mse)
    seen = []
    trainer.fit(state, train.epochs(2), report=each_epoch(train, lambda epoch, state: seen.append(int(state.step))))
    assert seen == [5, 10]

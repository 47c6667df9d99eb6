"""What is compiled: collectives, bytes and FLOPs for each device, donation; read from XLA's own program."""

import re

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import layers, losses, rng
from kaun._engine import StepInputs, find_step
from kaun._engine.program import count_on_device

ROWS, WIDTH = 512, 128
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SHAPE = re.compile(r"f32\[([\d,]*)\]")


class Compiled:
    """A compiled program of a trainer, ``"step"`` or ``"fit"`` in blocks, and the state for it."""

    def __init__(self, kit, name, entry="step", rows=ROWS, width=WIDTH, **options):
        self.where = kit.sharding_of(name)
        model = layers.sequential([layers.linear(width, 2 * width), layers.relu(), layers.linear(2 * width, width)])
        with rng.scope(0):
            trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-3), sharding=self.where, **options)
            self.state = trainer.init()
        x, y = np.ones((rows, width), np.float32), np.zeros((rows, width), np.float32)
        inputs = StepInputs(x, lambda output: losses.mse(output, y), None)
        carry = (self.state.vars, self.state.opt_state, self.state.step)
        leaves, structure = jax.tree.flatten(carry)
        traced = find_step(trainer._programs, structure, leaves, self.state.key, inputs, True)
        count, placing = count_on_device(1), traced.placing
        if entry == "step":
            program = traced.program("step unpacked", (False, False))
            item = inputs.leaves if placing is None else placing.put_item(inputs.leaves)
            arguments = (leaves, self.state.key, count if placing is None else placing.put_everywhere(count), item)
        else:
            program = traced.program("fit in place", (True, True))
            stacks = [np.stack([a] * traced.capacity) for a in inputs.leaves]
            arguments = (leaves, self.state.key, traced.status, count, [], stacks)
            arguments = arguments if placing is None else placing.put_block(arguments, (True, True))
        self.made = program.jitted.lower(*arguments).compile()
        self.state_bytes = sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves
        )

    @property
    def collectives(self):
        """Pairs of a kind and the sizes of what it moves, scalars left out, from the largest."""
        found = COLLECTIVE.findall(self.made.as_text())
        sizes = lambda text: [int(np.prod([int(n) for n in s.split(",")])) for s in SHAPE.findall(text) if s]
        return sorted((kind, tuple(sorted(sizes(text), reverse=True))) for text, kind in found)

    @property
    def flops(self):
        return self.made.cost_analysis()["flops"]


WEIGHTS = (2 * WIDTH * WIDTH,) * 2
BIASES = (2 * WIDTH, WIDTH)


@pytest.mark.parametrize("entry", ["fit", pytest.param("step", marks=pytest.mark.slow)])
def test_data_parallel_has_one_all_reduce_of_all_gradients(kit, entry):
    compiled = Compiled(kit, "data", entry)
    assert compiled.collectives == [("all-reduce", (*WEIGHTS, *BIASES))]
    if entry == "fit":
        assert compiled.made.memory_analysis().alias_size_in_bytes >= compiled.state_bytes


@pytest.mark.parametrize("entry", ["fit", pytest.param("step", marks=pytest.mark.slow)])
def test_gathered_fsdp_has_one_gather_and_one_reduction_for_each_weight(kit, entry):
    compiled = Compiled(kit, "gather", entry)
    found = compiled.collectives
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}
    large = [(kind, size) for kind, sizes in found for size in sizes if size > max(BIASES)]
    assert sorted(large) == [(kind, size) for kind in ("all-gather", "all-reduce") for size in WEIGHTS]
    # One reduction of all gradients. The norm of the reduced gradient, of which each device has a part, is summed after
    # it, together with the loss.
    reductions = [sizes for kind, sizes in found if kind == "all-reduce"]
    assert reductions == [(), tuple(sorted((*WEIGHTS, *BIASES), reverse=True))]


@pytest.mark.parametrize("width", [2 * WIDTH, pytest.param(WIDTH, marks=pytest.mark.slow)])
def test_where_no_update_is_looked_at_fsdp_has_one_reduction(kit, width):
    # Of a large state the next updates are proved to be finite. The norm is that of the whole gradient on each device.
    options = {} if width > WIDTH else {"on_nonfinite": "ignore"}
    found = Compiled(kit, "fsdp", "fit", width=width, **options).collectives
    gradients = (*[2 * width * width] * 2, 2 * width, width)
    assert [sizes for kind, sizes in found if kind == "all-reduce" and sizes] == [gradients]
    assert sum(kind == "all-reduce" for kind, _ in found) == 1 + (width > WIDTH)  # the other where one is looked at


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "replicas"])
def test_the_collectives_of_a_block_are_those_of_a_step(kit, name):
    # XLA combines them with other scalars in the one than in the other: what is moved counts.
    moved = [[(kind, n) for kind, sizes in Compiled(kit, name, e).collectives for n in sizes] for e in ("fit", "step")]
    assert sorted(moved[0]) == sorted(moved[1]) != []


def test_each_device_has_its_part_of_the_state_and_donates_it(kit):
    compiled = Compiled(kit, "fsdp", "fit")
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((compiled.state.vars, compiled.state.opt_state)))
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(compiled.state.vars) if leaf.size < 64)
    assert compiled.state_bytes <= whole / 8 + 3 * small + 16
    memory = compiled.made.memory_analysis()
    assert compiled.state_bytes <= memory.alias_size_in_bytes <= compiled.state_bytes + 64


@pytest.mark.parametrize(
    ("rows", "parts"),
    [(516, 4), *[pytest.param(*each, marks=pytest.mark.slow) for each in ((512, 1), (516, 1), (512, 4))]],
)
def test_the_work_is_spread_also_of_ragged_batches_and_microbatches(kit, rows, parts):
    """8 does not divide 516 rows, nor the 129 of each part."""
    one, spread = (Compiled(kit, name, rows=rows, microbatches=parts).flops for name in ("none", "data"))
    update = 60 * sum((*WEIGHTS, *BIASES))  # of Adam and of the looks at values that are not finite, on each device
    assert update < one / 8
    assert spread <= 1.3 / 8 * one + update

"""The tables of wrong calls: what they tell users to write exists, and what they call wrong does not."""

import functools
import inspect
import re

import optax
import pytest

import kaun
from kaun import averages, checkpoint, interop, layers, losses, metrics, reports, rng, sharding
from kaun._calls.refusal import _filled
from kaun._calls.renamed import ADVICE, RENAMED
from kaun._calls.texts import CALLS, FIT, STEP

MODULES = {"layers": layers, "losses": losses, "metrics": metrics, "reports": reports, "averages": averages}
MODULES |= {
    "checkpoint": checkpoint,
    "interop": interop,
    "sharding": sharding,
    "rng": rng,
    "optax": optax,
    "kaun": kaun,
}
MODULES |= {"Data": kaun.Data, "trainer": kaun.Trainer, "state": kaun.TrainState}
SAID = [
    *(_filled(text, "layers.linear", 3, "a, b") for texts in (*CALLS.values(), FIT, STEP) for text in texts.values()),
    *(text for texts in ADVICE.values() for text in texts.values()),
]
FAMILIES = {
    "layers.conv": layers.conv2d,
    "layers.recurrent": layers.lstm,
    "layers.pool": layers.max_pool2d,
    "layers.activation": layers.relu,
}
OF_A_MODULE = {"layers", "losses", "metrics", "reports"}  # entries that hold for all of their functions
FIELDS = {"optimizer", "model"}  # of a trainer, which are no attributes of its class


def test_every_name_that_a_text_tells_to_write_exists():
    found = {pair for text in SAID for pair in re.findall(r"(?<![\w.])(\w+)\.(\w+)", text) if pair[0] in MODULES}
    assert len(found) > 60
    assert not [f"{a}.{b}" for a, b in found if b not in FIELDS and not hasattr(MODULES[a], b)]


@pytest.mark.parametrize("name", [name for name in CALLS if name not in OF_A_MODULE])
def test_a_wrong_argument_is_not_one_of_the_function(name):
    function = FAMILIES.get(name)
    if function is None:
        first, *rest = name.split(".")
        function = functools.reduce(getattr, rest, MODULES.get(first) or getattr(kaun, first))
    checked = function.__init__ if inspect.isclass(function) else getattr(function, "__func__", function)
    assert hasattr(checked, "__wrapped__")
    parameters = inspect.signature(function).parameters
    taken = {name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL} - (
        {"batch_size"} if name == "Data.batches" else set()
    )
    assert not taken & CALLS[name].keys()


def test_another_librarys_name_is_not_one_of_kaun_and_stands_for_one_that_is():
    for module, table in RENAMED.items():
        assert not [new for new in table.values() if not hasattr(MODULES[module], new)]
        assert not [name for name in ADVICE.get(module, {}) if hasattr(MODULES[module], name)]

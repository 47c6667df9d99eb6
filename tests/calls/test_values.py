"""Values: assignments are refused with what to write, a copy is the same object."""

import copy
import dataclasses

import optax
import pytest

import kaun
from kaun import layers

TRAINER = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))


def test_an_assignment_to_a_trainer_names_what_to_write():
    text = (
        r"^Trainer is immutable: write trainer = dataclasses\.replace\(trainer, optimizer=\.\.\.\)\. It compiles its own "
        r"programs\.$"
    )
    with pytest.raises(AttributeError, match=text):
        TRAINER.optimizer = optax.adam(0.1)
    with pytest.raises(AttributeError, match=text):
        del TRAINER.optimizer
    other = dataclasses.replace(TRAINER, optimizer=(adam := optax.adam(0.1)))
    assert other.optimizer is adam and other.model is TRAINER.model and TRAINER.optimizer is not adam


def test_a_copy_of_a_trainer_is_the_trainer():
    assert copy.copy(TRAINER) is copy.deepcopy(TRAINER) is TRAINER

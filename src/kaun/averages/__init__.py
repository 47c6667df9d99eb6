"""Averaged weights: what ``Trainer(average=)`` keeps beside the weights that train, for evaluation.

The average lives in the optimizer's state, so checkpoints hold it, and a step that is discarded leaves it as it was.
``state.averaged`` reads it.
"""

# weights is the average in the optimizer's state, rules are the values of average=, and statistics recomputes the
# statistics of batch_norm for the averaged weights.

from typing import TYPE_CHECKING

from kaun._calls import module_names as _module_names
from kaun.averages.rules import ema as ema
from kaun.averages.rules import from_optimizer as from_optimizer
from kaun.averages.rules import swa as swa
from kaun.averages.statistics import update_statistics as update_statistics

if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = _module_names(__name__)

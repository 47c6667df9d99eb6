"""What one training step computes: pure functions of settings, carry and batch.

Read ``step`` first: forward pass, loss, gradient, update. ``settings`` has the arguments of a ``Trainer``, checked, and
``trainable``, ``precision`` with ``loss_scale``, ``microbatches``, ``window`` (of ``accumulate``) and ``penalty``
implement one each. ``nonfinite``, ``watch``, ``ranges`` and ``values`` together decide whether a step is finite, and
say why not. ``optimizer`` makes the update. ``rate`` and ``norms`` are numbers for reports: the learning rate of an
optimizer made by optax, and norms by layer.
"""

from kaun._step.evaluated import EvaluatedParams as EvaluatedParams
from kaun._step.microbatches import batch_length as batch_length
from kaun._step.model import abstract_vars as abstract_vars
from kaun._step.nonfinite import error_for as error_for
from kaun._step.nonfinite import flush_error as flush_error
from kaun._step.nonfinite import match_state as match_state
from kaun._step.nonfinite import state_paths as state_paths
from kaun._step.optimizer import Optimizer as Optimizer
from kaun._step.optimizer import learning_rate as learning_rate
from kaun._step.optimizer import state_nodes as state_nodes
from kaun._step.precision import DEFAULT_DTYPE as DEFAULT_DTYPE
from kaun._step.precision import apply_model as apply_model
from kaun._step.precision import parse_precision as parse_precision
from kaun._step.rate import Rate as Rate
from kaun._step.rate import find_rate as find_rate
from kaun._step.settings import Settings as Settings
from kaun._step.settings import make_settings as make_settings
from kaun._step.settings import shown_arguments as shown_arguments
from kaun._step.start import fresh_carry as fresh_carry
from kaun._step.start import fresh_key as fresh_key
from kaun._step.start import fresh_state as fresh_state
from kaun._step.start import placed_key as placed_key
from kaun._step.step import StepOutput as StepOutput
from kaun._step.step import eval_step as eval_step
from kaun._step.step import train_step as train_step
from kaun._step.trainable import trainable_part as trainable_part
from kaun._step.values import refused_values as refused_values
from kaun._step.watch import spoiled_leaves as spoiled_leaves
from kaun._step.window import flush_window as flush_window
from kaun._step.window import is_open as is_open
from kaun._step.window import optimizer_state as optimizer_state

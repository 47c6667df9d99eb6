"""What one training step computes: pure functions of settings, state and one batch.

Read ``step`` first: forward pass, loss, gradient and update. Each other module implements one argument of ``Trainer``.
"""

from kaun._step.loss_scale import add_loss_scale as add_loss_scale
from kaun._step.loss_scale import inner_state as inner_state
from kaun._step.loss_scale import scale_numbers as scale_numbers
from kaun._step.loss_scale import scaled_value_and_grad as scaled_value_and_grad
from kaun._step.loss_scale import watch_overflow as watch_overflow
from kaun._step.microbatches import batch_length as batch_length
from kaun._step.microbatches import check_microbatches as check_microbatches
from kaun._step.microbatches import run_in_parts as run_in_parts
from kaun._step.model import VarsSpec as VarsSpec
from kaun._step.model import abstract_vars as abstract_vars
from kaun._step.model import check_model as check_model
from kaun._step.nonfinite import check_mode as check_mode
from kaun._step.nonfinite import guard_update as guard_update
from kaun._step.nonfinite import match_state as match_state
from kaun._step.nonfinite import nonfinite_error as nonfinite_error
from kaun._step.optimizer import Optimizer as Optimizer
from kaun._step.optimizer import apply_update as apply_update
from kaun._step.optimizer import check_optimizer as check_optimizer
from kaun._step.optimizer import check_params as check_params
from kaun._step.optimizer import init_optimizer as init_optimizer
from kaun._step.optimizer import rates as rates
from kaun._step.precision import DEFAULT_DTYPE as DEFAULT_DTYPE
from kaun._step.precision import Policy as Policy
from kaun._step.precision import apply_model as apply_model
from kaun._step.precision import cast_to_compute as cast_to_compute
from kaun._step.precision import parse_precision as parse_precision
from kaun._step.trainable import Partition as Partition
from kaun._step.trainable import check_trainable as check_trainable
from kaun._step.trainable import trainable_part as trainable_part

"""kaun: a training loop for JAX that you can read as one equation and take apart at any line."""

from kaun import checkpoint as checkpoint
from kaun import grad as grad
from kaun import layers as layers
from kaun import losses as losses
from kaun import metrics as metrics
from kaun import reports as reports
from kaun import rng as rng
from kaun.context import Context as Context
from kaun.data import Data as Data
from kaun.errors import EarlyStop as EarlyStop
from kaun.errors import NonFiniteLoss as NonFiniteLoss
from kaun.layers.core import Layer as Layer
from kaun.layers.core import Vars as Vars
from kaun.state import TrainState as TrainState
from kaun.summary import summary as summary
from kaun.train import Trainer as Trainer

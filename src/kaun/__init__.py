"""kaun: a training loop for JAX that you can read as one equation and take apart at any line."""

from kaun import layers as layers
from kaun import rng as rng
from kaun.context import Context as Context
from kaun.errors import EarlyStop as EarlyStop
from kaun.layers.core import Layer as Layer
from kaun.layers.core import Vars as Vars

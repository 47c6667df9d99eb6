"""Layers: ``Layer`` and ``Vars``, composition, and the catalogue of ready-made layers.

Images are channels-last, ``[batch, height, width, channels]``, and sequences ``[batch, length, channels]``; ``[...]``
stands for any number of axes. A layer is described without weights: ``layer.init`` makes them. Layers are composed by
``first >> second``, ``sequential``, ``residual``, ``repeat`` and ``module``.
"""

# To read the code, begin with core, then containers and module, which combine layers, and linear, the simplest one.
# Layers check arguments with arguments and padding, inputs with inputs, and draw parameters with init; path is the
# place in the model for error messages.

from typing import TYPE_CHECKING

from kaun._calls import module_names as _module_names
from kaun.layers.activation import activation as activation
from kaun.layers.activation import elu as elu
from kaun.layers.activation import gelu as gelu
from kaun.layers.activation import glu as glu
from kaun.layers.activation import leaky_relu as leaky_relu
from kaun.layers.activation import log_softmax as log_softmax
from kaun.layers.activation import mish as mish
from kaun.layers.activation import relu as relu
from kaun.layers.activation import selu as selu
from kaun.layers.activation import sigmoid as sigmoid
from kaun.layers.activation import silu as silu
from kaun.layers.activation import softmax as softmax
from kaun.layers.activation import softplus as softplus
from kaun.layers.activation import swiglu as swiglu
from kaun.layers.activation import tanh as tanh
from kaun.layers.attention import multi_head_attention as multi_head_attention
from kaun.layers.containers import residual as residual
from kaun.layers.containers import sequential as sequential
from kaun.layers.conv import conv1d as conv1d
from kaun.layers.conv import conv2d as conv2d
from kaun.layers.conv import conv3d as conv3d
from kaun.layers.conv_transpose import conv_transpose1d as conv_transpose1d
from kaun.layers.conv_transpose import conv_transpose2d as conv_transpose2d
from kaun.layers.core import Float as Float
from kaun.layers.core import Int as Int
from kaun.layers.core import Layer as Layer
from kaun.layers.core import Vars as Vars
from kaun.layers.core import compose as compose
from kaun.layers.dropout import drop_path as drop_path
from kaun.layers.dropout import dropout as dropout
from kaun.layers.dropout import spatial_dropout as spatial_dropout
from kaun.layers.embedding import embedding as embedding
from kaun.layers.function import fn as fn
from kaun.layers.function import from_function as from_function
from kaun.layers.linear import linear as linear
from kaun.layers.lora import is_lora as is_lora
from kaun.layers.lora import lora as lora
from kaun.layers.lora import merge_lora as merge_lora
from kaun.layers.module import Module as Module
from kaun.layers.module import module as module
from kaun.layers.norm import batch_norm as batch_norm
from kaun.layers.norm import group_norm as group_norm
from kaun.layers.norm import instance_norm as instance_norm
from kaun.layers.norm import layer_norm as layer_norm
from kaun.layers.norm import rms_norm as rms_norm
from kaun.layers.parameter import parameter as parameter
from kaun.layers.pool import avg_pool1d as avg_pool1d
from kaun.layers.pool import avg_pool2d as avg_pool2d
from kaun.layers.pool import flatten as flatten
from kaun.layers.pool import global_avg_pool as global_avg_pool
from kaun.layers.pool import global_max_pool as global_max_pool
from kaun.layers.pool import max_pool1d as max_pool1d
from kaun.layers.pool import max_pool2d as max_pool2d
from kaun.layers.positions import positions as positions
from kaun.layers.positions import rope as rope
from kaun.layers.positions import sinusoidal_positions as sinusoidal_positions
from kaun.layers.recurrent import bidirectional as bidirectional
from kaun.layers.recurrent import gru as gru
from kaun.layers.recurrent import lstm as lstm
from kaun.layers.recurrent import rnn as rnn
from kaun.layers.remat import remat as remat
from kaun.layers.repeat import repeat as repeat
from kaun.layers.upsample import upsample2d as upsample2d

if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = _module_names(__name__)

"""Layers: the protocol, composition, and the catalogue."""

from kaun.layers.core import Float as Float
from kaun.layers.core import Int as Int
from kaun.layers.core import Layer as Layer
from kaun.layers.core import Vars as Vars
from kaun.layers.core import compose as compose
from kaun.layers.core import fn as fn
from kaun.layers.core import residual as residual
from kaun.layers.core import sequential as sequential

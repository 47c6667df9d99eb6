"""Models of other libraries as layers, and back again; weights from safetensors files."""

from kaun.interop import safetensors as safetensors
from kaun.interop.equinox import equinox as equinox
from kaun.interop.export import export as export
from kaun.interop.flax_nnx import flax_nnx as flax_nnx
from kaun.interop.haiku import haiku as haiku
from kaun.interop.linen import linen as linen

"""Models of other libraries as layers, and back again; weights from safetensors files."""

from typing import TYPE_CHECKING

from kaun._calls import module_names as _module_names
from kaun.interop import safetensors as safetensors
from kaun.interop.equinox import equinox as equinox
from kaun.interop.export import export as export
from kaun.interop.flax_nnx import flax_nnx as flax_nnx
from kaun.interop.haiku import haiku as haiku
from kaun.interop.linen import linen as linen

if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = _module_names(__name__)

"""Interop: models and weights of other libraries. Nothing of kaun imports it; it imports them when used."""

from kaun.interop import safetensors as safetensors

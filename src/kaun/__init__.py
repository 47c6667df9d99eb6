"""kaun: a training loop for JAX that you can read as one equation and take apart at any line."""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "Context", "Data", "EarlyStop", "Ensemble", "Layer", "TrainState", "Trainer", "Vars", "__version__", "averages",
    "cache", "checkpoint", "errors", "explain", "grad", "interop", "layers", "losses", "lr_range", "metrics", "reports",
    "rng", "sharding", "summary",
]  # fmt: skip

# A constant, so that it can be read without an installation; a test compares it with pyproject.toml.
__version__ = "0.1.0"

if TYPE_CHECKING:
    from kaun import averages as averages
    from kaun import checkpoint as checkpoint
    from kaun import errors as errors
    from kaun import grad as grad
    from kaun import interop as interop
    from kaun import layers as layers
    from kaun import losses as losses
    from kaun import metrics as metrics
    from kaun import reports as reports
    from kaun import rng as rng
    from kaun import sharding as sharding
    from kaun._cache import cache as cache
    from kaun.context import Context as Context
    from kaun.data import Data as Data
    from kaun.diagnose import explain as explain
    from kaun.diagnose import lr_range as lr_range
    from kaun.diagnose import summary as summary
    from kaun.ensemble import Ensemble as Ensemble
    from kaun.errors import EarlyStop as EarlyStop
    from kaun.errors import NonFiniteLoss as NonFiniteLoss
    from kaun.layers.core import Layer as Layer
    from kaun.layers.core import Vars as Vars
    from kaun.state import TrainState as TrainState
    from kaun.train import Trainer as Trainer
else:
    import sys

    # Where each name comes from, a module from itself. Nothing is imported before it is used.
    _PLACES = {
        **{name: name for name in __all__ if name[0].islower() and name[0] != "_"},
        "Context": "context",
        "Data": "data",
        "EarlyStop": "errors",
        "Ensemble": "ensemble",
        "Layer": "layers",
        "NonFiniteLoss": "errors",
        "TrainState": "state",
        "Trainer": "train",
        "Vars": "layers",
        "cache": "_cache",
        "explain": "diagnose",
        "lr_range": "diagnose",
        "summary": "diagnose",
    }

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            # `from kaun import tree` asks for a module before it imports it, and while it does.
            importing = sys._getframe(1).f_code.co_filename.startswith("<frozen importlib")
            if importing or name.startswith("_") or f"kaun.{name}" in sys.modules:
                raise AttributeError(f"module 'kaun' has no attribute {name!r}")
            with importlib.import_module("kaun._messages").frames_hidden:
                importlib.import_module("kaun._calls").refuse_name(name, __all__)
        module = importlib.import_module(f"kaun.{_PLACES[name]}")
        value = module if _PLACES[name] == name else getattr(module, name)
        return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return __all__

"""Whose code it is: a library's, or anybody else's. The name of its top-level package decides, never its folder."""

from __future__ import annotations

import sys
import types

__all__ = ["HEAP_TYPE", "is_library", "is_library_type", "root_package"]

# What these hold at module level does not change during a run, so that none of it is looked at. A package on no list
# may be the user's own, wherever it is installed: what its functions read is part of the loss.
_LIBRARIES_NAMES = """
    kaun jax jaxlib numpy scipy optax flax equinox haiku chex einops jaxtyping beartype typeguard diffrax distrax
    lineax optimistix orthax quax penzai treescope tensorflow_probability tensorflow torch torchvision keras orbax
    distreqx flowjax numpyro blackjax brax jraph rlax e3nn_jax jax_md jaxopt ott dm_pix objax trax t5x clu jmp paxml
    praxis grain datasets tensorflow_datasets ml_collections ml_dtypes safetensors transformers tokenizers
    huggingface_hub sklearn pandas polars pyarrow xarray h5py zarr matplotlib seaborn plotly PIL cv2 skimage imageio
    tqdm rich loguru wandb mlflow tensorboardX tensorboard optuna hydra omegaconf pydantic attr attrs absl tree
    wadler_lindig opt_einsum typing_extensions numba sympy networkx IPython ipykernel pytest _pytest pluggy
    hypothesis triton cloudpickle dill joblib dask ray psutil yaml toolz cytoolz sortedcontainers more_itertools
    wrapt
"""
_LIBRARIES = frozenset(_LIBRARIES_NAMES.split())


HEAP_TYPE = 1 << 9  # the flag of a class that Python code made


def is_library(name: str) -> bool:
    """Whether a module belongs to JAX's ecosystem, a library that losses are written with, or Python itself."""
    root = name.partition(".")[0]
    return root in _LIBRARIES or root in sys.stdlib_module_names


def is_library_type(kind: type) -> bool:
    """Whether a class was defined in a library."""
    name = getattr(kind, "__module__", None) or ""
    # exec without a __name__ leaves a class in "builtins".
    return is_library(name) and not (name == "builtins" and kind.__flags__ & HEAP_TYPE)


def root_package(function: types.FunctionType) -> str:
    """The top-level package of the module in which a function was defined, "" where that has no name."""
    return str(function.__globals__.get("__name__") or "").partition(".")[0]

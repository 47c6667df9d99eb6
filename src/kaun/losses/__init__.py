"""Losses: means over the elements or rows of a batch, most of them computed by optax, with shapes and dtypes checked.

Shapes must be equal: arrays are not broadcast. Dtypes must be equal: arrays are not converted, and the loss has the
same dtype. There are two exceptions, both exact: NumPy arrays are canonicalized as JAX does (float64 becomes float32
without x64), and labels that are zeros and ones, signs or counts may be bool or integer arrays.

A half-precision model with float32 targets therefore gets an error that offers both conversions. Usually the right one
is ``mse(predictions.astype(jnp.float32), targets)``: the targets stay exact, squares do not overflow float16, and the
reported loss is float32. The gradient reaches the model in the model's dtype.

Every loss takes ``weights=`` and ``where=`` (a bool mask), of the shape of the losses of the elements or of its leading
axes, and then is ``sum(weights * losses) / sum(weights)`` over what the mask keeps. What is masked, or has the weight
0, is left out: predictions and labels there may be anything, also NaN or out of range, and their gradient is 0.
If nothing is left, that is an error where the values are known; in compiled code the loss is 0, with a gradient of 0.

``losses.mse.parts(...)``, and so on, takes the same arguments and gives the two sums, a ``losses.Mean``: what a loss
returns to count by its weight, where a scalar would count by the number of examples. For half-precision outputs the
sums are float32. ``data.with_loss(losses.mse)`` uses it.

Class indices, integer labels that must be 0 or 1, float labels from 0 to 1, rows that must sum to 1 and weights are
checked where their values are known: in an eager call, also under ``jax.grad``. In compiled code they are not known.
There the loss is NaN when an index, an integer label or a weight is out of range (an index is never wrapped or
clamped), and the gradient is that of the other rows; float labels are used as they are.
"""

from typing import TYPE_CHECKING

from kaun._calls import module_names as _module_names
from kaun.losses.binary import binary_cross_entropy as binary_cross_entropy
from kaun.losses.binary import focal as focal
from kaun.losses.binary import hinge as hinge
from kaun.losses.classification import cross_entropy as cross_entropy
from kaun.losses.classification import cross_entropy_sparse as cross_entropy_sparse
from kaun.losses.classification import kl_divergence as kl_divergence
from kaun.losses.mean import Mean as Mean
from kaun.losses.mean import parts_of as parts_of
from kaun.losses.mean import row_arguments as row_arguments
from kaun.losses.regression import gaussian_nll as gaussian_nll
from kaun.losses.regression import huber as huber
from kaun.losses.regression import log_cosh as log_cosh
from kaun.losses.regression import mae as mae
from kaun.losses.regression import mse as mse
from kaun.losses.regression import poisson_nll as poisson_nll
from kaun.losses.sequence import ctc as ctc
from kaun.losses.similarity import cosine_distance as cosine_distance
from kaun.losses.similarity import info_nce as info_nce
from kaun.losses.similarity import triplet as triplet

# What users reach; parts_of and row_arguments are for kaun.data and kaun.evaluation.
__all__ = [
    "Mean", "binary_cross_entropy", "cosine_distance", "cross_entropy", "cross_entropy_sparse", "ctc", "focal",
    "gaussian_nll", "hinge", "huber", "info_nce", "kl_divergence", "log_cosh", "mae", "mse", "poisson_nll", "triplet",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = _module_names(__name__)

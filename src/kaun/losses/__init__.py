"""Losses: scalar means over the elements or rows of a batch, computed by optax, with shapes and dtypes checked.

Shapes must be equal: arrays are not broadcast. Dtypes must be equal: arrays are not converted, and the loss has the
same dtype. There are two exceptions, both exact: NumPy arrays are canonicalized as JAX does (float64 becomes float32
without x64), and labels that are zeros and ones may be bool or integer arrays.

A half-precision model with float32 targets therefore gets an error that offers both conversions. Usually the right one
is ``mse(predictions.astype(jnp.float32), targets)``: the targets stay exact, squares do not overflow float16, and the
reported loss is float32. The gradient reaches the model in the model's dtype.

Class indices, integer labels that must be 0 or 1, float labels from 0 to 1 and rows that must sum to 1 are checked
where their values are known: in an eager call, also under ``jax.grad``. In compiled code they are not known. There the
loss is NaN when an index or integer label is out of range (an index is never wrapped or clamped), and the gradient is
that of the other rows; float labels are used as they are.
"""

from kaun.losses.functions import binary_cross_entropy as binary_cross_entropy
from kaun.losses.functions import cross_entropy as cross_entropy
from kaun.losses.functions import cross_entropy_sparse as cross_entropy_sparse
from kaun.losses.functions import huber as huber
from kaun.losses.functions import mae as mae
from kaun.losses.functions import mse as mse

"""Many small models trained as one: an ``Ensemble`` is a trainer under ``jax.vmap``.

Read ``core`` first. ``step`` has what its programs compute, ``states`` how states of all members are made, and
``items`` how pipelines of the members become one.
"""

from kaun.ensemble.core import Ensemble as Ensemble

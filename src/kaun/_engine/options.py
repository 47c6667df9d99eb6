"""How XLA compiles the programs that run many steps, or many items, in one loop."""

from __future__ import annotations

import functools
from typing import Any

import jax

__all__ = ["LOOP_OPTIONS", "MEMBER_OPTIONS", "accepts_member_options"]

# XLA would move what does not depend on the item out of the loop, fuse it in another way there, and so change the last
# bit depending on whether items are stacked. The numbers must not depend on that.
LOOP_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
# XLA:CPU would give sums over few numbers of small members to a library (YNNPACK): 100 us for a sum that takes 0.7 us
# in XLA's own code (256 members, 4 rows, JAX 0.10.2).
MEMBER_OPTIONS = {**LOOP_OPTIONS, "xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def accepts_member_options() -> bool:
    """Return whether this version of XLA has all of ``MEMBER_OPTIONS``: one of them is an experimental one."""
    try:
        jax.jit(lambda: 0, compiler_options=MEMBER_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

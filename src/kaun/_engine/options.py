"""How XLA compiles the programs that run many steps, or many items, in one loop."""

from __future__ import annotations

import functools
from typing import Any

import jax

from kaun._engine.packing import MemberPacking

__all__ = ["LOOP_OPTIONS", "accepts_member_options", "member_options", "sums_members"]

# XLA would move what does not depend on the item out of the loop, fuse it in another way there, and so change the last
# bit depending on whether items are stacked. The numbers must not depend on that.
LOOP_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
# XLA:CPU would give sums over few numbers of small members to a library (YNNPACK): 100 us for a sum that takes 0.7 us
# in XLA's own code (256 members, 4 rows, JAX 0.10.2).
MEMBER_OPTIONS = {**LOOP_OPTIONS, "xla_cpu_experimental_ynn_fusion_type": ""}
# It would cut the largest operation of a step of few of them in two, for another thread: a step of 256 members of xor
# then took 46 us of CPU time, and 41 us without (two loaded cores, JAX 0.10.2).
_FEW = 1 << 16  # numbers of all members
_UNCUT = {"xla_disable_hlo_passes": f"{LOOP_OPTIONS['xla_disable_hlo_passes']},cpu-parallel-task-assigner"}


def sums_members(packing: MemberPacking | None) -> bool:
    """Return whether products of an ensemble's members are sums along the members, and its programs made for that.

    Args:
        packing: How the members are packed in a loop, None if they are not small.
    """
    return packing is not None and jax.default_backend() == "cpu" and accepts_member_options()


def member_options(packing: MemberPacking | None) -> dict[str, Any]:
    """Return how to compile the loops of an ensemble's members."""
    if packing is None or not sums_members(packing):
        return LOOP_OPTIONS
    return MEMBER_OPTIONS | _UNCUT if packing.numbers <= _FEW else MEMBER_OPTIONS


@functools.cache
def accepts_member_options() -> bool:
    """Return whether this version of XLA has all of ``MEMBER_OPTIONS``: one of them is an experimental one."""
    try:
        jax.jit(lambda: 0, compiler_options=MEMBER_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

"""How XLA compiles the programs that run many steps, or many items, in one loop."""

from __future__ import annotations

import functools
from typing import Any

import jax

from kaun._engine.jaxpr import is_heavy
from kaun._engine.packing import MemberPacking

__all__ = ["LOOP_OPTIONS", "accepts_member_options", "loop_options", "step_options", "sums_members"]

# XLA would move what does not depend on the item out of the loop, fuse it in another way there, and so change the last
# bit depending on whether items are stacked. The numbers must not depend on that.
LOOP_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
# XLA:CPU would give sums over few numbers of small members to a library (YNNPACK): 100 us for a sum that takes 0.7 us
# in XLA's own code (256 members, 4 rows, JAX 0.10.2).
MEMBER_OPTIONS = {**LOOP_OPTIONS, "xla_cpu_experimental_ynn_fusion_type": ""}
# All that XLA:CPU gives to YNNPACK by default but convolutions, which run on one core there (JAX 0.10.2): those of
# ResNet-18's 64 channels took 36 ms of one core, and take 32 ms of two together. Operations that keep all cores busy
# gain nothing from running side by side, and need more memory for it: 523 MB in ResNet-18's step instead of 317.
_HEAVY_OPTIONS = {
    **LOOP_OPTIONS,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
# It would cut the largest operation of a step of few of them in two, for another thread: a step of 256 members of xor
# then took 46 us of CPU time, and 41 us without (two loaded cores, JAX 0.10.2).
_FEW = 1 << 16  # numbers of all members
_UNCUT = {"xla_disable_hlo_passes": f"{LOOP_OPTIONS['xla_disable_hlo_passes']},cpu-parallel-task-assigner"}


def loop_options(jaxpr: Any) -> dict[str, Any]:
    """Return the options for the loops over what was traced."""
    heavy = jax.default_backend() == "cpu" and is_heavy(jaxpr) and _accepts_heavy_options()
    return _HEAVY_OPTIONS if heavy else LOOP_OPTIONS


def step_options(jaxpr: Any, packing: MemberPacking | None) -> dict[str, Any]:
    """Return the options for all programs of a step, the same: others would change its last bits.

    Args:
        jaxpr: The step as it was traced.
        packing: How an ensemble's members are packed in a loop, None if they are not small, or there are none.
    """
    if packing is None or not sums_members(packing):
        return loop_options(jaxpr)
    return MEMBER_OPTIONS | _UNCUT if packing.numbers <= _FEW else MEMBER_OPTIONS


def sums_members(packing: MemberPacking | None) -> bool:
    """Return whether products of an ensemble's members are sums along the members, and its programs made for that.

    Args:
        packing: How the members are packed in a loop, None if they are not small.
    """
    return packing is not None and jax.default_backend() == "cpu" and accepts_member_options()


@functools.cache
def accepts_member_options() -> bool:
    """Return whether this version of XLA has all of ``MEMBER_OPTIONS``: one of them is an experimental one."""
    return _accepts(MEMBER_OPTIONS)


@functools.cache
def _accepts_heavy_options() -> bool:
    return _accepts(_HEAVY_OPTIONS)


def _accepts(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

"""How XLA compiles the programs that run many steps, or many items, in one loop."""

from __future__ import annotations

import functools
from typing import Any

import jax

from kaun._engine.jaxpr import is_heavy, is_recurrent, is_tiny
from kaun._engine.packing import MemberPacking

__all__ = ["LOOP_OPTIONS", "loop_options", "step_options", "sums_members"]

# XLA would move what does not depend on the item out of the loop, fuse it in another way there, and so change the last
# bit depending on whether items are stacked. The numbers must not depend on that.
LOOP_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
# XLA:CPU would give sums over few numbers of small members to a library (YNNPACK): 100 us for a sum that takes 0.7 us
# in XLA's own code (256 members, 4 rows, JAX 0.10.2).
_MEMBER_OPTIONS = {**LOOP_OPTIONS, "xla_cpu_experimental_ynn_fusion_type": ""}
# All that XLA:CPU gives to YNNPACK by default but convolutions, which run on one core there (JAX 0.10.2): those of
# ResNet-18's 64 channels took 36 ms of one core, and take 32 ms of two together. Operations that keep all cores busy
# gain nothing from running side by side, and need more memory for it: 523 MB in ResNet-18's step instead of 317.
_HEAVY_OPTIONS = {
    **LOOP_OPTIONS,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
# YNNPACK makes the products of a recurrence on one core, whatever the number of rows, if the weight has 128 x 512
# numbers; Eigen makes them on all. A training step of an LSTM of 128 units takes 0.84 of the time (32 sequences of 64
# positions, two cores), and for 128 sequences the loops take 0.77. On one core they take 1.1 times as long.
_RECURRENT_OPTIONS = {
    **LOOP_OPTIONS,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_REDUCE",
}
_BOTH_OPTIONS = {**_HEAVY_OPTIONS, "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# XLA:CPU compiles each kernel in a context and a module made for it, in some 8 ms whatever the kernel computes. Its
# older emitters, which are gone in 0.12, make one module of all kernels: the first step of xor takes 0.43 of the CPU
# time with them (JAX 0.10.2). Taken apart for several threads, a module would give a loop other bits than its steps.
# Where arrays are larger than ``is_tiny`` allows, their kernels are slower: a step of mlp takes 1.4 times as long.
_TINY_OPTIONS = {**LOOP_OPTIONS, "xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
# It would cut the largest operation of a step of few of them in two, for another thread: a step of 256 members of xor
# then took 46 us of CPU time, and 41 us without (two loaded cores, JAX 0.10.2).
_FEW = 1 << 16  # numbers of all members
_UNCUT = {"xla_disable_hlo_passes": f"{LOOP_OPTIONS['xla_disable_hlo_passes']},cpu-parallel-task-assigner"}


def loop_options(jaxpr: Any) -> dict[str, Any]:
    """Return the options for the loops over what was traced."""
    if jax.default_backend() != "cpu":
        return LOOP_OPTIONS
    heavy = is_heavy(jaxpr) and _accepts_heavy_options()
    if is_recurrent(jaxpr) and _accepts_recurrent_options():
        return _BOTH_OPTIONS if heavy else _RECURRENT_OPTIONS
    return _HEAVY_OPTIONS if heavy else LOOP_OPTIONS


def step_options(jaxpr: Any, packing: MemberPacking | None, *, members: bool = False) -> dict[str, Any]:
    """Return the options for all programs of a step, the same: others would change its last bits.

    Args:
        jaxpr: The step as it was traced.
        packing: How an ensemble's members are packed in a loop, None if they are not small, or there are none.
        members: Whether the step is that of an ensemble.
    """
    if packing is not None and sums_members(packing):
        return _MEMBER_OPTIONS | _UNCUT if packing.numbers <= _FEW else _MEMBER_OPTIONS
    tiny = jax.default_backend() == "cpu" and not members and is_tiny(jaxpr) and _accepts_tiny_options()
    return _TINY_OPTIONS if tiny else loop_options(jaxpr)


def sums_members(packing: MemberPacking | None) -> bool:
    """Return whether products of an ensemble's members are sums along the members, and its programs made for that.

    Args:
        packing: How the members are packed in a loop, None if they are not small.
    """
    return packing is not None and jax.default_backend() == "cpu" and _accepts_member_options()


@functools.cache
def _accepts_member_options() -> bool:
    return _accepts(_MEMBER_OPTIONS)


@functools.cache
def _accepts_heavy_options() -> bool:
    return _accepts(_HEAVY_OPTIONS)


@functools.cache
def _accepts_recurrent_options() -> bool:
    return _accepts(_RECURRENT_OPTIONS)


@functools.cache
def _accepts_tiny_options() -> bool:
    return _accepts(_TINY_OPTIONS)


def _accepts(options: dict[str, Any]) -> bool:
    """Return whether this version of XLA has all of these options: some are experimental, and others old."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

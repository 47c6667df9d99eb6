"""How XLA compiles the programs that run many steps, or many items, in one loop."""

from __future__ import annotations

import functools
from typing import Any

import jax

__all__ = ["LOOP_OPTIONS", "MEMBER_OPTIONS", "TINY_OPTIONS", "accepts_member_options", "accepts_tiny_options"]

# XLA would move what does not depend on the item out of the loop, fuse it in another way there, and so change the last
# bit depending on whether items are stacked. The numbers must not depend on that.
LOOP_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
# XLA:CPU would give sums over few numbers of small members to a library (YNNPACK): 100 us for a sum that takes 0.7 us
# in XLA's own code (256 members, 4 rows, JAX 0.10.2).
MEMBER_OPTIONS = {**LOOP_OPTIONS, "xla_cpu_experimental_ynn_fusion_type": ""}

# XLA:CPU compiles each kernel in a context and a module made for it, in some 8 ms whatever the kernel computes. Its
# older emitters, which are gone in 0.12, make one module of all kernels: the first step of xor takes 0.43 of the CPU
# time with them (JAX 0.10.2). Taken apart for several threads, a module would give a loop other bits than its steps.
# Where arrays are larger than ``is_tiny`` allows, their kernels are slower: a step of mlp takes 1.4 times as long.
TINY_OPTIONS = {**LOOP_OPTIONS, "xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


@functools.cache
def accepts_member_options() -> bool:
    """Return whether this version of XLA has all of ``MEMBER_OPTIONS``: one of them is an experimental one."""
    return _accepts(MEMBER_OPTIONS)


@functools.cache
def accepts_tiny_options() -> bool:
    """Return whether this version of XLA has all of ``TINY_OPTIONS``."""
    return _accepts(TINY_OPTIONS)


def _accepts(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

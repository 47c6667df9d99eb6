"""The options with which loops are compiled: those of heavy steps."""

import jax
import jax.numpy as jnp
from jax import lax

from kaun._engine import options


def test_heavy_loops_give_no_convolution_to_ynnpack_and_take_the_order_of_least_memory(monkeypatch):
    def convolved(x, weight):
        return lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def options_for(batch):
        x, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, 32, 32, 64), (3, 3, 64, 64)))
        return options.loop_options(jax.make_jaxpr(convolved)(x, weight))

    assert options._accepts_heavy_options(), "XLA has no such option any more: see _engine/options.py"
    heavy = options_for(256)
    assert heavy["xla_cpu_scheduler_type"] == "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    assert options_for(32) is options.LOOP_OPTIONS
    args = jnp.ones((2, 8, 8, 32)), jnp.ones((3, 3, 32, 32))
    assert "ynn" not in jax.jit(convolved, compiler_options=heavy).lower(*args).compile().as_text()
    monkeypatch.setattr(options, "_accepts_heavy_options", lambda: False)
    assert options_for(256) is options.LOOP_OPTIONS

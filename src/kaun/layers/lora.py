"""Low-rank adapters for the weights of a model: ``lora``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._calls import public, shown
from kaun._messages import locate
from kaun.context import Context
from kaun.layers.arguments import positive, size
from kaun.layers.core import Layer, Vars, abstract_vars, below, block_text, keys_text, must_be_layer, short_name
from kaun.layers.path import at, here
from kaun.layers.repeat import one_copy

__all__ = ["is_lora", "lora", "merge_lora"]

# U(-1, 1) / sqrt(in), as torch.nn.Linear draws its weight, and with it the usual implementations of LoRA.
_SCALE, _MODE, _DISTRIBUTION = 1 / 3, "fan_in", "uniform"


@public
def lora(model: Layer[Any, Any], rank: int, where: Callable[[str], Any], alpha: float | None = None) -> Layer[Any, Any]:
    """Make the model with low-rank adapters of some weights (LoRA, Hu et al., 2021).

    A chosen weight ``W [..., in, out]`` is used as ``W + alpha / rank * A @ B`` with ``A [..., in, rank]`` and ``B
    [..., rank, out]``, with one product for each index of the leading axes (of convolutions, and of ``layers.repeat``).
    ``B`` starts at zero, so the output is at first that of ``model``. The sum is computed before ``model`` is applied:
    the weights of every layer can be adapted, a weight that is used twice has one adapter, and the cost is one product
    of the weight's size in each step. The memory for the optimizer's state and for the gradients of all other
    parameters is saved; the gradient of a chosen weight is computed as a whole.

    Variables: ``base`` has those of ``model``, ``adapters`` in the parameters has ``lora_a`` and ``lora_b`` under the
    path of each weight. Train them alone with ``Trainer(trainable=layers.is_lora)``.

    Args:
        model: The model, whose pretrained variables are put under ``base``.
        rank: The rank of the adapters.
        where: Whether a weight is adapted, by its path in ``model``: ``lambda path: path.endswith("q_proj.weight")``.
            It is called for every floating parameter with at least two axes, not counting the one of ``repeat``.
        alpha: The scale of the adapters is ``alpha / rank``. Default: ``rank``.

    Raises:
        TypeError: If ``model`` is not a ``Layer``, or another argument has the wrong type.
        ValueError: If ``where`` chooses no weight, or a number is not positive.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import layers
        >>> model = layers.sequential([layers.linear(8, 8), layers.tanh(), layers.linear(8, 2)])
        >>> pretrained = model.init(dtype=jnp.float32)  # or loaded from a file
        >>> adapted = layers.lora(model, 2, where=lambda path: path == "0.weight")
        >>> start = adapted.init(dtype=jnp.float32)
        >>> start = start.replace(params={**start.params, "base": pretrained.params}, state={"base": pretrained.state})
        >>> trainer = kaun.Trainer(model=adapted, optimizer=optax.adam(0.01), trainable=layers.is_lora)
        >>> state = trainer.make_state(start)
        >>> kaun.summary(trainer, jnp.ones((1, 8))).trained
        32
        >>> layers.merge_lora(adapted, state.vars).params[0]["weight"].shape
        (8, 8)
    """
    must_be_layer("lora", model)
    rank = size("lora", "rank", rank)
    scale = (rank if alpha is None else positive("lora", "alpha", alpha)) / rank
    if not callable(where):
        raise TypeError(
            f"lora(where=...) expected a function (path) -> bool, received {shown(where)}. Write "
            'where=lambda path: path.endswith("q_proj.weight").'
        )
    chosen = _chosen(model, where)
    draw = jax.nn.initializers.variance_scaling

    def init(*, dtype: Any) -> Vars:
        made, adapters = model.init(dtype=dtype), dict[str, Any]()
        leaves = tree.flatten(made.params)[0]
        for path in chosen:
            *axes, inputs, outputs = leaves[path].shape
            drawn = draw(_SCALE, _MODE, _DISTRIBUTION, batch_axis=tuple(range(len(axes))))
            a = drawn(rng.next_key(), (*axes, inputs, rank), leaves[path].dtype)
            adapters[path] = {"lora_a": a, "lora_b": jnp.zeros((*axes, rank, outputs), leaves[path].dtype)}
        return Vars(params={"base": made.params, "adapters": adapters}, state={"base": made.state}, dtype=dtype)

    return Layer(init=init, apply=_Adapted(model, scale), name=block_text("lora", [model]))


class _Adapted:
    """The forward pass of a model with adapters."""

    def __init__(self, model: Layer[Any, Any], scale: float) -> None:
        self.model, self.scale = model, scale

    def __call__(self, vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        with at("base"):
            y, after = self.model.apply(self.merged(vars), x, training=training, ctx=ctx)
        return y, vars.replace(state={"base": after.state})

    def merged(self, vars: Vars) -> Vars:
        """The variables of the model itself, with the adapters added to its weights."""
        if not isinstance(vars.params, dict) or set(cast("dict[str, Any]", vars.params)) != {"base", "adapters"}:
            raise ValueError(
                f"{here('lora')} expected variables with the params 'base' and 'adapters', received "
                f"{keys_text(vars.params)}: they belong to another model. Put those of the plain model under 'base', "
                "start.replace(params={**start.params, 'base': plain.params}, state={'base': plain.state}) with start "
                "= adapted.init()."
            )
        plain, adapters = below(vars, "base"), vars.params["adapters"]

        def added(path: str, weight: Any) -> Any:
            if path not in adapters:
                return weight  # the same array, by which frozen layers are found
            return weight + self.scale * jnp.matmul(adapters[path]["lora_a"], adapters[path]["lora_b"])

        return plain.replace(params=tree.map_with_path(added, plain.params))


@public
def is_lora(path: str) -> bool:
    """Return whether a path is that of an adapter of ``layers.lora``, for ``Trainer(trainable=layers.is_lora)``.

    Args:
        path: The path of a parameter.

    Raises:
        TypeError: If it is not a string.

    Examples:
        >>> from kaun import layers
        >>> layers.is_lora("adapters.0.weight.lora_a"), layers.is_lora("base.0.weight")
        (True, False)
    """
    if not isinstance(path, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"is_lora expected the path of a parameter, received {shown(path)}. Write "
            "Trainer(trainable=layers.is_lora)."
        )
    return path.rpartition(".")[2] in ("lora_a", "lora_b")


@public
def merge_lora(model: Layer[Any, Any], vars: Vars) -> Vars:
    """Return variables of the plain model: its weights with the adapters added to them.

    Args:
        model: What ``layers.lora`` returned.
        vars: Its variables, such as a trainer's ``state.vars``.

    Raises:
        TypeError: If ``model`` was not made by ``layers.lora``, or ``vars`` is not a ``Vars``.
        ValueError: If the variables belong to another model.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> model = layers.linear(4, 2)
        >>> adapted = layers.lora(model, 1, where=lambda path: path == "weight")
        >>> plain = layers.merge_lora(adapted, adapted.init(dtype=jnp.float32))
        >>> sorted(plain.params)
        ['bias', 'weight']
    """
    apply = model._apply if isinstance(model, Layer) else None  # pyright: ignore
    if not isinstance(apply, _Adapted):
        received = short_name(model) if isinstance(model, Layer) else repr(model)  # pyright: ignore
        raise TypeError(
            f"merge_lora expected the model that layers.lora returned, received {received}. Write "
            "merge_lora(trainer.model, state.vars)."
        )
    if not isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"merge_lora expected kaun.Vars, received {type(vars).__name__}. Write "
            "merge_lora(trainer.model, state.vars)."
        )
    return apply.merged(vars)


def _chosen(model: Layer[Any, Any], where: Callable[[str], Any]) -> list[str]:
    """The paths of the weights for which ``where`` is true."""
    with one_copy():  # in which the vectors of a layer under repeat are vectors
        leaves = tree.flatten(abstract_vars(model, jnp.float32).params)[0]
    weights = [path for path, leaf in leaves.items() if leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not weights:
        raise ValueError(
            f"lora expected a model with weights of two or more axes, {short_name(model)} has none. Write lora(model, "
            "...) around layers such as layers.linear."
        )
    chosen = [path for path in weights if where(path)]
    if not chosen:
        fix = f'where=lambda path: path == "{weights[-1]}"'
        raise ValueError(tree.false_for_all("lora(where=...)", "weights", locate(where), weights, fix))
    return chosen

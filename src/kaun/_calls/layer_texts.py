"""What to write in place of a call of a layer whose arguments Python refuses, as in ``texts``."""

from __future__ import annotations

__all__ = ["DEVICE", "LAYERS"]

DEVICE = "arrays lie on JAX's default device. Write Trainer(..., sharding=sharding.data_parallel()) for several"
_NORM = {
    "affine": "scale and shift are parameters always. Leave it out, or Trainer(..., trainable=) freezes them",
    "epsilon": "write eps={value}",
}
_BATCH_FIRST = "x is [batch, length, channels] always. Leave it out"

LAYERS: dict[str, dict[str, str]] = {
    "layers": {
        "activation": "an activation is a layer. Write layers.sequential([{name}(...), {layer}])",
        "use_bias": "write bias={value}",
        "name": 'layers have no names of their own. Write layers.sequential({{"hidden": a, "out": b}}) for paths',
        "dtype": "the variables have it. Write trainer.init(dtype={value})",
        "device": DEVICE,
        "training train deterministic": "the mode says it: fit trains, predict and evaluate do not. Leave it out",
        "rngs key": "keys are those of the RNG scope. Write with rng.scope(42): around trainer.init()",
    },
    "layers.sequential": {
        "": "the layers are one list. Write layers.sequential([a, b])",
        "name": "layers have no names of their own. Write layers.sequential({{\"hidden\": a, \"out\": b}}) for paths",
    },
    "layers.linear": {
        "": "it takes both sizes. Write layers.linear(in_features, out_features)",
        "units features": "it takes both sizes. Write layers.linear(in_features, {value})",
        "input_shape": "it takes both sizes. Write layers.linear(in_features, out_features)",
        "input_dim": "it takes both sizes. Write layers.linear({value}, out_features)",
        "in_dim": "write in_features={value}",
        "out_dim": "write out_features={value}",
        "kernel_initializer kernel_init": "write weight_init=, one of jax.nn.initializers",
        "kernel_regularizer": "the trainer has it. Write Trainer(..., penalty=f), with f a function of the parameters",
    },
    "layers.dropout": {
        "": "it takes the rate. Write {name}(0.1)",
        "p drop_rate drop_prob": "write rate={value}, or {name}({value})",
    },
    "layers.embedding": {
        "": "it takes both sizes. Write layers.embedding(vocab_size, embed_dim)",
        "num_embeddings input_dim": "write vocab_size={value}",
        "embedding_dim output_dim features": "write embed_dim={value}",
        "padding_idx": "mask the loss instead. Write losses.cross_entropy_sparse(..., ignore_index={value})",
    },
    "layers.conv": {
        "": "it takes both numbers of channels. Write {name}(in_channels, out_channels, kernel_size=3)",
        "filters features": "it takes both numbers of channels. Write {name}(in_channels, {value})",
        "strides": "write stride={value}",
        "dilation_rate": "write dilation={value}",
        "data_format": "data are channels-last, [batch, ..., channels]. Write jnp.moveaxis(x, 1, -1) for data of "
        "PyTorch's layout",
        "padding_mode": "padding is with zeros. Pad x with jnp.pad in layers.fn",
    },
    "layers.batch_norm": {
        "": "it takes the number of features. Write layers.batch_norm(num_features)",
        **_NORM,
        "use_running_average": "the mode says it: fit trains, predict and evaluate do not. Leave it out",
    },
    "layers.lora": {"r": "write rank={value}"},
    "layers.upsample2d": {"scale_factor": "write scale={value}"},
    "layers.group_norm": _NORM,
    "layers.instance_norm": {
        "": "it takes the number of channels. Write layers.instance_norm(num_channels)",
        "num_features": "write num_channels={value}",
        **_NORM,
    },
    "layers.layer_norm": {
        "": "it takes the size of the last axis. Write {name}(dim)",
        "normalized_shape": "write dim={value}",
        "epsilon": "write eps={value}",
    },
    "layers.recurrent": {
        "": "it takes both sizes. Write {name}(in_features, hidden)",
        "input_size": "write in_features={value}",
        "hidden_size": "write hidden={value}",
        "units": "it takes both sizes. Write {name}(in_features, {value})",
        "batch_first": _BATCH_FIRST,
        "return_sequences": "it returns all steps. For the last one write {name}(...) >> "
        "layers.fn(lambda y: y[:, -1]), and of padded rows take the state, return_state=True",
        "num_layers": "write layers.sequential([{name}(...), {name}(...)])",
        "bidirectional": "write layers.bidirectional({name}(...))",
    },
    "layers.multi_head_attention": {
        "": "it takes the size and the heads. Write layers.multi_head_attention(embed_dim, num_heads)",
        "dim d_model": "write embed_dim={value}",
        "key_dim": "write head_dim={value}",
        "batch_first": _BATCH_FIRST,
        "causal": "write is_causal={value}",
        "mask": 'the Context has it. Write ctx=Context(attention_mask=mask)',
    },
    "layers.pool": {
        "": "it takes the size of the window. Write {name}(2)",
        "pool_size": "write kernel_size={value}",
        "strides": "write stride={value}",
    },
    "layers.activation": {
        "": "it makes a layer, and the model applies it. Write layers.sequential([..., {name}()]), or jax.nn on arrays",
        "inplace": "nothing is in place. Leave it out",
        "dim axis": "it is the last axis. Leave it out",
        "negative_slope": "write layers.leaky_relu(slope={value})",
    },
}  # fmt: skip
"""By function; ``layers`` stands for all of them, ``layers.conv`` and the like for a family."""

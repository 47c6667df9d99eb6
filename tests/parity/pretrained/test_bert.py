"""BERT of examples/models/bert.py against transformers: random small models, read from folders as those of the hub."""

import numpy as np
import pytest

import kaun
from kaun import losses


@pytest.mark.parametrize(
    ("num_attention_heads", "num_hidden_layers", "layer_norm_eps"), [(2, 2, 1e-12), (3, 1, 0.01)], ids=["two", "three"]
)
def test_bert_for_masked_lm(family, record, same_training_step, num_attention_heads, num_hidden_layers, layer_norm_eps):
    bert, hub = family("bert"), record.transformers
    record.torch.manual_seed(0)
    sizes = {
        "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "max_position_embeddings": 15,
        "num_attention_heads": num_attention_heads, "num_hidden_layers": num_hidden_layers,
        "layer_norm_eps": layer_norm_eps,
    }  # fmt: skip
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    reference = hub.BertForMaskedLM(hub.BertConfig(**sizes, **rates))
    random = np.random.RandomState(0)
    tokens, types = random.randint(1, 23, (3, 11)).astype(np.int32), random.randint(0, 2, (3, 11)).astype(np.int32)
    tokens[0, 7:], tokens[1, 1:] = 0, 0
    chosen = (random.random_sample(tokens.shape) < 0.5) & (tokens != 0)
    aims = random.randint(0, 23, tokens.shape).astype(np.int32)
    model = bert.make_model(**sizes)

    def apply(vars, x, *, training, ctx):
        return model.apply(vars, x[0], training=training, ctx=ctx.set("token_types", x[1]))

    still = same_training_step(
        kaun.Layer(init=lambda *, dtype: model.init(dtype=dtype), apply=apply, name="with token types"),
        (tokens, types),
        lambda y: losses.cross_entropy_sparse(y, aims, where=chosen),
        reference,
        {
            "input_ids": tokens, "token_type_ids": types, "attention_mask": (tokens != 0).astype(np.int64),
            "labels": np.where(chosen, aims, -100).astype(np.int64),
        },
        bert.MAPPING,
    )  # fmt: skip
    assert not still

"""T5 of examples/models/t5.py against transformers: random small models, read from folders as those of the hub."""

import numpy as np
import pytest

from kaun import losses

SIZES = {"vocab_size": 23, "d_model": 12, "d_ff": 20, "num_heads": 2, "relative_attention_max_distance": 20}


@pytest.mark.parametrize(
    ("sizes", "gated", "tied"),
    [
        ({"d_kv": 6, "num_layers": 2}, False, True),
        ({"d_kv": 5, "num_layers": 1, "num_decoder_layers": 2, "relative_attention_num_buckets": 8}, True, False),
    ],
    ids=["t5", "t5 1.1"],
)
def test_t5_for_conditional_generation(family, record, same_training_step, sizes, gated, tied):
    t5, sizes = family("t5"), SIZES | sizes
    torch, hub = record.torch, record.transformers
    torch.manual_seed(0)
    kind = "gated-gelu" if gated else "relu"
    reference = hub.T5ForConditionalGeneration(
        hub.T5Config(
            **sizes, feed_forward_proj=kind, tie_word_embeddings=tied, dropout_rate=0.0, decoder_start_token_id=0
        )
    )
    if not tied:  # transformers ties them in new models, but not in those that it reads from the hub
        reference.lm_head.weight = torch.nn.Parameter(torch.randn_like(reference.lm_head.weight))
    random = np.random.RandomState(0)
    tokens, labels = random.randint(1, 23, (3, 26)), random.randint(1, 23, (3, 30))
    tokens[0, 9:], tokens[1, 1:], labels[2, 4:] = 0, 0, -100

    answers = np.where(labels == -100, 0, labels).astype(np.int32)
    model = t5.make_model(**sizes, gated=gated, tied=tied)
    still = same_training_step(
        model,
        (tokens.astype(np.int32), t5.shifted(answers)),
        lambda y: losses.cross_entropy_sparse(y, answers, where=labels != -100),
        reference,
        {"input_ids": tokens, "attention_mask": (tokens != 0).astype(np.int64), "labels": labels},
        t5.TIED if tied else t5.UNTIED,
    )
    assert not still


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 20), (64, 1000)])
def test_distances_have_the_numbers_of_transformers(family, record, count, furthest):
    torch, attention = record.torch, record.transformers.models.t5.modeling_t5.T5Attention
    distance = torch.arange(700)[None, :] - torch.arange(700)[:, None]
    for both in (True, False):
        theirs = attention._relative_position_bucket(distance, both, count, furthest)
        assert np.array_equal(family("t5").buckets(700, both=both, count=count, furthest=furthest), theirs.numpy())

"""ViT of examples/models/vit.py against transformers: random small models, read from folders as those of the hub."""

import numpy as np
import pytest

from kaun import losses


@pytest.mark.parametrize(
    ("image_size", "patch_size", "num_channels", "num_attention_heads", "num_hidden_layers"),
    [(8, 2, 1, 2, 2), (12, 4, 3, 3, 1)],
    ids=["grey", "colours"],
)
def test_vit_for_image_classification(
    family, record, same_training_step, image_size, patch_size, num_channels, num_attention_heads, num_hidden_layers
):
    vit, hub = family("vit"), record.transformers
    record.torch.manual_seed(0)
    sizes = {
        "image_size": image_size, "patch_size": patch_size, "num_channels": num_channels, "hidden_size": 12,
        "intermediate_size": 20, "num_attention_heads": num_attention_heads, "num_hidden_layers": num_hidden_layers,
        "num_labels": 5,
    }  # fmt: skip
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    reference = hub.ViTForImageClassification(hub.ViTConfig(**sizes, **rates))
    random = np.random.RandomState(0)
    images = random.normal(size=(4, image_size, image_size, num_channels)).astype(np.float32)
    labels = random.randint(0, 5, 4)
    still = same_training_step(
        vit.make_model(**sizes),
        images,
        lambda y: losses.cross_entropy_sparse(y, labels.astype(np.int32)),
        reference,
        {"pixel_values": images.transpose(0, 3, 1, 2).copy(), "labels": labels},
        vit.MAPPING,
    )
    assert not still

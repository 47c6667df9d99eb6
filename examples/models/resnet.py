"""ResNet-18 (He, Zhang, Ren and Sun, 2016), with weights from a hub folder, or a small one trained to read digits.

Run it with: python examples/models/resnet.py            (a minute; needs pip install ".[examples]")
         or: python examples/models/resnet.py --folder some/resnet-18    (config.json and model.safetensors, as on the
                                                                          hub: prints its classes and parameters)
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kaun
from kaun import Data, layers, losses, metrics, rng
from kaun.interop import safetensors
from kaun.interop.safetensors import drop, rename, transpose

# From the names of the hub to the paths below.
LAYER = "resnet.encoder.stages.{s}.layers.{i}"
MAPPING = [
    drop("{*x}.num_batches_tracked"),
    rename("resnet.embedder.embedder.{part}.{x}", "stem.{part}.{x}"),
    rename(f"{LAYER}.layer.0.{{part}}.{{x}}", "stages.{s}.{i}.first.{part}.{x}"),
    rename(f"{LAYER}.layer.1.{{part}}.{{x}}", "stages.{s}.{i}.second.{part}.{x}"),
    rename(f"{LAYER}.shortcut.{{part}}.{{x}}", "stages.{s}.{i}.shortcut.{part}.{x}"),
    rename("classifier.1.{x}", "head.{x}"),
    transpose("{*x}.convolution.weight", (2, 3, 1, 0)),  # OIHW to HWIO
    transpose("head.weight"),
]


def normalized(inputs, outputs, kernel, stride, *, momentum):
    """Make a convolution without bias, padded by half the kernel, and its batch_norm."""
    he = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    convolution = layers.conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False, weight_init=he)
    return layers.sequential({"convolution": convolution, "normalization": layers.batch_norm(outputs, momentum)})


def basic(inputs, outputs, stride, *, momentum):
    """Make a residual block of two convolutions; its shortcut has one where the shape changes."""
    parts = {
        "first": normalized(inputs, outputs, 3, stride, momentum=momentum),
        "second": normalized(outputs, outputs, 3, 1, momentum=momentum),
    }
    if inputs != outputs or stride != 1:
        parts["shortcut"] = normalized(inputs, outputs, 1, stride, momentum=momentum)

    def forward(m, x):
        y = m.second(jax.nn.relu(m.first(x)))
        return jax.nn.relu(y + (m.shortcut(x) if "shortcut" in parts else x))

    return layers.module(parts, forward, name="basic")


def make_model(
    *, stages=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem="imagenet", in_channels=3, classes=1000, momentum=0.9
):
    """Make the model: from images ``[batch, height, width, in_channels]`` to the logits ``[batch, classes]``.

    ``stages`` has the blocks of each stage, (3, 4, 6, 3) for ResNet-34; every stage but the first halves the image. The
    stem ``"imagenet"``, for 224 x 224, makes it four times smaller before them; ``"cifar"``, for 32 x 32, does not.
    """
    blocks, before = [], widths[0]
    for number, (depth, width) in enumerate(zip(stages, widths, strict=True)):
        strides = [1 if number == 0 else 2, *[1] * (depth - 1)]
        inputs = [before, *[width] * (depth - 1)]
        made = [basic(i, width, s, momentum=momentum) for i, s in zip(inputs, strides, strict=True)]
        blocks.append(layers.sequential(made))
        before = width
    large = stem == "imagenet"
    parts = {
        "stem": normalized(in_channels, widths[0], 7 if large else 3, 2 if large else 1, momentum=momentum),
        "shrink": layers.max_pool2d(3, stride=2, padding=1) if large else layers.fn(lambda x: x, name="unchanged"),
        "stages": layers.sequential(blocks),
        "pool": layers.global_avg_pool(),
        "head": layers.linear(widths[-1], classes),
    }
    forward = lambda m, x: m.head(m.pool(m.stages(m.shrink(jax.nn.relu(m.stem(x))))))
    return layers.module(parts, forward, name="resnet")


def read(folder):
    """Return the model of a hub folder, and its variables."""
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["layer_type"] != "basic" or config["embedding_size"] != config["hidden_sizes"][0]:
        raise ValueError("This example has only the blocks of ResNet-18 and 34; the folder's config.json has others.")
    sizes = {"stages": tuple(config["depths"]), "widths": tuple(config["hidden_sizes"])}
    model = make_model(**sizes, in_channels=config["num_channels"], classes=len(config["id2label"]))
    return model, safetensors.into(model.init(dtype=jnp.float32), safetensors.load(folder), MAPPING)


def main(*, folder=None, epochs=6, stages=(1, 1), widths=(16, 32), seed=0):
    if folder is not None:
        model, variables = read(folder)
        trainer = kaun.Trainer(model=model, optimizer=optax.identity())
        state = trainer.make_state(variables)
        logits = trainer.predict(state, np.zeros((1, 224, 224, 3), np.float32))
        count = sum(a.size for a in jax.tree.leaves(variables.params))
        print(f"{logits.shape[1]} classes, {count:,} parameters.")
        return trainer, state, None, None

    digits = load_digits()
    images, labels = (digits.images[..., None] / 8 - 1).astype(np.float32), digits.target.astype(np.int32)
    images, test, labels, test_labels = train_test_split(images, labels, stratify=labels, random_state=0)
    with rng.scope(seed):
        train = Data.batches((images, labels), 64, shuffle=True, drop_last=True).with_loss(losses.cross_entropy_sparse)
        model = make_model(stages=stages, widths=widths, stem="cifar", in_channels=1, classes=10)
        schedule = optax.cosine_decay_schedule(0.1, decay_steps=epochs * len(train))
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(schedule, momentum=0.9, nesterov=True))
        state = trainer.init(dtype=jnp.float32)
    history = kaun.reports.history()
    state = trainer.fit(state, train.epochs(epochs), report=history)

    scores = trainer.evaluate(state, Data.batches((test, test_labels), 150), {"accuracy": metrics.accuracy})
    print(f"{scores['accuracy']:.1%} of the {len(test)} test images are read correctly.")
    return trainer, state, history, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="ResNet: train a small one, or load one from a hub folder.")
    parser.add_argument("--folder", help="a hub folder with config.json and model.safetensors")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images (default 6)")
    main(**vars(parser.parse_args()))

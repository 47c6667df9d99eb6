"""GPT (Radford et al., 2019): GPT-2 with weights of the hub, or nanoGPT's form trained on Python's help texts.

Run it with: python examples/models/gpt.py                      (a minute: trains a small model, then generates text)
         or: python examples/models/gpt.py --steps 1000
         or: python examples/models/gpt.py --folder some/gpt2   (config.json, model.safetensors and tokenizer.json, as
                                                                 on the hub; needs pip install tokenizers)
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, rng
from kaun.interop import safetensors
from kaun.interop.safetensors import drop, rename, split

# From the names of the hub to the paths below. Weights of GPT-2 are already [in, out]; q, k and v share one matrix.
QKV = ["h.{i}.attn.q_proj.{x}", "h.{i}.attn.k_proj.{x}", "h.{i}.attn.v_proj.{x}"]
MAPPING = [
    rename("transformer.{*x}", "{*x}"),  # some files have this prefix
    drop("h.{i}.attn.bias"),  # some files also contain the causal mask
    drop("lm_head.weight"),  # the same array as wte
    split("h.{i}.attn.c_attn.{x}", QKV, axis=-1),
    rename("h.{i}.attn.c_proj.{x}", "h.{i}.attn.out_proj.{x}"),
]

TEXT = "\n\n".join(topics.values())
SIZES = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "layer_norm_epsilon")
GELU = {"gelu_new": True, "gelu": False}  # the hub's name: whether it is computed with tanh
NANO = {  # nanoGPT's setting for a CPU, on bytes
    "vocab_size": 256, "n_positions": 64, "n_embd": 128, "n_head": 4, "n_layer": 4, "bias": False, "approximate": False,
}  # fmt: skip


def make_model(
    *, vocab_size=50257, n_positions=1024, n_embd=768, n_head=12, n_layer=12, layer_norm_epsilon=1e-5, bias=True,
    approximate=True,
):  # fmt: skip
    """Make the model without dropout: from tokens [batch, length] to next-token logits [batch, length, vocab_size].

    ``bias`` says whether norms and linear layers have biases, ``approximate`` whether gelu is computed with tanh.
    """
    small = jax.nn.initializers.normal(0.02)

    def norm():
        return layers.layer_norm(n_embd, layer_norm_epsilon, bias=bias)

    def linear(inputs, outputs):
        return layers.linear(inputs, outputs, bias=bias, weight_init=small)

    def block():
        mlp = {
            "c_fc": linear(n_embd, 4 * n_embd),
            "act": layers.gelu(approximate),
            "c_proj": linear(4 * n_embd, n_embd),
        }
        parts = {
            "ln_1": norm(),
            "attn": layers.multi_head_attention(n_embd, n_head, is_causal=True, bias=bias, weight_init=small),
            "ln_2": norm(),
            "mlp": layers.sequential(mlp),
        }

        def forward(m, x):
            x = x + m.attn(m.ln_1(x))
            return x + m.mlp(m.ln_2(x))

        return layers.module(parts, forward, name="block")

    parts = {
        "wte": layers.embedding(vocab_size, n_embd, scale=False, weight_init=small),
        "wpe": layers.positions(n_positions, n_embd),
        "h": layers.sequential([block() for _ in range(n_layer)]),
        "ln_f": norm(),
    }

    def forward(m, tokens):
        x = m.ln_f(m.h(m.wpe(m.wte(tokens))))
        return x @ m.params["wte"]["weight"].T  # the head shares the embedding's array, so there is one gradient

    return layers.module(parts, forward, name="gpt")


def read(folder):
    """Return the model of a hub folder, and its variables."""
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["activation_function"] not in GELU or config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError("This example has only gelu and GPT-2's widths; the folder's config.json has others.")
    model = make_model(**{key: config[key] for key in SIZES}, approximate=GELU[config["activation_function"]])
    return model, safetensors.into(model.init(dtype=jnp.float32), safetensors.load(folder), MAPPING)


def write(trainer, state, tokens, *, count):
    """Return the tokens and ``count`` more by greedy decoding. Their total must not exceed n_positions."""
    # The window has the final size, so that predict compiles once. Values after the last token have no effect.
    window = np.zeros((1, len(tokens) + count), np.int32)
    window[0, : len(tokens)] = tokens
    for end in range(len(tokens), window.shape[1]):
        window[0, end] = np.argmax(trainer.predict(state, window)[0, end - 1])
    return window[0].tolist()


def make_batches(text, *, window, batch_size=12):
    """Make batches of byte windows from random positions in a text, each with its window shifted by one."""
    text = np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def cut(starts):
        pieces = text[starts[:, np.newaxis] + np.arange(window + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    return Data.batches(np.arange(len(text) - window), batch_size, shuffle=True).map(cut)


def main(*, steps=500, folder=None, prompt="The ", count=40, seed=0, text=TEXT, **sizes):
    if folder is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        model, variables = read(folder)
        trainer = kaun.Trainer(model=model, optimizer=optax.identity())
        state = trainer.make_state(variables)
        print(tokenizer.decode(write(trainer, state, tokenizer.encode(prompt).ids, count=count)))
        return trainer, state

    sizes = NANO | sizes
    with rng.scope(seed):
        train = make_batches(text, window=sizes["n_positions"]).take(steps).with_loss(losses.cross_entropy_sparse)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.003, warmup_steps=steps // 10, decay_steps=steps)
        trainer = kaun.Trainer(model=make_model(**sizes), optimizer=optax.adamw(schedule))
        state = trainer.init(dtype=jnp.float32)
    history = kaun.reports.history()
    state = trainer.fit(state, train, report=kaun.reports.all_of(history, kaun.reports.progress()))
    written = bytes(write(trainer, state, list(prompt.encode()), count=count)).decode(errors="replace")
    print(written)
    return trainer, state, history.losses, written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GPT: train a small model, or load one from a hub folder.")
    parser.add_argument("--steps", type=int, default=500, help="training steps (default 500)")
    parser.add_argument("--folder", help="a hub folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("--prompt", default="The ", help="the text to continue (default 'The ')")
    parser.add_argument("--count", type=int, default=40, help="tokens to generate (default 40)")
    main(**vars(parser.parse_args()))

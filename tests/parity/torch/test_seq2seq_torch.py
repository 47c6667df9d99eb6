"""The translator of examples/models/seq2seq.py, and torch.nn.LSTM on packed sequences."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import Context, losses  # noqa: E402

NAMES = {"params.words.weight": "words.weight", "params.symbols.weight": "symbols.weight"}
NAMES |= {f"params.head.{x}": f"head.{x}" for x in ("weight", "bias")}
NAMES |= {
    f"params.{part}.{x}": f"{part}.{x}_l0"
    for part in ("encoder", "decoder")
    for x in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
}


class Translator(torch.nn.Module):
    def __init__(self, words, symbols, width, hidden):
        super().__init__()
        self.words, self.symbols = torch.nn.Embedding(words, width), torch.nn.Embedding(symbols, width)
        self.encoder = torch.nn.LSTM(width, hidden, batch_first=True)
        self.decoder = torch.nn.LSTM(width, hidden, batch_first=True)
        self.head = torch.nn.Linear(hidden, symbols)

    def forward(self, source, lengths, target):
        packed = torch.nn.utils.rnn.pack_padded_sequence(self.words(source), lengths, True, enforce_sorted=False)
        return self.head(self.decoder(self.symbols(target), self.encoder(packed)[1])[0])


def test_logits_and_a_step(family, same_step):
    seq2seq = family("seq2seq")
    sizes = seq2seq.SIZES | {"width": 6, "hidden": 9}
    batch = seq2seq.make_data([7, 42, 905, 110, 999])
    x, y, ctx = seq2seq.make_item(batch)
    loss = functools.partial(losses.cross_entropy_sparse, indices=y, ignore_index=seq2seq.PAD)
    tensors = {key: torch.from_numpy(np.asarray(a, np.int64)) for key, a in batch.items()}

    def theirs(module, _):
        logits = module(tensors["words"], tensors["lengths"], tensors["symbols"][:, :-1])
        targets = tensors["symbols"][:, 1:]
        return [logits], torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=seq2seq.PAD)

    assert isinstance(ctx, Context)
    same_step(seq2seq.make_model(**sizes), Translator(**sizes), NAMES, (x, loss, ctx), theirs)

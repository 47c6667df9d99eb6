"""PyTorch, eager: ``zero_grad``, ``backward``, ``step``."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench import networks
from bench.runners import Session, by_hand
from bench.workloads import HEADS, WIDTH, Workload


def tensor(values):
    return torch.from_numpy(np.array(values))


def parameter(values):
    return nn.Parameter(tensor(values))


def linear(values):
    made = nn.Linear(*values["weight"].shape, device="meta")
    made.weight, made.bias = parameter(values["weight"].T), parameter(values["bias"])
    return made


def conv(values):
    out, into = values["weight"].shape[:2]
    made = nn.Conv2d(into, out, 3, padding=1, device="meta")
    made.weight, made.bias = parameter(values["weight"]), parameter(values["bias"])
    return made


def norm(values):
    made = nn.LayerNorm(WIDTH, device="meta")
    made.weight, made.bias = parameter(values["weight"]), parameter(values["bias"])
    return made


def dense(workload: Workload):
    activation = nn.Tanh if workload.binary else nn.ReLU
    stack = [part for values in workload.weights() for part in (linear(values), activation())]
    return nn.Sequential(*stack[:-1])


def cnn(workload: Workload):
    a, b, c, d = by_hand.channels_first(workload.weights())
    convolutions = [conv(a), nn.ReLU(), nn.MaxPool2d(2), conv(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), linear(c), nn.ReLU(), linear(d))


class Block(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.norm1, self.norm2 = norm(values["norm1"]), norm(values["norm2"])
        self.up, self.down = linear(values["up"]), linear(values["down"])
        self.q, self.k, self.v, self.out = (parameter(values[key].T) for key in ("q", "k", "v", "out"))

    def forward(self, x):
        h, shape = self.norm1(x), (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (functional.linear(h, w).view(shape).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + functional.linear(y.transpose(1, 2).reshape(x.shape), self.out)
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, workload):
        super().__init__()
        w = workload.weights()
        self.tokens = nn.Embedding.from_pretrained(tensor(w["tokens"]), freeze=False)
        self.positions = parameter(w["positions"])
        self.blocks = nn.Sequential(*map(Block, w["blocks"]))
        self.norm, self.head = norm(w["norm"]), linear(w["head"])

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))


def made(workload: Workload):
    if workload.model in networks.NAMES:
        return networks.module(workload.model).torch(workload.weights())
    return {"dense": dense, "cnn": cnn, "gpt": GPT}[workload.model](workload)


def session(workload: Workload) -> Session:
    model = made(workload)
    optimizer = torch.optim.Adam(model.parameters(), lr=workload.rate)
    x, y = by_hand.data_of(workload)
    x = x.transpose(0, 3, 1, 2).copy() if workload.model == "resnet" else x
    # Class indices are int64 in PyTorch.
    x, y = tensor(x), tensor(y) if workload.binary else tensor(y).long()
    order = [torch.from_numpy(rows) for rows in workload.order()]

    def loss(x, y):
        output = model(x)
        if workload.binary:
            return functional.binary_cross_entropy_with_logits(output, y)
        return functional.cross_entropy(output.flatten(0, -2), y.flatten())

    def run(steps):
        for a, b in workload.batches(x, y, order[:steps]):
            optimizer.zero_grad()
            loss(a, b).backward()
            optimizer.step()

    def check():
        with torch.no_grad():
            return loss(x[: workload.batch], y[: workload.batch]).item()

    return Session(run, check)

"""The U-Net of examples/models/unet.py, and the same in PyTorch."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import losses  # noqa: E402

nn = torch.nn


class BatchNorm(nn.BatchNorm2d):
    """PyTorch's in training, with the biased variance as the running one."""

    def forward(self, x):
        with torch.no_grad():
            moments = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            for running, batch in zip((self.running_mean, self.running_var), moments, strict=True):
                running.lerp_(batch, self.momentum)
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def double(i, o):
    parts = [nn.Conv2d(i, o, 3, padding=1, bias=False), BatchNorm(o), nn.ReLU()]
    return nn.Sequential(*parts, nn.Conv2d(o, o, 3, padding=1, bias=False), BatchNorm(o), nn.ReLU())


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([double(2, 4), double(4, 6)])
        self.bottom = double(6, 8)
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 2, stride=2)])
        self.merge = nn.ModuleList([double(12, 6), double(8, 4)])
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        first = self.down[0](x)
        second = self.down[1](nn.functional.max_pool2d(first, 2))
        x = self.bottom(nn.functional.max_pool2d(second, 2))
        x = self.merge[0](torch.cat([second, self.up[0](x)], dim=1))
        return self.head(self.merge[1](torch.cat([first, self.up[1](x)], dim=1)))


def names():
    blocks = ["down.0", "down.1", "bottom", "merge.0", "merge.1"]
    paths = [f"params.{b}.{i}.weight" for b in blocks for i in (0, 1, 3, 4)]
    paths += [f"params.{b}.{i}.bias" for b in blocks for i in (1, 4)]
    paths += [f"state.{b}.{i}.running_{x}" for b in blocks for i in (1, 4) for x in ("mean", "var")]
    paths += [f"params.{part}.{x}" for part in ("up.0", "up.1", "head") for x in ("weight", "bias")]
    return {path: path.partition(".")[2] for path in paths}


def test_logits_and_a_step(family, same_step):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(3, 12, 8, 2)).astype(np.float32), random.integers(0, 3, (3, 12, 8))

    def theirs(module, _):
        logits = module(torch.from_numpy(x).movedim(-1, 1))
        return [logits.movedim(1, -1)], nn.functional.cross_entropy(logits, torch.from_numpy(y))

    loss = functools.partial(losses.cross_entropy_sparse, indices=y)
    model = family("unet").make_model(in_channels=2, widths=(4, 6, 8))
    same_step(model, UNet(), names(), (x, loss), theirs, rate=0.3)

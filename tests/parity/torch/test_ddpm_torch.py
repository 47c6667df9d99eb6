"""The diffusion model of examples/models/ddpm.py, and the same in PyTorch."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import losses, rng  # noqa: E402

nn, F = torch.nn, torch.nn.functional
WIDTH, LEVELS = 16, 50
LINEAR = ["time.0", "begin", *(f"blocks.{i}.{x}" for i in range(2) for x in ("time", "inner", "outer")), "end.1"]
NAMES = {f"params.{part}.{x}": f"{part}.{x}" for part in LINEAR for x in ("weight", "bias")}


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda: nn.Linear(WIDTH, WIDTH)
        block = lambda: nn.ModuleDict({"time": linear(), "inner": linear(), "outer": linear()})
        self.time, self.begin = nn.Sequential(linear(), nn.SiLU()), nn.Linear(2, WIDTH)
        self.blocks, self.end = nn.ModuleList([block(), block()]), nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2))

    def forward(self, noisy, t):
        rates = torch.exp(-np.log(10_000) * torch.arange(WIDTH // 2) / (WIDTH // 2 - 1))
        angles = t[:, None] * rates
        time, h = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)), self.begin(noisy)
        for block in self.blocks:
            h = h + block["outer"](F.silu(block["inner"](F.silu(h)) + block["time"](time)))
        return self.end(h)


def test_outputs_and_a_step(family, same_step):
    ddpm = family("ddpm")
    x = ddpm.make_points(8)

    def theirs(module, key):
        with rng.scope(key):
            t = jax.random.randint(rng.next_key(), (8,), 0, LEVELS)
            noise = jax.random.normal(rng.next_key(), x.shape)
        t, noise = (torch.from_numpy(np.array(a)) for a in (t, noise))
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64) * 1000 / LEVELS, 0)
        share = kept[t.long()].float()[:, None]
        found = module(share.sqrt() * torch.from_numpy(x) + (1 - share).sqrt() * noise, t)
        return [found, noise], F.mse_loss(found, noise)

    loss = lambda out: losses.mse(out["found"], out["noise"])
    model = ddpm.make_model(width=WIDTH, blocks=2, levels=LEVELS)
    same_step(model, Denoiser(), NAMES, ({"data": x}, loss), theirs, rate=0.3)

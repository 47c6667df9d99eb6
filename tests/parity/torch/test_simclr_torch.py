"""SimCLR of examples/models/simclr.py, and the same in PyTorch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import rng  # noqa: E402

nn = torch.nn
NAMES = {"params.encoder.0.weight": "encoder.0.weight", "params.encoder.3.weight": "encoder.3.weight"}
NAMES |= {f"params.encoder.{i}.{x}": f"encoder.{i}.{x}" for i in (1, 4, 7) for x in ("weight", "bias")}
NAMES |= {f"params.projector.{i}.{x}": f"projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}


class Flatten(nn.Module):
    """Flatten with the channels last."""

    def forward(self, x):
        return x.movedim(1, -1).flatten(1)


class Same(nn.Conv2d):
    """A convolution of stride 2 and of images with even sides, which are padded at the end."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Contrastive(nn.Module):
    def __init__(self, first, second, features, projected):
        super().__init__()
        norm = lambda n: nn.BatchNorm2d(n, track_running_stats=False)
        self.encoder = nn.Sequential(
            Same(1, first, 3, stride=2, bias=False), norm(first), nn.ReLU(),
            Same(first, second, 3, stride=2, bias=False), norm(second), nn.ReLU(),
            Flatten(), nn.Linear(4 * second, features), nn.ReLU(),
        )  # fmt: skip
        self.projector = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, projected))

    def forward(self, images):
        features = self.encoder(images)
        return features, self.projector(features)


def test_features_and_a_step(family, same_step):
    simclr = family("simclr")
    with rng.scope(0):
        views = np.array(simclr.make_views(rng.next_key(), simclr.load_data()[0][:6]))

    def theirs(module, _):
        features, projected = module(torch.from_numpy(views).movedim(-1, 1))
        cosines = nn.functional.cosine_similarity(projected[:, None], projected[None], dim=-1)
        scores = (cosines / 0.2).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
        return [features, projected], nn.functional.cross_entropy(scores, torch.arange(12).roll(6))

    model = simclr.make_model(channels=(4, 6), features=10, projected=5)
    same_step(model, Contrastive(4, 6, 10, 5), NAMES, (views, simclr.contrast), theirs, rate=0.1)

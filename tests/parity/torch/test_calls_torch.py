"""PyTorch's objects where kaun expects its own: the message says what to write."""

import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses

torch = pytest.importorskip("torch")

X, Y = np.ones((4, 2), np.float32), np.ones((4, 1), np.float32)


def test_objects_of_torch_say_what_to_write():
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"received Linear\. There is no adapter for models of PyTorch: .*safetensors"):
        kaun.Trainer(model=torch.nn.Linear(2, 1), optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"received ReLU\. There is no adapter for models of PyTorch"):
        layers.sequential([layers.linear(2, 1), torch.nn.ReLU()])
    data = Data.batches((X, Y), 2)
    with pytest.raises(TypeError, match=r"received MSELoss of PyTorch, .* Write losses\.mse\."):
        data.with_loss(torch.nn.MSELoss())
    with pytest.raises(TypeError, match=r"received cross_entropy of PyTorch, .* Write losses\.cross_entropy_sparse\."):
        data.with_loss(torch.nn.functional.cross_entropy)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=2)
    with pytest.raises(TypeError, match=r"write Data\.from_iterable\(loader\)\.with_loss\(losses\.mse\)\.$"):
        trainer.fit(trainer.init(), loader)
    state = trainer.fit(trainer.init(), Data.from_iterable(loader).with_loss(losses.mse))
    assert int(state.step) == 2

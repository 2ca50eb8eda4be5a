"""Classifiers: accuracy on images they have not seen, the same weights again, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ctrl.torch.classifiers import ConvClassifier, MLPClassifier, accuracy, train_classifier
from ctrl.torch.images import Images, digits

KINDS = (MLPClassifier, ConvClassifier)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_on_the_other_half(kind):
    """At least .97 of 898 held-out digits; .980 to .992 over six splits. Planted: shuffled labels teach nothing."""
    seen, unseen = digits().split(0)
    network = train_classifier(kind(seen.shape, seen.classes), seen, progress=False)
    assert not network.training and accuracy(network, unseen) >= 0.97
    with torch.no_grad():
        assert float(network(unseen.pixels).log_softmax(1).min()) > -20      # label smoothing keeps log p in bounds
    shuffled = Images(seen.pixels, seen.labels[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))])
    assert accuracy(train_classifier(kind(seen.shape, 10), shuffled, steps=40, progress=False), unseen) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_weights(kind):
    data = digits()

    def weights(first=0, seed=0, **options):
        network = train_classifier(kind(data.shape, 10, seed=first), data, steps=5, seed=seed, progress=False, **options)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    state = torch.random.get_rng_state()
    expected = weights()
    assert torch.equal(torch.random.get_rng_state(), state)      # nobody else's random numbers move
    torch.randn(3)
    assert torch.equal(weights(), expected)
    for other in (weights(first=1), weights(seed=1), weights(noise=0.0), weights(label_smoothing=0.0), weights(learning_rate=1e-3)):
        assert not torch.equal(other, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 28, 28), (3, 32, 48), (1, 5, 3)])
def test_shapes(kind, shape):
    network = kind(shape, 7).eval()
    x = torch.rand(3, *shape, requires_grad=True)
    assert network(x).shape == (3, 7) and network.features(x).ndim == 2 and network.features(x).shape[1] in (128, 256)
    torch.testing.assert_close(network.head(network.features(x)), network(x))
    network(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    again = kind(network.shape, network.classes, seed=5)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(x), network(x))
    with pytest.raises(ValueError, match=r"images: expected shape \(n, "):
        network(torch.rand(3, shape[0], shape[1] + 1, shape[2]))


class ByCorner(nn.Module):
    """Class 1 where the first pixel is white."""

    def forward(self, x):
        self.was_training = self.training
        return torch.stack([-x[:, 0, 0, 0], x[:, 0, 0, 0]], dim=1)


def test_accuracy_counts():
    pixels = torch.tensor([1.0, -1, 1, -1, 1])[:, None, None, None].expand(5, 1, 2, 2)
    data = Images(pixels, torch.tensor([1, 0, 0, 0, 1]))
    network = ByCorner().train()
    for batch in (1, 2, 5, 100):
        assert accuracy(network, data, batch) == 0.8      # planted: a mean of batch means would depend on the batch
    assert network.training and not network.was_training


def test_refusals():
    data = digits().subset(torch.arange(20))
    network = MLPClassifier(data.shape, 10)
    for options in ({"steps": 0}, {"batch": 0}, {"learning_rate": 0}, {"noise": -1}, {"label_smoothing": 1}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            train_classifier(network, data, **options)
    for function in (train_classifier, accuracy):
        with pytest.raises(ValueError, match="images: expected labels to learn or to compare with, got none in images"):
            function(network, Images(data.pixels))
        with pytest.raises(ValueError, match=r"network: expected one logit for each of 10 classes of digits, got shape \(1, 4\)"):
            function(MLPClassifier(data.shape, 4), data)
        with pytest.raises(ValueError, match="network: expected a torch module"):
            function(None, data)
        with pytest.raises(ValueError, match="images: expected ctrl.torch Images, got Tensor"):
            function(network, data.pixels)
    for shape, classes, message in [((1, 8), 10, "shape: expected"), ((1, 8, 0), 10, "shape: expected"), ((1, 8, 8), 1, "classes: expected")]:
        with pytest.raises(ValueError, match=message):
            ConvClassifier(shape, classes)

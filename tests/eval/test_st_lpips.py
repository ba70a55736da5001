"""ST-LPIPS' arithmetic with random weights, against the definition written out in NumPy-like loops of its own."""

import pytest
import torch
from random_st_lpips import LAYERS, random_network

from sparsediff.eval.st_lpips import st_lpips


@pytest.fixture(scope="module")
def network():
    return random_network()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "network.pth"
    torch.save(network, path)
    return path


def convolve(x, weight, bias, padding, stride=1):
    """`[C, H, W]`, one output pixel at a time as a sum over a window."""
    if padding:
        x = torch.nn.functional.pad(x, (padding,) * 4)
    k = weight.shape[-1]
    windows = x.unfold(1, k, stride).unfold(2, k, stride)  # [C, H', W', k, k]
    out = torch.einsum("chwij,ocij->ohw", windows, weight)
    return out + bias[:, None, None]


def blurred(x, kernel):
    """Every channel by itself over mirrored borders, every second pixel."""
    x = torch.cat([x[:, 1:3].flip(1), x, x[:, -3:-1].flip(1)], 1)
    x = torch.cat([x[..., 1:3].flip(-1), x, x[..., -3:-1].flip(-1)], -1)
    windows = x.unfold(1, 5, 2).unfold(2, 5, 2)
    return torch.einsum("chwij,cij->chw", windows, kernel[:, 0])


def largest(x):
    return x.unfold(1, 3, 1).unfold(2, 3, 1).amax((-1, -2))


def features(frame, net):
    """Activations of the five layers for one frame `[H, W, 3]` in [0, 1], in float64."""
    x = (2 * frame.double().movedim(-1, 0) - 1 - net["scaling_layer.shift"][0]) / net[
        "scaling_layer.scale"
    ][0]
    for i, (_, _, _, padding, number) in enumerate(LAYERS):
        if i == 1:
            x = blurred(largest(x), net["net.slice2.4.filt"])
        if i == 2:
            x = blurred(largest(x), net["net.slice3.8.filt"])
        name = f"net.slice{i + 1}.{number}"
        x = convolve(x, net[f"{name}.weight"], net[f"{name}.bias"], padding)
        if i == 0:
            x = blurred(x, net["net.slice1.1.filt"])
        x = x.clamp(min=0)
        yield x


def distance(a, b, net):
    total = 0.0
    for i, (x, y) in enumerate(zip(features(a, net), features(b, net), strict=True)):
        x, y = (z / (z.square().sum(0).sqrt() + 1e-10) for z in (x, y))
        weighed = (x - y).square() * net[f"lin{i}.model.1.weight"][0]
        total += weighed.sum(0).mean().item()
    return total


@pytest.mark.parametrize("size", [(32, 32), (45, 37)])
def test_it_is_the_definition(network, weights, size):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.rand(3, *size, 3, generator=g) for _ in range(2))
    net = {name: x.double() for name, x in network.items()}
    expected = [distance(x, y, net) for x, y in zip(a, b, strict=True)]
    found = st_lpips(a, b, weights=weights)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert found.tolist() == pytest.approx(st_lpips(b, a, weights=weights).tolist(), rel=1e-6)


def test_equal_frames_are_at_zero_and_batches_change_nothing(weights):
    g = torch.Generator().manual_seed(2)
    a, b = (torch.rand(5, 32, 32, 3, generator=g) for _ in range(2))
    assert (st_lpips(a, a, weights=weights) == 0).all()
    one = st_lpips(a, b, weights=weights, batch=1)
    assert (one > 0).all()
    torch.testing.assert_close(one, st_lpips(a, b, weights=weights, batch=4), rtol=1e-5, atol=0)


def test_what_cannot_be_compared_is_refused(weights):
    with pytest.raises(ValueError, match="at least 32 x 32 pixels are needed, got"):
        st_lpips(torch.rand(1, 31, 40, 3), torch.rand(1, 31, 40, 3), weights=weights)
    with pytest.raises(ValueError, match="shape"):
        st_lpips(torch.rand(1, 32, 32, 3), torch.rand(2, 32, 32, 3), weights=weights)

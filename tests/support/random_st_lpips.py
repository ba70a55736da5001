"""A network of ST-LPIPS with random weights and few channels, for tests without the published one."""

import torch

# (input, output) channels, kernel, padding, and the stored number of the five convolutions
LAYERS = ((3, 4, 11, 2, 0), (4, 5, 5, 2, 5), (5, 6, 3, 1, 9), (6, 5, 3, 1, 11), (5, 4, 3, 1, 13))


def random_network() -> dict[str, torch.Tensor]:
    """Random weights under the names of the stored file; filters that sum to one, weights of differences above 0."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "scaling_layer.shift": torch.tensor([-0.03, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.45]).view(1, 3, 1, 1),
    }
    for i, (inside, outside, kernel, _, number) in enumerate(LAYERS):
        shape = (outside, inside, kernel, kernel)
        tensors[f"net.slice{i + 1}.{number}.weight"] = torch.randn(shape, generator=g) * 0.1
        tensors[f"net.slice{i + 1}.{number}.bias"] = torch.randn(outside, generator=g) * 0.1
        tensors[f"lin{i}.model.1.weight"] = torch.rand(1, outside, 1, 1, generator=g)
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    blur = torch.outer(row, row)
    for name, channels in (("slice1.1", 4), ("slice2.4", 4), ("slice3.8", 5)):
        tensors[f"net.{name}.filt"] = blur.expand(channels, 1, 5, 5).clone()
    return tensors

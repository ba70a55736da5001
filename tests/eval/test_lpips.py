"""LPIPS through its authors' package, where that is installed: `pip install 'sparsediff[lpips]'` on a CUDA machine.

AlexNet's weights come from a download that tests do not make; random ones in their place show that the two compute alike.
"""

import pytest
import torch

from sparsediff.eval import metrics, perceptual

lpips_package = pytest.importorskip("lpips", exc_type=ImportError)
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)


@pytest.fixture(autouse=True)
def random_alexnet(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    perceptual.lpips_network.cache_clear()
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    weights = torchvision.models.alexnet(weights=None).state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    yield
    perceptual.lpips_network.cache_clear()


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_frames_are_what_the_package_says_of_each():
    g = torch.Generator().manual_seed(1)
    video = torch.rand(11, 64, 80, 3, generator=g)
    other = (video + 0.1 * torch.randn(video.shape, generator=g)).clamp(0, 1)
    found = perceptual.lpips(video, other, batch=4)
    network = lpips_package.LPIPS(net="alex", verbose=False).eval()
    with torch.no_grad():
        want = [
            network(a.movedim(-1, 0)[None], b.movedim(-1, 0)[None], normalize=True).item()
            for a, b in zip(video, other, strict=True)
        ]
    torch.testing.assert_close(found, torch.tensor(want), rtol=1e-4, atol=1e-6)
    assert found.min() > 0
    assert perceptual.lpips(video, video).abs().max() == 0
    names, _ = metrics.choose(None, (64, 80), 11)
    assert "lpips" in names

"""Training-time passes through `AutoencoderKLWan`: the whole clip at once.

The class encodes and decodes four frames at a time, carrying the last frames of every convolution
along.  Since all its convolutions are causal the same numbers come out of one pass over the clip
(a test holds the two together), with a ninth of the kernel launches.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from .models import AUTOENCODER


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    scale = x.shape[1] ** 0.5
    return F.silu(F.normalize(x.float(), dim=1) * (scale * gamma.float())).to(x.dtype)


class ClipAutoencoder:
    """Encode and decode whole clips with the weights of `model`.

    Values are `[B, 3, 1 + 4n, H, W]` in [-1, 1], latents `[B, 16, 1 + n, H / 4, W / 4]`.
    """

    def __init__(
        self, model: AutoencoderKLWan, *, compile: bool = False, channels_last: bool = False
    ) -> None:
        self.model, self.channels_last = model, channels_last
        self.norm_silu = torch.compile(_norm_silu, dynamic=True) if compile else _norm_silu
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                layout = torch.channels_last_3d if channels_last else torch.contiguous_format
            elif isinstance(module, nn.Conv2d):
                layout = torch.channels_last if channels_last else torch.contiguous_format
            else:
                continue
            module.weight.data = module.weight.data.contiguous(memory_format=layout)

    def encode(self, video: Tensor) -> Tensor:
        """The mean of the posterior."""
        if self.channels_last:
            video = video.contiguous(memory_format=torch.channels_last_3d)
        encoder = self.model.encoder
        x = _causal(encoder.conv_in, video)
        for layer in encoder.down_blocks:
            x = self._residual(layer, x) if hasattr(layer, "conv1") else _downsample(layer, x)
        x = self._middle(encoder.mid_block, x)
        x = _causal(encoder.conv_out, self.norm_silu(x, encoder.norm_out.gamma))
        return self.model.quant_conv(x).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """The clip, not clamped."""
        decoder = self.model.decoder
        x = _causal(decoder.conv_in, self.model.post_quant_conv(latents))
        x = self._middle(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = self._residual(layer, x)
            if block.upsamplers is not None:
                x = _upsample(block.upsamplers[0], x)
        return _causal(decoder.conv_out, self.norm_silu(x, decoder.norm_out.gamma))

    def _residual(self, layer: nn.Module, x: Tensor) -> Tensor:
        h = _causal(layer.conv1, self.norm_silu(x, layer.norm1.gamma))
        h = _causal(layer.conv2, self.norm_silu(h, layer.norm2.gamma))
        return h + (
            x if isinstance(layer.conv_shortcut, nn.Identity) else _causal(layer.conv_shortcut, x)
        )

    def _middle(self, block: nn.Module, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(layer, attention(x))
        return x


def _causal(conv: nn.Conv3d, x: Tensor) -> Tensor:
    time, height, width = conv.kernel_size
    if time > 1:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    return F.conv3d(x, conv.weight, conv.bias, stride=1, padding=(0, height // 2, width // 2))


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2).flatten(0, 1)
    return layer(frames).unflatten(0, (len(x), -1)).transpose(1, 2)


def _downsample(layer: nn.Module, x: Tensor) -> Tensor:
    """Halve the picture; in time the first frame stands alone and the others go in pairs."""
    x = _per_frame(layer.resample, x)
    if x.shape[2] == 1:
        return x
    conv = layer.time_conv
    return torch.cat([x[:, :, :1], F.conv3d(x, conv.weight, conv.bias, stride=(2, 1, 1))], dim=2)


def _upsample(layer: nn.Module, x: Tensor) -> Tensor:
    """Double the picture; every frame but the first becomes two."""
    if x.shape[2] > 1:
        pairs = _causal_time(layer.time_conv, x[:, :, 1:])  # [B, 2C, T, H, W]
        pairs = pairs.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], pairs], dim=2)
    return _per_frame(layer.resample, x)


def _causal_time(conv: nn.Conv3d, x: Tensor) -> Tensor:
    return F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), conv.weight, conv.bias)


def channels_last_is_faster(video: Tensor, mixed_precision) -> float:
    """Seconds a training step takes in the plain layout, minus seconds in channels-last; for GPUs."""
    seconds = []
    for channels_last in (False, True):
        clips = ClipAutoencoder(
            AutoencoderKLWan(**AUTOENCODER).to(video.device),
            compile=True,
            channels_last=channels_last,
        )
        for i in range(6):
            if i == 3:  # the first ones compile and choose convolution kernels
                torch.cuda.synchronize()
                started = time.monotonic()
            with mixed_precision:
                clips.decode(clips.encode(video)).float().square().mean().backward()
        torch.cuda.synchronize()
        seconds.append((time.monotonic() - started) / 3)
    return seconds[0] - seconds[1]


@torch.no_grad()
def normalise_latents(model: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Fold `(z - mean) / std` (each `[16]`) into the last encoder and first decoder convolution."""
    inverse = torch.cat([1 / std, torch.ones_like(std)])
    offset = torch.cat([mean, 2 * std.log()])  # the second half of the output is a log variance
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight.mul_(inverse.view(-1, 1, 1, 1, 1))
    quant.bias.sub_(offset).mul_(inverse)
    post.bias.add_(post.weight[:, :, 0, 0, 0] @ mean)
    post.weight.mul_(std.view(1, -1, 1, 1, 1))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels for each clip of `[B, ...]` with values in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp_min(1e-10))

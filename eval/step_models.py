"""Transformers for `bench step`: diffusers' own classes at the width, heads and sequence that people run them at.

Layers are left out where memory asks for it: a layer costs what its neighbour costs.  Weights are random: time does not
depend on what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Random = Callable[
    ..., Tensor
]  # sizes -> standard normal numbers in the model's dtype, on its device


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """One model and one size of its sequence.

    Attributes:
        what: model, resolution and length.
        transformer: its class.
        config: what of its configuration differs from the class's defaults, all layers included.
        layers: the layers that are built, by the name of their number in the configuration.
        latent: sizes of the latents `arguments` makes.
        arguments: `(model, latent, random)` to everything that the forward takes but the timestep.
        unit: of the timestep argument, whose largest value is 1000 units.
        timestep_dtype: of the timestep argument.
    """

    what: str
    transformer: str
    config: Mapping[str, object] = field(default_factory=dict)
    layers: Mapping[str, int]
    latent: tuple[int, ...]
    arguments: Callable[[nn.Module, tuple[int, ...], Random], dict[str, object]]
    unit: float = 1.0
    timestep_dtype: torch.dtype = torch.float32

    def build(self, device: str) -> nn.Module:
        """The transformer, in the dtypes that `from_pretrained(torch_dtype=bfloat16)` gives."""
        import diffusers

        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(diffusers, self.transformer)(**{**self.config, **self.layers})
        keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if not set(name.split(".")) & keep:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model.eval().requires_grad_(False)

    def of_layers(self, model: nn.Module) -> dict[str, int]:
        """All layers that the model has at its full depth, by the same names as `layers`."""
        import inspect

        defaults = inspect.signature(type(model).__init__).parameters
        return {name: self.config.get(name, defaults[name].default) for name in self.layers}


def _wan(model: nn.Module, latent: tuple[int, ...], random: Random) -> dict[str, object]:
    return {
        "hidden_states": random(*latent),
        "encoder_hidden_states": random(1, 512, model.config.text_dim),
    }


def _hunyuan(model: nn.Module, latent: tuple[int, ...], random: Random) -> dict[str, object]:
    text = random(1, 256, model.config.text_embed_dim)
    # 200 words of 256: the mask that always comes has something to hide.
    mask = (torch.arange(256, device=text.device) < 200)[None]
    return {
        "hidden_states": random(*latent),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "pooled_projections": random(1, model.config.pooled_projection_dim),
        "guidance": 0 * random(1) + 6000.0,
    }


def _hunyuan15(model: nn.Module, latent: tuple[int, ...], random: Random) -> dict[str, object]:
    config, text = model.config, random(1, 1000, model.config.text_embed_dim)
    places = torch.arange(1000, device=text.device)[None]
    return {
        "hidden_states": random(*latent),
        "encoder_hidden_states": text,
        "encoder_attention_mask": places < 300,
        "encoder_hidden_states_2": random(1, 256, config.text_embed_2_dim),
        "encoder_attention_mask_2": places[:, :256] < 40,
        "image_embeds": 0 * random(1, 729, config.image_embed_dim),  # text-to-video
    }


def _cogvideox(model: nn.Module, latent: tuple[int, ...], random: Random) -> dict[str, object]:
    config = model.config
    _, frames, _, height, width = latent
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    video = (frames // patch_t) * (height // patch) * (width // patch)
    rotary = [random(video, config.attention_head_dim).float() for _ in range(2)]
    return {
        "hidden_states": random(*latent),
        "encoder_hidden_states": random(1, config.max_text_seq_length, config.text_embed_dim),
        "image_rotary_emb": tuple(rotary),
    }


def _ltx2(model: nn.Module, latent: tuple[int, ...], random: Random) -> dict[str, object]:
    config = model.config
    frames, height, width = latent
    audio = 8 * frames
    text = random(1, 256, config.caption_channels)
    return {
        "hidden_states": random(1, frames * height * width, config.in_channels),
        "audio_hidden_states": random(1, audio, config.audio_in_channels),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio,
    }


def _flux(model: nn.Module, latent: tuple[int, ...], random: Random) -> dict[str, object]:
    config = model.config
    image = random(1, latent[0] * latent[1], config.in_channels)
    places = torch.cartesian_prod(torch.arange(latent[0]), torch.arange(latent[1]))
    ids = torch.cat([torch.zeros(len(places), 1), places], 1).to(image)
    return {
        "hidden_states": image,
        "encoder_hidden_states": random(1, 512, config.joint_attention_dim),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "img_ids": ids,
        "txt_ids": 0 * ids[:512] if len(ids) >= 512 else ids.new_zeros(512, 3),
        "guidance": 0 * random(1) + 3.5,
    }


WAN = {
    "patch_size": (1, 2, 2), "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
FLUX = {"guidance_embeds": True}

STEP_MODELS = {
    "wan-14b": StepModel(
        what="Wan 2.1 14B (either expert of Wan 2.2 A14B), 720p, 81 frames",
        transformer="WanTransformer3DModel",
        config={**WAN, "num_attention_heads": 40, "in_channels": 16, "out_channels": 16, "ffn_dim": 13824, "num_layers": 40},
        layers={"num_layers": 8},
        latent=(1, 16, 21, 90, 160),
        arguments=_wan,
    ),
    "wan-2.2-5b": StepModel(
        what="Wan 2.2 TI2V 5B, 704x1280, 121 frames",
        transformer="WanTransformer3DModel",
        config={**WAN, "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        layers={"num_layers": 8},
        latent=(1, 48, 31, 44, 80),
        arguments=_wan,
    ),
    "hunyuan-video": StepModel(
        what="HunyuanVideo, 720p, 129 frames",
        transformer="HunyuanVideoTransformer3DModel",
        layers={"num_layers": 3, "num_single_layers": 6},
        latent=(1, 16, 33, 90, 160),
        arguments=_hunyuan,
    ),
    "hunyuan-video-1.5": StepModel(
        what="HunyuanVideo 1.5, 720p, 121 frames",
        transformer="HunyuanVideo15Transformer3DModel",
        layers={"num_layers": 6},
        latent=(1, 65, 31, 45, 80),
        arguments=_hunyuan15,
        timestep_dtype=torch.bfloat16,
    ),
    "cogvideox-1.5": StepModel(
        what="CogVideoX 1.5 5B, 768x1360, 81 frames",
        transformer="CogVideoXTransformer3DModel",
        config={
            "num_attention_heads": 48, "num_layers": 42, "patch_size_t": 2, "patch_bias": False,
            "use_rotary_positional_embeddings": True, "sample_height": 96, "sample_width": 170, "sample_frames": 85,
        },
        layers={"num_layers": 8},
        latent=(1, 22, 16, 96, 170),
        arguments=_cogvideox,
    ),
    "ltx-2": StepModel(
        what="LTX-2 19B, 1088x1920, 121 frames",
        transformer="LTX2VideoTransformer3DModel",
        layers={"num_layers": 8},
        latent=(16, 34, 60),
        arguments=_ltx2,
    ),
    "flux-2k": StepModel(
        what="Flux.1 dev, 2048x2048",
        transformer="FluxTransformer2DModel",
        config=FLUX,
        layers={"num_layers": 5, "num_single_layers": 10},
        latent=(128, 128),
        arguments=_flux,
        unit=1e-3,
    ),
    "flux-4k": StepModel(
        what="Flux.1 dev, 4096x4096",
        transformer="FluxTransformer2DModel",
        config=FLUX,
        layers={"num_layers": 5, "num_single_layers": 10},
        latent=(256, 256),
        arguments=_flux,
        unit=1e-3,
    ),
}  # fmt: skip

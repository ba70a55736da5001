"""What tests, and people who write adapters, share: the tolerance rule and tiny random pipelines of the real classes.

The pipelines are built offline in a fraction of a second.  Their weights are random: they prove that every path runs,
and show nothing about quality.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

CORPUS = (
    "a small red circle moves left over a blue background",
    "a large green square turns while the camera pans right",
    "two yellow stars pass behind a striped ring",
)


def assert_close_to_exact(actual: Tensor, exact: Tensor, baseline: Tensor) -> None:
    """`actual` may err at most twice as much as `baseline`, PyTorch's result in the same dtype.

    On a handful of numbers PyTorch may be right by luck, so one rounding of the output and a few of the float32
    arithmetic before it are granted beside that.
    """
    assert actual.isfinite().all(), "NaN or infinite values"
    exact = exact.double()
    error, floor = ((x.double() - exact).abs().max().item() for x in (actual, baseline))
    roundings = torch.finfo(actual.dtype).eps + 8 * torch.finfo(torch.float32).eps
    budget = 2 * floor + roundings * exact.abs().max().item()
    assert error <= budget, f"max error {error:.2e} is over the budget {budget:.2e}"


def random_wan_pipeline(
    variant: str = "t2v", *, layers: int = 2, head_dim: int = 12, seed: int = 0
):
    """A `WanPipeline` (or `WanImageToVideoPipeline`, `WanVACEPipeline`) of random weights, in float32 on the CPU.

    Args:
        variant: `"t2v"` (Wan 2.1), `"t2v-2.2"` (two experts), `"ti2v-2.2"` (one timestep a token), `"i2v"` (Wan 2.1,
            image tokens in cross-attention), `"flf2v"` (the same between a first and a last frame) or `"vace"`.
        layers: transformer blocks.
        head_dim: channels of an attention head; CUDA kernels want 64 or more.
        seed: of the weights.
    """
    import diffusers

    with seeded(seed):
        parts = {
            "tokenizer": word_tokenizer(),
            "text_encoder": _umt5_encoder(),
            "vae": wan_autoencoder(),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
        if variant == "t2v":
            return diffusers.WanPipeline(transformer=_wan_transformer(layers, head_dim), **parts)
        if variant == "t2v-2.2":
            return diffusers.WanPipeline(
                transformer=_wan_transformer(layers, head_dim),
                transformer_2=_wan_transformer(layers, head_dim),
                boundary_ratio=0.6,
                **parts,
            )
        if variant == "ti2v-2.2":
            return diffusers.WanPipeline(
                transformer=_wan_transformer(layers, head_dim), expand_timesteps=True, **parts
            )
        if variant in ("i2v", "flf2v"):
            encoder, processor = clip_vision()
            # First and last frame are told apart by a position embedding over the tokens of both.
            tokens = (encoder.config.image_size // encoder.config.patch_size) ** 2 + 1
            places = 2 * tokens if variant == "flf2v" else None
            return diffusers.WanImageToVideoPipeline(
                transformer=_wan_transformer(
                    layers, head_dim, in_channels=36, image_dim=4, pos_embed_seq_len=places
                ),
                image_encoder=encoder,
                image_processor=processor,
                **parts,
            )
        if variant == "vace":
            transformer = diffusers.WanVACETransformer3DModel(
                **_wan_sizes(layers, head_dim), vace_layers=[0, layers - 1], vace_in_channels=96
            ).eval()
            return diffusers.WanVACEPipeline(transformer=make_local(transformer), **parts)
    raise ValueError(
        f"unknown variant {variant!r}; known: t2v, t2v-2.2, ti2v-2.2, i2v, flf2v, vace"
    )


def _wan_sizes(layers: int, head_dim: int) -> dict:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }


def _wan_transformer(layers, head_dim: int, **changes):
    from diffusers import WanTransformer3DModel

    return make_local(WanTransformer3DModel(**{**_wan_sizes(layers, head_dim), **changes}).eval())


# What an attention module calls its norms and projections of queries and keys.
_QUERY_KEY_NAMES = (("norm_{}", "to_{}", "q", "k"), ("{}_norm", "to_{}", "query", "key"))


@torch.no_grad()
def make_local(model):
    """Give self-attention a shape: queries and keys that mostly agree, so that RoPE makes near tokens score higher.

    With wholly random weights every block matters as much as any other, and nothing is ever skipped.
    """
    for module in model.modules():
        if getattr(module, "is_cross_attention", False):
            continue
        for norm, projection, *roles in _QUERY_KEY_NAMES:
            if getattr(module, norm.format(roles[0]), None) is None:
                continue
            for role in roles:
                linear = getattr(module, projection.format(role))
                linear.weight.mul_(0.3)
                if linear.bias is not None:
                    linear.bias.fill_(1.0)
                if (scale := getattr(module, norm.format(role)).weight) is not None:
                    scale.fill_(2.0)
    return model


def clip_vision():
    """A `CLIPVisionModel` of four channels and its image processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, intermediate_size=16, patch_size=1,
    )  # fmt: skip
    return CLIPVisionModel(config).eval(), CLIPImageProcessor(crop_size=32, size=32)


def wan_autoencoder():
    """An `AutoencoderKLWan` of 16 latent channels, 8x8 pixels and 4 frames a latent."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def _umt5_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def word_tokenizer():
    """A tokenizer of the words of `CORPUS`."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    # A fixed vocabulary: training one (Unigram, BPE) breaks ties differently from run to run.
    words = sorted({word for line in CORPUS for word in line.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


@contextlib.contextmanager
def seeded(seed: int):
    """Model constructors draw from the global generator: lend it a seed and give it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def record_attention(pipe: object, *, step: int, **call: object) -> list:
    """The attention calls (`Call`: query, key, value, site) of one denoising step of a dense run, in order."""
    from sparsediff.api import watch
    from sparsediff.methods import LiteAttention

    calls = []

    def look(seen):
        if seen.site.step == step:
            calls.append(seen)
        return seen.dense()

    pipe.set_progress_bar_config(disable=True)
    with watch(pipe, look, method=LiteAttention()):
        pipe(**{"output_type": "latent", "generator": torch.Generator().manual_seed(0), **call})
    return calls

"""The tiny models: their sizes, how they are built, and how a pipeline folder is put together.

All classes are diffusers' and transformers' own.  One autoencoder serves every pipeline: its latents
have zero mean and unit variance by construction (`autoencoder.normalise_latents`), so families that
know a mean and deviation (Wan) and families that know one scale (CogVideoX) read the same weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import render

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerFast

LATENT_CHANNELS = 16
TEXT_DIM = 128
FLOW_SHIFT = 3.0
TEXT_TOKENS = {"tiny-wan": 512, "tiny-cogvideox": 226}  # what the stock pipelines pad prompts to

AUTOENCODER = {
    "base_dim": 32,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "scale_factor_spatial": 4,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}
TEXT_ENCODER = {
    "d_model": TEXT_DIM,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 12,
    "rope_max_seq_len": 256,
}
COGVIDEOX = {
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "time_embed_dim": 64,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 12,
    "sample_width": 32,
    "sample_height": 32,
    "sample_frames": 33,
    "max_text_seq_length": TEXT_TOKENS["tiny-cogvideox"],
    "use_rotary_positional_embeddings": True,
}
# what `CogVideoXPipeline` reads from the configuration of its own autoencoder class and Wan's does not have
COGVIDEOX_AUTOENCODER_CONFIG = {
    "block_out_channels": [32, 64, 64],
    "temporal_compression_ratio": 4,
    "scaling_factor": 1.0,
}


def build_autoencoder() -> AutoencoderKLWan:
    """2.5 M parameters, 4x4x4 compression to 16 channels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**AUTOENCODER)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar; unknown words become `<unk>`.  Ids 0, 1, 2 are pad, end, unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *render.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def build_denoiser(name: str) -> tuple[nn.Module, nn.Module]:
    """The transformer and its text encoder, freshly initialised from the global random state."""
    from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
    from torch import nn
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    words = 3 + len(render.vocabulary())
    if name == "tiny-wan":
        return WanTransformer3DModel(**WAN), UMT5EncoderModel(
            UMT5Config(vocab_size=words, **TEXT_ENCODER)
        )
    config = T5Config(vocab_size=words, feed_forward_proj="gated-gelu", **TEXT_ENCODER)
    transformer = CogVideoXTransformer3DModel(**COGVIDEOX)
    # The class starts with random gates and an output of variance 1: a hundred iterations to unlearn.
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer, T5EncoderModel(config)


def assemble(
    name: str, autoencoder: AutoencoderKLWan, transformer: nn.Module, text_encoder: nn.Module
) -> DiffusionPipeline:
    """A stock pipeline of the family, in evaluation mode."""
    from diffusers import CogVideoXPipeline, UniPCMultistepScheduler, WanPipeline

    family = {"tiny-wan": WanPipeline, "tiny-cogvideox": CogVideoXPipeline}[name]
    if name == "tiny-cogvideox":
        autoencoder.register_to_config(**COGVIDEOX_AUTOENCODER_CONFIG)
    return family(
        vae=autoencoder.eval(),
        transformer=transformer.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=build_tokenizer(),
        scheduler=UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=FLOW_SHIFT, prediction_type="flow_prediction"
        ),
    )

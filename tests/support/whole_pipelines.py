"""Tiny random pipelines with all of their parts, text encoders too: what can be saved, loaded and asked in words."""

from __future__ import annotations

from families import flux, hunyuan_video

from sparsediff.testing import seeded, word_tokenizer

WORDS = {"vocab_size": 256, "pad_token_id": 0, "eos_token_id": 1}


def whole_flux():
    """A `FluxPipeline` of one token a 2x2 pixels."""
    import diffusers
    import transformers

    pipe = flux.build()
    with seeded(1):
        # The autoencoder does not compress, the pipeline packs 2x2.
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.0
        )
        encoder = transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=flux.WORDS, d_kv=8, d_ff=8, num_layers=1, num_heads=2,
                decoder_start_token_id=0, **WORDS,
            )
        )  # fmt: skip
        return _with(
            pipe,
            vae=vae.eval(),
            text_encoder=_clip(),
            text_encoder_2=encoder.eval(),
            tokenizer=_tokenizer(77),
            tokenizer_2=word_tokenizer(),
        )


def whole_hunyuan_video():
    """A `HunyuanVideoPipeline` of 8x8 pixels and 4 frames a latent, 2x2 latents a token."""
    import diffusers
    import transformers

    pipe = hunyuan_video.build()
    with seeded(1):
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )  # fmt: skip
        llama = transformers.LlamaModel(
            transformers.LlamaConfig(
                hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
                **WORDS,
            )
        )  # fmt: skip
        return _with(
            pipe,
            vae=vae.eval(),
            text_encoder=llama.eval(),
            text_encoder_2=_clip(),
            tokenizer=word_tokenizer(),
            tokenizer_2=_tokenizer(77),
        )


def _with(pipe, **parts):
    made = type(pipe)(**{**pipe.components, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def _clip():
    import transformers

    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            projection_dim=8, bos_token_id=0, **WORDS,
        )
    ).eval()  # fmt: skip


def _tokenizer(length):
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer

"""The shipped pipelines, and that training sees what inference does."""

import subprocess
import sys

import pytest
import torch

from sparsediff.pipelines import tiny
from sparsediff.pipelines.tiny import evaluate, models, tasks
from sparsediff.pipelines.tiny.autoencoder import ClipAutoencoder, normalise_latents

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def wan():
    return tiny.load("tiny-wan")


def test_names_are_those_that_load():
    assert tiny.names() == ("tiny-wan", "tiny-cogvideox")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no tiny model named 'big'.*tiny-wan, tiny-cogvideox"):
        tiny.load("big")


def test_importing_the_door_imports_no_diffusers():
    code = "import sys, sparsediff.pipelines.tiny; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_fit_the_repository():
    total = sum(f.stat().st_size for f in tiny.WEIGHTS.rglob("*") if f.is_file())
    assert total <= 45e6


@pytest.mark.parametrize("name", tiny.MODELS)
def test_prompt_to_clip_and_same_seed_same_clip(name):
    pipe = tiny.load(name)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    first, again = (evaluate.generate(pipe, ["a red star moving left"], **SMALL) for _ in range(2))
    assert first.shape == (1, 3, 5, 32, 48)
    assert torch.equal(first, again)
    other = evaluate.generate(pipe, ["a blue ring on a grey background"], **SMALL)
    assert (first - other).abs().mean() > 0.01


def test_the_first_captions_of_the_exam_do_not_depend_on_how_many_are_asked():
    assert evaluate.exam(3)[1] == evaluate.exam(100)[1][:3]
    with pytest.raises(ValueError, match="100 captions"):
        evaluate.exam(101)


def test_dtype_is_what_was_asked():
    assert tiny.load("tiny-wan", torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_unknown_words_do_not_break_the_tokenizer(wan):
    ids = wan.tokenizer("A RED zebra, moving left").input_ids
    assert ids.count(wan.tokenizer.unk_token_id) == 1
    assert ids[-1] == wan.tokenizer.eos_token_id
    assert ids[:2] == wan.tokenizer("a red").input_ids[:2]


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_whole_clip_pass_equals_the_class(frames):
    torch.manual_seed(0)
    model = models.build_autoencoder().eval()
    clips = ClipAutoencoder(model)
    video = torch.rand(2, 3, frames, 16, 32) * 2 - 1
    with torch.no_grad():
        latents = model.encode(video).latent_dist.mode()
        torch.testing.assert_close(clips.encode(video), latents, atol=1e-5, rtol=1e-4)
        decoded = clips.decode(latents).clamp(-1, 1)
        torch.testing.assert_close(decoded, model.decode(latents).sample, atol=1e-5, rtol=1e-4)


def test_normalised_latents_decode_to_the_same_clip():
    torch.manual_seed(0)
    model = models.build_autoencoder().eval()
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        before = model.encode(video).latent_dist.mode()
        clip = model.decode(before).sample
        values = before.transpose(0, 1).flatten(1)
        normalise_latents(model, values.mean(1), values.std(1))
        after = model.encode(video).latent_dist.mode()
        values = after.transpose(0, 1).flatten(1)
        torch.testing.assert_close(values.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(1), torch.ones(16), atol=1e-4, rtol=0)
        torch.testing.assert_close(model.decode(after).sample, clip, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("total", [48, 512])
def test_one_counted_key_stands_for_all_padding(wan, total):
    prompts = ["a red star moving left", ""]
    noisy, sigma = torch.randn(2, 16, 2, 8, 8), torch.tensor([0.3, 0.9])
    stock = dict(wan.transformer.attn_processors)
    task = tasks.WanTask(wan)
    ids = task.tokens(prompts)
    with torch.no_grad():
        states = wan._get_t5_prompt_embeds(prompts, max_sequence_length=total)
        expected = wan.transformer(noisy, sigma * 1000, states, return_dict=False)[0]
        task.prepare()
        states = wan.text_encoder(ids, (ids > 0).long()).last_hidden_state * (ids > 0)[:, :, None]
        task.processor.bias = tasks.padding_bias(ids > 0, total)
        actual = wan.transformer(noisy, sigma * 1000, states, return_dict=False)[0]
    wan.transformer.set_attn_processor(stock)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)

"""Frames, resolutions and sounds that single families have beside the video, or that come and go while it is made."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from families import helios
from families.registry import all_families, generator, padded

import sparsediff
from sparsediff import Auto, Custom, Schedule
from sparsediff.adapter import adapter_for
from sparsediff.noise_level import noise_levels

FAMILIES = {family.name: family for family in all_families()}
EVERYTHING = Custom(density=1.0, block=32, search="sparse")
HALF = Auto(density=0.5, block=32)


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)


def enabled(pipe):
    return sparsediff.enable(pipe, EVERYTHING, schedule=Schedule())


def close(out, stock):
    return torch.allclose(out, stock, rtol=0, atol=5e-5 * stock.abs().max().item())


def witnessed(handle):
    """Grids of the attention calls to come, as text, by layer."""
    seen = {}
    for state in handle.states:
        state.witness = lambda call: seen.setdefault(call.layer, set()).add(str(call.grid))
    return seen


def test_sound_is_made_beside_the_video_by_its_own_attention():
    family = FAMILIES["kandinsky-6"]
    pipe = family.pipeline()
    size = (96, 128, 9)
    stock = [family.call(pipe, size, guidance="off", what=what) for what in ("frames", "audio")]
    with enabled(pipe) as handle:
        ours = [family.call(pipe, size, guidance="off", what=what) for what in ("frames", "audio")]
        report = handle.report()
    assert all(map(close, ours, stock))
    assert {layer.name.rpartition("blocks.")[2][2:] for layer in report.layers} == {
        "video_dec_block.self_attention"
    }
    silent = family.call(pipe, size, guidance="off", sample_audio=False)
    assert not torch.equal(silent, stock[0]), "the video hears the sound"
    with enabled(pipe) as handle:
        assert close(family.call(pipe, size, guidance="off", sample_audio=False), silent)
        assert handle.report().dense_calls == {}


def test_places_in_time_tell_the_picture_from_the_video():
    adapter = adapter_for(FAMILIES["kandinsky-6"].pipeline().transformer)
    model = FAMILIES["kandinsky-6"].pipeline().transformer
    call = {"hidden_states": torch.zeros(1, 4, 12, 16, 9)}

    def grid(*times):
        places = (torch.tensor(times), torch.arange(6), torch.arange(8))
        return str(adapter.token_grid(model, {**call, "visual_rope_pos": places}))

    assert str(adapter.token_grid(model, call)) == "4x6x8"
    assert grid(0, 1, 2, 3) == "4x6x8"
    assert grid(0, 1, 2, 0) == "3x6x8 + 48 image"
    assert grid(5, 6, 0, 0) == "2x6x8 + 96 image"


def test_a_decoder_block_sees_the_video_twice_and_no_text():
    family = FAMILIES["motif-video"]
    pipe = family.pipeline()
    with enabled(pipe) as handle:
        seen = witnessed(handle)
        family.run(pipe)
    whole = {
        "transformer.transformer_blocks.0.attn",
        "transformer.single_transformer_blocks.0.attn",
    }
    assert seen.pop("transformer.single_transformer_blocks.1.attn") == {"6x6x8"}
    assert seen.keys() == whole
    # Padding last: what is beside the grid keeps its number.
    assert set.union(*seen.values()) == {"3x6x8 + 12 text"}


def test_tokens_of_a_picture_stand_before_the_words():
    """What image-to-video adds to a call."""
    pipe = FAMILIES["motif-video"].pipeline()
    model = pipe.transformer
    words, mask = padded(torch.randn(1, 12, 16, generator=generator(1)), (5,), 3.0)
    call = {
        "hidden_states": torch.randn(1, 33, 3, 12, 16, generator=generator(0)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": words,
        "encoder_attention_mask": mask,
        "image_embeds": torch.randn(1, 4, 8, generator=generator(2)),
        "return_dict": False,
    }
    with torch.no_grad():
        (stock,) = model(**call)
        with enabled(model) as handle:
            (ours,) = model(**call)
            report = handle.report()
    assert close(ours, stock)
    assert report.grid == "3x6x8 + 16 text"
    assert report.dense_calls == {}


def test_chunks_see_the_ones_before_as_history():
    family = FAMILIES["helios"]
    pipe = family.pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_latent_frames_per_chunk": 3, "guidance": "off"}
    size = (96, 128, 2 * 9)
    stock = family.call(pipe, size, **call)
    assert stock.shape[2] == 6
    with enabled(pipe) as handle:
        seen = witnessed(handle)
        assert close(family.call(pipe, size, **call), stock)
        assert handle.report().dense_calls == {}
    assert set.union(*seen.values()) == {"124 image + 3x6x8"}


@pytest.mark.parametrize("scheduler", ["HeliosScheduler", "HeliosDMDScheduler"])
def test_each_resolution_of_a_pyramid_is_a_run_of_its_own(scheduler):
    # With the default gamma the noise between resolutions cannot be factorised on every CPU.
    stages = {"stages": 2, "stage_range": [0, 0.5, 1], "gamma": 0.3}
    distilled = scheduler == "HeliosDMDScheduler"
    pipe = helios.build("HeliosPyramidPipeline", scheduler=scheduler, distilled=distilled, **stages)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_latent_frames_per_chunk": 2, "pyramid_num_inference_steps_list": [2, 2]}
    call |= {"guidance": "off" if distilled else "sequential"}
    size = (128, 192, 5)
    stock = helios.call(pipe, size, **call)
    with enabled(pipe) as handle:
        seen = witnessed(handle)
        assert close(helios.call(pipe, size, **call), stock)
        report = handle.report()
    # 4 * 2 * 3 tokens of the long history, 4 * 6 of the middle one, 2 * 8 * 12 of the short one
    assert set.union(*seen.values()) == {"240 image + 2x4x6", "240 image + 2x8x12"}
    assert report.dense_calls == {}
    assert [step.sigma for step in report.steps] == noise_levels(pipe.scheduler), (
        "of the last resolution"
    )
    with sparsediff.enable(pipe, HALF, schedule=Schedule(dense_steps=1)) as handle:
        helios.call(pipe, size, **call)
        assert [step.density == 1 for step in handle.report().steps] == [True, False]


def test_an_edit_that_drops_its_frames_on_the_way_goes_on_with_two():
    """ChronoEdit with reasoning: the first steps make a video, the others its first and last frame."""
    family = FAMILIES["chronoedit"]
    pipe = family.pipeline()
    pipe.set_progress_bar_config(disable=True)
    # Only this one lets go of frames between steps.
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    call = {"guidance": "sequential", "steps": 3}
    call |= {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}
    size = (128, 160, 13)
    stock = family.call(pipe, size, **call)
    with enabled(pipe) as handle:
        seen = witnessed(handle)
        assert close(family.call(pipe, size, **call), stock)
        assert set.union(*seen.values()) == {"4x8x10", "2x8x10"}
        assert handle.report().dense_calls == {}
    with sparsediff.enable(pipe, HALF, schedule=Schedule(dense_steps=1)) as handle:
        out = family.call(pipe, size, **call)
        assert torch.equal(out, family.call(pipe, size, **call))
        first, *others = handle.report().steps
        assert first.density == 1.0
        assert all(step.density < 1.0 for step in others), [s.density for s in others]

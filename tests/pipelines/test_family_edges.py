"""What single families do beside the conformance tests: refusals, masks that run dense, packed sequences."""

import pytest
import torch
from families import chroma, hunyuan_image
from families.registry import all_families, generator, padded
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5Config, T5EncoderModel

import sparsediff
from sparsediff import Auto, Custom, Schedule
from sparsediff.adapter import ADAPTERS, adapter_for
from sparsediff.pipelines.packed import runs, volume_beside
from sparsediff.state import NOT_CAUGHT
from sparsediff.testing import seeded, word_tokenizer

FAMILIES = {family.name: family for family in all_families()}
EVERYTHING = Custom(density=1.0, block=32, search="sparse")


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)


def enabled(pipe):
    return sparsediff.enable(pipe, EVERYTHING, schedule=Schedule())


# -- masks that hide more than padding ----------------------------------------------------------------------------


def test_block_causal_diffusion_forcing_runs_dense_and_says_why():
    family = FAMILIES["skyreels-v2-df"]
    pipe = family.pipeline()
    size, causal = (96, 128, 13), {"causal_block_size": 2, "ar_step": 0}
    whole = family.run(pipe, size)
    stock = family.run(pipe, size, **causal)
    assert not torch.equal(stock, whole), "the mask must hide something"
    with enabled(pipe) as handle, pytest.warns(RuntimeWarning, match="block-causal mask"):
        assert torch.equal(family.run(pipe, size, **causal), stock)
    assert list(handle.report().dense_calls) == [
        "a block-causal mask (diffusion forcing with causal_block_size)"
    ]


def test_frames_at_noise_levels_of_their_own_stay_sparse():
    family = FAMILIES["skyreels-v2-df"]
    pipe = family.pipeline()
    stock = family.run(pipe, ar_step=1, steps=3)
    with enabled(pipe) as handle:
        out = family.run(pipe, ar_step=1, steps=3)
        assert handle.report().dense_calls == {}
    assert torch.allclose(out, stock, rtol=0, atol=5e-5 * stock.abs().max().item())


def test_strengths_of_in_context_references_run_dense_and_say_why():
    pipe = FAMILIES["ltx-2"].pipeline()
    attention = pipe.transformer.transformer_blocks[0].attn1
    tokens = torch.randn(1, 144, 32, generator=generator(0))
    weights = torch.zeros(1, 144, 144)
    weights[:, :72, 72:] = -10000.0
    with torch.no_grad():
        stock = attention(tokens, attention_mask=weights)
        with enabled(pipe.transformer) as handle:
            state = handle.states[0]
            inputs = forward_inputs(pipe)
            state.begin_forward(pipe.transformer, (), inputs)
            with pytest.warns(RuntimeWarning, match="weighs pairs of tokens"):
                ours = attention(tokens, attention_mask=weights)
            state.end_forward()
    assert torch.equal(ours, stock)


def forward_inputs(pipe):
    return {
        "hidden_states": torch.zeros(1, 144, 8),
        "timestep": torch.tensor([500.0]),
        "num_frames": 3,
        "height": 6,
        "width": 8,
    }


def test_each_call_of_a_guided_step_has_masks_of_its_own():
    """LTX-2 calls up to three times a step, with batches of their own; a perturbed layer makes no call in one of them."""
    family = FAMILIES["ltx-2"]
    pipe = family.build(perturbed_attn=True)
    scales = dict.fromkeys(("stg_scale", "audio_stg_scale"), 1.0)
    scales |= dict.fromkeys(("modality_scale", "audio_modality_scale"), 3.0)
    call = {"spatio_temporal_guidance_blocks": [1], **scales}
    stock = family.run(pipe, **call)
    with enabled(pipe) as handle:
        out = family.run(pipe, **call)
        slots = handle.states[0]._slots
        assert {name: [slot is not None for slot in s] for name, s in slots.items()} == {
            "cond_uncond": [True, True],
            "uncond_stg": [True, False],
            "uncond_modality": [True, True],
        }
        assert handle.report().dense_calls == {}
    assert torch.allclose(out, stock, rtol=0, atol=5e-5 * stock.abs().max().item())


def test_a_mask_of_numbers_weighs_padding_so_it_runs_dense_and_says_how_not_to():
    """What Chroma's pipelines make of a prompt: 1 and 0 are added to the logits, and padding is still read."""
    family = FAMILIES["chroma"]
    pipe, numbers = family.pipeline(), {"mask_dtype": torch.float32}
    stock = family.run(pipe, **numbers)
    assert not torch.equal(stock, family.run(pipe, pad=3.0, **numbers)), "padding is read"
    with enabled(pipe) as handle:
        with pytest.warns(RuntimeWarning, match=r"prompt_attention_mask\.bool"):
            assert torch.equal(family.run(pipe, **numbers), stock)
        (reason,) = handle.report().dense_calls
        assert reason.startswith("a mask of numbers")
        family.run(pipe)
        assert handle.report().dense_calls == {}


def test_a_prompt_of_chroma_runs_sparse_with_its_masks_as_booleans():
    """What the card says to do, and why."""
    pipe = FAMILIES["chroma"].pipeline()
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    with seeded(0):
        pipe.text_encoder = T5EncoderModel(T5Config(**sizes)).eval()
    pipe.tokenizer = word_tokenizer()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 256, "width": 256, "num_inference_steps": 2, "output_type": "latent"}
    words = {
        "prompt": "a large green square",
        "negative_prompt": "stars",
        "max_sequence_length": 16,
    }
    names = [
        f"{prefix}prompt_{part}"
        for prefix in ("", "negative_")
        for part in ("embeds", "ids", "attention_mask")
    ]
    encoded = dict(zip(names, pipe.encode_prompt(**words), strict=True))
    given = {name: encoded[name] for name in names if not name.endswith("ids")}
    assert given["prompt_attention_mask"].is_floating_point(), "else the card says too little"
    with enabled(pipe) as handle:
        with pytest.warns(RuntimeWarning, match="mask of numbers"):
            pipe(**words, **call)
        assert handle.report().density == 1.0
        masks = {name: x.bool() for name, x in given.items() if name.endswith("mask")}
        pipe(**{**given, **masks}, **call)
        assert handle.report().dense_calls == {}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("chroma", chroma),
        ("hunyuan-image", hunyuan_image),
        ("hunyuan-image-refiner", hunyuan_image),
    ],
)
def test_padding_is_hidden_wherever_the_tokenizer_puts_it(name, module, monkeypatch):
    """Here in front of the words."""
    family = FAMILIES[name]

    def padded_in_front(*args):
        return tuple(x.flip(1) for x in padded(*args))

    monkeypatch.setattr(module, "padded", padded_in_front)
    pipe = family.pipeline()
    stock = family.run(pipe)
    with enabled(pipe) as handle:
        out = family.run(pipe)
        assert handle.report().dense_calls == {}
    assert torch.allclose(out, stock, rtol=0, atol=5e-5 * stock.abs().max().item())


# -- what changes in mid-run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [None, 1])
def test_guidance_may_end_where_blocks_of_all_layers_are_chosen(refresh):
    """Scores were sampled of two branches in one batch, and one of them is left."""
    family, names = FAMILIES["sd3"], ["prompt_embeds", "pooled_prompt_embeds"]
    pipe = family.pipeline()

    def end_guidance(pipe, step, t, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
            tensors |= {name: tensors[name].chunk(2)[-1] for name in names}
        return tensors

    method = Auto(budget="model_percentile", block=32, refresh=refresh)
    with sparsediff.enable(pipe, method, schedule=Schedule(dense_steps=2)) as handle:
        out = family.run(
            pipe,
            steps=5,
            guidance="batched",
            callback_on_step_end=end_guidance,
            callback_on_step_end_tensor_inputs=["latents", *names],
        )
        steps = handle.report().steps
    assert out.isfinite().all()
    assert [step.dense_share for step in steps] == [1, 1, 0, 0, 0]


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_a_sparse_attention_of_its_own_is_refused():
    family = FAMILIES["kandinsky-5"]
    pipe = family.pipeline()
    pipe.transformer.register_to_config(attention_type="nabla")
    with pytest.raises(ValueError, match="register_to_config"):
        enabled(pipe)
    handle = sparsediff.enable(pipe, EVERYTHING, on_unsupported="dense")
    assert "NABLA" in handle.unsupported["transformer"]
    pipe.transformer.register_to_config(attention_type="regular")
    with enabled(pipe) as handle:
        assert family.run(pipe).isfinite().all()
        assert handle.report().dense_calls == {}


def test_a_backend_that_hides_attention_is_refused():
    from diffusers.models.attention_dispatch import attention_backend

    pipe = FAMILIES["cosmos"].pipeline()
    with attention_backend("flex"), pytest.raises(ValueError, match="flex"):
        enabled(pipe)
    enabled(pipe).disable()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_backend_that_hides_attention_later_is_told():
    from diffusers.models.attention_dispatch import attention_backend

    family = FAMILIES["cosmos"]
    pipe = family.pipeline()
    with enabled(pipe) as handle:
        with attention_backend("flex"), pytest.warns(RuntimeWarning, match="could not be caught"):
            family.run(pipe)
        report = handle.report()
        assert report.density == 1
        assert list(report.dense_calls) == [NOT_CAUGHT]
        family.run(pipe)
        assert NOT_CAUGHT not in handle.report().dense_calls


def test_masks_that_are_no_tensors_are_refused():
    pipe = FAMILIES["wan"].pipeline()
    attention = pipe.transformer.blocks[0].attn1
    with enabled(pipe), torch.no_grad(), pytest.raises(TypeError, match="masks that are tensors"):
        attention(torch.zeros(1, 144, 24), None, object(), None)


def test_unknown_models_raise_with_the_list():
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel.__new__(SanaTransformer2DModel)
    torch.nn.Module.__init__(model)
    with pytest.raises(ValueError, match="no adapter for SanaTransformer2DModel") as refused:
        sparsediff.enable(model)
    assert all(name in str(refused.value) for name in ADAPTERS)


# -- packed sequences ---------------------------------------------------------------------------------------------


def walk(frames, height, width, first_time=0.0):
    """Coordinates `[3, S]` of a video, with uneven steps of time."""
    time = first_time + torch.arange(frames).square()
    axes = time, torch.arange(height) - height / 2, torch.arange(width) * 32.0
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).double()


sizes = st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(2, 6))


@given(
    sizes, st.integers(0, 2), st.integers(0, 2), st.sampled_from(["[B, 3, S]", "ends", "[S, 3]"])
)
def test_a_video_is_found_among_reference_frames(shape, before, after, form):
    """References, at a time that does not go on, are no part of it."""
    _, height, width = shape
    # In front: later than the video begins.  Behind: its first frame again.
    front = [walk(1, height, width, first_time=100.0 - i) for i in range(before)]
    behind = [walk(1, height, width) for _ in range(after)]
    places = torch.cat([*front, walk(*shape), *behind], dim=1)
    coordinates = {
        "[B, 3, S]": places[None].repeat(2, 1, 1),
        "ends": torch.stack([places, places + 1], -1)[None],
        "[S, 3]": places.T,
    }[form]
    grid = volume_beside(coordinates)
    assert grid.shape == shape
    assert grid.num_tokens == places.shape[1]
    first = before * height * width
    assert grid.grid_span == (first, first + shape[0] * height * width)
    assert volume_beside(coordinates) is grid, "read once"


@pytest.mark.parametrize("sizes", [(None, None, None), (1, 1, 1)])
def test_coordinates_speak_where_sizes_do_not(sizes):
    adapter = adapter_for(FAMILIES["ltx"].pipeline().transformer)
    call = {"hidden_states": torch.zeros(1, 144 + 48, 8), "video_coords": None}
    call |= dict(zip(("num_frames", "height", "width"), sizes, strict=True))
    guide, video = walk(1, 6, 8, first_time=50.0), walk(3, 6, 8)
    told = {**call, "video_coords": torch.cat([guide, video], 1)[None]}
    assert str(adapter.token_grid(None, told)) == "48 image + 3x6x8"
    if None in sizes:
        with pytest.raises(ValueError, match="neither the size"):
            adapter.token_grid(None, call)
    known = {**call, "num_frames": 3, "height": 6, "width": 8}
    assert str(adapter.token_grid(None, known)) == "3x6x8 + 48 image"
    with pytest.raises(ValueError, match="192 tokens for a latent video of 9x6x8"):
        adapter.token_grid(None, {**known, "num_frames": 9})


def test_scattered_tokens_are_no_video():
    places = torch.rand(1, 3, 50, generator=generator(0))
    places[0, 0] = 0.0
    with pytest.raises(ValueError, match="no video walked row by row"):
        volume_beside(places)


@given(st.lists(st.integers(0, 2), max_size=12))
def test_runs_are_the_equal_neighbours(values):
    found = runs(torch.tensor(values, dtype=torch.long))
    assert [v for a, b in found for v in values[a:b]] == values
    assert all(len(set(values[a:b])) == 1 for a, b in found)
    assert all(values[b - 1] != values[b] for _, b in found[:-1])

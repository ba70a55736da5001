"""Image families: where the tokens of an image, its references and its words lie, and what runs dense with which reason."""

import math
from functools import partial

import pytest
import torch
from families import flux2, mochi, qwen_image, sd3, z_image
from families.registry import embeddings, generator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sparsediff
from sparsediff import Auto, Custom, Schedule
from sparsediff.adapter import adapter_for
from sparsediff.methods import AttentionSite
from sparsediff.pipelines.image_ids import size_from_ids
from sparsediff.token_grid import TokenGrid

EVERYTHING = Custom(density=1.0, block=32, search="sparse")
HALF = Auto(density=0.5, block=32)
NEVER_DENSE = Schedule()


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    """Dense masks too go through the sparse kernel."""
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)


def close(out, stock):
    return torch.allclose(out, stock, rtol=0, atol=5e-5 * stock.abs().max().item())


def image_ids(height, width, *, number=0):
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return torch.cat([torch.full((height * width, 1), number), places], 1)


# -- sizes from position ids ---------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 330),
    width=st.integers(1, 330),
    reference=st.none() | st.tuples(st.integers(1, 20), st.integers(1, 20)),
    form=st.sampled_from(
        [(torch.int64, 1), (torch.float32, 1), (torch.float32, 0.5), (torch.bfloat16, 1)]
    ),
    batched=st.booleans(),
)
def test_sizes_are_read_from_ids(height, width, reference, form, batched):
    """Also in bfloat16, which rounds rows and columns beyond 256 and is what pipelines send; and in half steps (Flux.3)."""
    dtype, step = form
    ids = image_ids(height, width)
    if reference is not None:
        ids = torch.cat([ids, image_ids(*reference, number=10)])
    ids = ids.to(dtype)
    ids[:, 1:] *= step
    ids = ids[None].expand(2, -1, -1) if batched else ids
    assert size_from_ids(ids) == (height, width)


def test_ids_that_are_no_rectangle_are_refused():
    ids = image_ids(6, 8)
    shuffled = ids[torch.randperm(48, generator=generator(0))]
    backwards = torch.stack([ids[:, 0], ids[:, 1], 7 - ids[:, 2]], 1)
    for broken in (ids[:-1], ids.flip(0), shuffled, backwards, torch.zeros_like(ids)):
        with pytest.raises(ValueError, match="do not walk a rectangle"):
            size_from_ids(broken)


def test_ids_come_to_the_host_once_a_generation(monkeypatch):
    ids, reads = image_ids(6, 8), []
    stock = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: reads.append(x) or stock(x))
    for _ in range(3):
        assert size_from_ids(ids) == (6, 8)
    assert len(reads) == 1


# -- auto ------------------------------------------------------------------------------------------------------------


@given(height=st.integers(16, 256), width=st.integers(16, 256))
def test_the_default_method_walks_an_image_in_patches(height, width):
    grid = TokenGrid.video(1, height, width, text=512, text_first=True)
    site = AttentionSite(
        layer=0, num_layers=1, step=0, num_steps=1, sigma=1.0, branch="", grid=grid
    )
    method = Auto()
    (window,) = method.order(site).windows
    assert window in ((1, 8, 8), (1, 8, 16))
    assert math.prod(window) == method.block_size(grid)[0]


# -- Flux.2 ----------------------------------------------------------------------------------------------------------


def test_reference_keys_in_a_cache_run_dense_and_say_so():
    pipe = flux2.build("Flux2KleinKVPipeline", is_distilled=True)
    pipe.set_progress_bar_config(disable=True)

    def run(**options):
        return pipe(
            prompt_embeds=embeddings(1, flux2.TEXT, flux2.CHANNELS),
            height=256,
            width=256,
            num_inference_steps=2,
            output_type="latent",
            generator=generator(0),
            **options,
        ).images

    reference = Image.new("RGB", (128, 128), "red")
    stock, alone = run(image=reference), run()
    with sparsediff.enable(pipe, HALF, schedule=NEVER_DENSE) as handle:
        with pytest.warns(RuntimeWarning, match="key and value cache"):
            assert torch.equal(run(image=reference), stock)
        reasons = handle.report().dense_calls
        # Two calls a layer where the cache is filled, references among themselves in the second.
        assert reasons == {"reference images go through a key and value cache": 9}
        assert not torch.equal(run(), alone)
        assert handle.report().dense_calls == {}


# -- Qwen-Image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layered", [False, True])
def test_references_and_layers_of_qwen_image(layered):
    changes = {"use_layer3d_rope": True, "use_additional_t_cond": True} if layered else {}
    model = qwen_image.build(**changes).transformer
    image, reference = (1, 12, 10), (1, 8, 8)
    shapes = [image, image, image, reference] if layered else [image, reference]
    tokens = sum(f * h * w for f, h, w in shapes)
    arguments = {
        "hidden_states": embeddings(1, tokens, 16),
        "encoder_hidden_states": embeddings(1, 20, qwen_image.CHANNELS),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [shapes],
        **({"additional_t_cond": torch.zeros(1, dtype=torch.long)} if layered else {}),
    }
    with torch.no_grad():
        stock = model(**arguments).sample
        with sparsediff.enable(model, EVERYTHING, schedule=NEVER_DENSE) as handle:
            handle.begin_generation(1)
            assert close(model(**arguments).sample, stock)
            report = handle.report()
    assert report.dense_calls == {}
    assert report.grid == f"20 text + {3 if layered else 1}x12x10 + 64 image"


def test_layers_of_different_sizes_are_no_grid():
    model = qwen_image.build(use_layer3d_rope=True).transformer
    arguments = {
        "img_shapes": [[(1, 4, 4), (1, 4, 5), (1, 4, 4)]],
        "encoder_hidden_states": embeddings(1, 3, 16),
    }
    with pytest.raises(ValueError, match="layers of different sizes"):
        adapter_for(model).token_grid(model, arguments)


# -- Z-Image ---------------------------------------------------------------------------------------------------------


def z_call(model, images, captions, **options):
    with torch.no_grad():
        return model(images, torch.tensor([0.5] * len(images)), captions, **options).sample


def test_captions_of_different_lengths_are_padded_and_hidden():
    model = z_image.build().transformer
    images = [embeddings(16, 1, 20, 22, seed=i) for i in range(3)]
    captions = [embeddings(n, z_image.CHANNELS, seed=n) for n in (5, 40, 100)]
    stock = z_call(model, images, captions)
    with sparsediff.enable(model, EVERYTHING, schedule=NEVER_DENSE) as handle:
        handle.begin_generation(1)
        out, report = z_call(model, images, captions), handle.report()
    assert report.dense_calls == {}
    assert report.grid == "1x10x11 + 146 text"  # 18 tokens pad the image, 128 hold the caption
    assert all(close(a, b) for a, b in zip(out, stock, strict=True))


def test_sequences_that_are_not_mapped_run_dense():
    model = z_image.build().transformer
    sizes = [embeddings(16, 1, 16, 20), embeddings(16, 1, 16, 24)]
    captions = [embeddings(8, z_image.CHANNELS) for _ in sizes]
    stock = z_call(model, sizes, captions)
    with sparsediff.enable(model, HALF, schedule=NEVER_DENSE) as handle:
        handle.begin_generation(1)
        with pytest.warns(RuntimeWarning, match="images of different sizes in one batch"):
            out = z_call(model, sizes, captions)
        assert all(torch.equal(a, b) for a, b in zip(out, stock, strict=True))
        omni = {"x": [sizes], "cap_feats": [captions]}
        with pytest.raises(ValueError, match="several captions and images"):
            handle.states[0].adapter.token_grid(model, omni)


# -- Stable Diffusion 3 and Mochi: calls of one forward that see different tokens -----------------------------------


def test_fused_projections_of_stable_diffusion_3():
    # 3.5 medium cannot be fused in stock diffusers: its second attention has no text.
    pipe = sd3.build()
    run = partial(sd3.FAMILIES[0].run, pipe)
    pipe.transformer.fuse_qkv_projections()
    stock = run()
    with sparsediff.enable(pipe, EVERYTHING, schedule=NEVER_DENSE) as handle:
        assert close(run(), stock)
        assert handle.report().dense_calls == {}
    assert torch.equal(run(), stock)


def test_the_second_attention_of_stable_diffusion_3_sees_the_image_alone():
    pipe = sd3.build(dual_attention_layers=(0,), qk_norm="rms_norm")
    seen = {}
    with sparsediff.enable(pipe, HALF, schedule=NEVER_DENSE) as handle:
        handle.states[0].witness = lambda call: seen.update({call.layer: call.grid})
        sd3.FAMILIES[1].run(pipe)
    assert {
        name.removeprefix("transformer.transformer_blocks."): str(g) for name, g in seen.items()
    } == {
        "0.attn": f"1x16x16 + {sd3.TEXT} text",
        "0.attn2": "1x16x16",
        "1.attn": f"1x16x16 + {sd3.TEXT} text",
    }


def test_skip_layer_guidance_adds_a_call_with_blocks_of_its_own():
    pipe = sd3.build()
    options = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "steps": 4}
    options |= {"skip_layer_guidance_stop": 1.0}
    stock = sd3.FAMILIES[0].run(pipe, **options)
    with sparsediff.enable(pipe, EVERYTHING, schedule=NEVER_DENSE) as handle:
        assert close(sd3.FAMILIES[0].run(pipe, **options), stock)
        assert handle.report().dense_calls == {}
    with sparsediff.enable(pipe, HALF, schedule=Schedule(dense_steps=1)) as handle:
        assert not torch.equal(sd3.FAMILIES[0].run(pipe, **options), stock)
        slots = handle.states[0]._slots
        assert list(slots) == ["call 1", "call 2"]
        assert [len(s[1].bitmap) for s in slots.values()] == [2, 1]
        assert slots["call 2"][0] is None, "the layer that is skipped"


def test_each_sample_of_mochi_has_blocks_of_its_own():
    pipe, calls = mochi.build(), []
    with sparsediff.enable(pipe, HALF, schedule=Schedule(dense_steps=1)) as handle:
        handle.states[0].witness = calls.append
        mochi.FAMILIES[0].run(pipe, steps=3)
        branches = set(handle.states[0]._slots)
        slots = [layers[0] for layers in handle.states[0]._slots.values()]
    assert branches == {"cond_uncond", "cond_uncond, sample 2"}
    assert {str(call.grid) for call in calls if call.bitmap is not None} == {
        "3x6x8 + 3 text",
        "3x6x8 + 17 text",
    }
    assert not torch.equal(slots[0].bitmap[..., :4, 0], slots[1].bitmap[..., :4, 0])

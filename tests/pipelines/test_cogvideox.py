"""CogVideoX: text and video in one attention, processors that call PyTorch themselves."""

import pytest
import torch

import sparsediff
from sparsediff import Schedule
from sparsediff.pipelines import tiny

DENSE = Schedule(dense_steps=1.0)


def generate(pipe, size=(64, 64, 17), prompt="a large red star spinning", **kwargs):
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 40, **kwargs}
    height, width, frames = size
    return pipe(
        prompt,
        height=height,
        width=width,
        num_frames=frames,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **call,
    ).frames


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    pipe = tiny.load("tiny-cogvideox")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("fused", [False, True])
def test_dense_is_stock_and_disable_restores(pipe, fused):
    if fused:
        pipe.transformer.fuse_qkv_projections()
    processors = [b.attn1.processor for b in pipe.transformer.transformer_blocks]
    stock = generate(pipe)
    with sparsediff.enable(pipe, schedule=DENSE) as handle:
        assert torch.equal(generate(pipe), stock)
        assert handle.report().density == 1.0
    assert [b.attn1.processor for b in pipe.transformer.transformer_blocks] == processors
    assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("size", [(64, 64, 17), (48, 80, 13)])
@pytest.mark.parametrize("windows", [(), ((1, 8, 8), (5, 2, 2)), ("HWF", "FHW", "WFH")])
def test_keeping_everything_changes_nothing(pipe, windows, size):
    stock = generate(pipe, size)
    everything = sparsediff.Custom(density=1.0, windows=windows)
    with sparsediff.enable(pipe, everything, schedule=Schedule()) as handle:
        out = generate(pipe, size)
        assert handle.report().dense_calls == {}
    assert torch.allclose(out, stock, rtol=0, atol=5e-5 * stock.abs().max().item())


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sparse_keeps_text_and_differs(pipe, scale):
    stock = generate(pipe, guidance_scale=scale)
    with sparsediff.enable(pipe, density=0.2, schedule=Schedule(dense_steps=1)) as handle:
        out, report = generate(pipe, guidance_scale=scale), handle.report()
        again = generate(pipe, guidance_scale=scale)
        slot = next(iter(handle.states[0]._slots.values()))[0]
        keep = slot.mask((64, 64), 360).to_dense()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(out, again)
    assert report.grid == "40 text + 5x8x8"
    # 320 video tokens come first after the reordering: the sixth block is text alone
    assert keep[..., 5, :].all()
    assert keep[..., :, 5].all()
    assert not keep[..., :5, :5].all()
    assert keep.shape[0] == (
        1 if scale == 1.0 else 2
    )  # both branches in one batch, each with a mask of its own


def test_a_padding_mask_runs_dense(pipe):
    block = pipe.transformer.transformer_blocks[0].attn1
    with sparsediff.enable(pipe, schedule=Schedule()) as handle:
        handle.begin_generation(1)
        stock, ours = block.processor.original, block.processor
        video, text = torch.randn(1, 320, 192), torch.randn(1, 40, 192)
        mask = torch.zeros(1, 1, 360)
        for a, b in zip(
            stock(block, video, text, mask), ours(block, video, text, mask), strict=True
        ):
            assert torch.equal(a, b)


def test_a_grid_that_the_patch_does_not_divide_is_named(pipe):
    adapter = sparsediff.adapter.adapter_for(pipe.transformer)
    arguments = {
        "hidden_states": torch.zeros(1, 5, 16, 9, 16),
        "encoder_hidden_states": torch.zeros(1, 40, 128),
    }
    with pytest.raises(
        ValueError, match=r"\(5, 9, 16\) is not a multiple of the patch \(1, 2, 2\)"
    ):
        adapter.token_grid(pipe.transformer, arguments)

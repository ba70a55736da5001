"""Real Wan pipelines at tiny random sizes: what `enable` must and must not change."""

import contextlib
import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sparsediff
from sparsediff import Auto, DraftAttention, LiteAttention, Schedule, adapter
from sparsediff.pipelines.releases import installed, reaches
from sparsediff.testing import random_wan_pipeline

VARIANTS = ("t2v", "t2v-2.2", "ti2v-2.2", "i2v", "vace")
DENSE = Schedule(dense_steps=1.0)
SPARSE = Schedule()
HALF = Auto(density=0.4, block=64)
EVERYTHING = LiteAttention(
    threshold=-1e9, tile=(64, 64)
)  # visits every block through the sparse kernel


def generate(pipe, *, height=128, width=128, frames=17, steps=3, guidance=3.0, seed=0, **kwargs):
    """Latents `[1, C, F, H, W]` of one prompt."""
    pipe.set_progress_bar_config(disable=True)
    if type(pipe).__name__ == "WanImageToVideoPipeline":
        from PIL import Image

        kwargs.setdefault("image", Image.new("RGB", (width, height), (200, 40, 40)))
    return pipe(
        prompt="a small red circle moves left",
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=512 if "image" in kwargs else 16,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    ).frames


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    pipe = random_wan_pipeline(request.param)
    return pipe, generate(pipe)


@pytest.fixture
def pipe():
    return random_wan_pipeline()


def test_dense_schedule_is_bit_identical(variant):
    pipe, stock = variant
    with sparsediff.enable(pipe, schedule=DENSE) as handle:
        assert torch.equal(generate(pipe), stock)
        report = handle.report()
    assert report.density == 1.0
    assert report.dense_calls == {"schedule: every step": report.calls}


def test_full_mask_through_the_sparse_kernel_is_within_rounding(variant):
    pipe, stock = variant
    with sparsediff.enable(pipe, EVERYTHING) as handle:
        out = generate(pipe)
        report = handle.report()
    assert report.dense_calls == {}, "the sparse kernel must have run"
    assert torch.allclose(out, stock, rtol=0, atol=2e-5 * stock.abs().max().item())


def test_sparse_run_is_finite_and_different(variant):
    pipe, stock = variant
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        out = generate(pipe)
        report = handle.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert report.density == pytest.approx(0.4, abs=0.03)
    assert len(report.steps) == 3


def test_disable_restores_everything(variant):
    pipe, stock = variant
    models = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]

    def fingerprint():
        return [
            (
                [
                    (n, m.processor, m.processor._attention_backend)
                    for n, m in model.named_modules()
                    if hasattr(m, "processor")
                ],
                sorted(vars(model)),
                len(model._forward_pre_hooks),
                len(model._forward_hooks),
                sorted(vars(pipe)),
            )
            for model in models
        ]

    before = fingerprint()
    handle = sparsediff.enable(pipe, HALF, schedule=SPARSE)
    generate(pipe)
    assert fingerprint() != before
    handle.disable()
    assert fingerprint() == before
    assert not handle.enabled
    assert torch.equal(generate(pipe), stock)
    handle.disable()  # a second call does nothing
    sparsediff.disable(pipe)


@pytest.mark.parametrize(
    "method",
    [HALF, LiteAttention(threshold=-2.0, tile=(64, 64)), DraftAttention(pool_h=8, pool_w=8)],
    ids=lambda m: m.name,
)
def test_a_second_generation_equals_a_fresh_pipeline(method):
    pipe = random_wan_pipeline()
    with sparsediff.enable(pipe, method, schedule=SPARSE):
        generate(pipe, seed=1)
        second = generate(pipe, seed=0)
    fresh = random_wan_pipeline()
    with sparsediff.enable(fresh, method, schedule=SPARSE):
        assert torch.equal(generate(fresh, seed=0), second)


def test_a_second_generation_equals_a_fresh_process(pipe, tmp_path):
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        generate(pipe, seed=1)
        second = generate(pipe, seed=0)
    code = f"""
import sys; sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
import torch, sparsediff, test_wan
torch.set_num_threads({torch.get_num_threads()})
pipe = test_wan.random_wan_pipeline()
sparsediff.enable(pipe, test_wan.HALF, schedule=test_wan.SPARSE)
torch.save(test_wan.generate(pipe, seed=0), {str(tmp_path / "fresh.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "fresh.pt"), second)


def test_two_resolutions_in_a_row(pipe):
    sizes = [{"height": 128, "width": 128}, {"height": 96, "width": 176, "frames": 21}]
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        outs, grids = [], []
        for size in sizes:
            outs.append(generate(pipe, **size))
            grids.append(handle.report().grid)
    assert grids == ["5x8x8", "6x6x11"]
    for size, out in zip(sizes, outs, strict=True):
        fresh = random_wan_pipeline()
        with sparsediff.enable(fresh, HALF, schedule=SPARSE):
            assert torch.equal(generate(fresh, **size), out)


def test_a_grid_that_no_patch_or_block_divides(pipe):
    stock = generate(pipe, height=112, width=144, frames=21)
    with sparsediff.enable(pipe, EVERYTHING):
        full = generate(pipe, height=112, width=144, frames=21)
    assert torch.allclose(full, stock, rtol=0, atol=2e-5 * stock.abs().max().item())
    with sparsediff.enable(pipe, DraftAttention(pool_h=8, pool_w=8), schedule=SPARSE):
        assert generate(pipe, height=112, width=144, frames=21).isfinite().all()


def test_guidance_branches_keep_their_own_masks():
    """What one branch skips must not depend on whether the other ran."""
    model = random_wan_pipeline().transformer
    g = torch.Generator().manual_seed(0)
    latents, other, text = (
        torch.randn(1, 16, 5, 16, 16, generator=g),
        torch.randn(1, 16, 5, 16, 16, generator=g),
        torch.zeros(1, 16, 32),
    )

    def run(branches):
        outs = []
        for t in (900.0, 600.0):
            for name, x in branches.items():
                with torch.no_grad(), model.cache_context(name):
                    out = model(x, torch.tensor([t]), text, return_dict=False)[0]
                if name == "uncond":
                    outs.append(out)
        return outs

    with sparsediff.enable(model, LiteAttention(threshold=-2.0, tile=(64, 64))) as handle:
        together = run({"cond": other, "uncond": latents})
        assert set(handle.states[0]._slots) == {"cond", "uncond"}
        assert handle.report().steps[1].density < 0.95, "masks must have evolved"
        alone = run({"uncond": latents})
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_guidance_off_makes_one_branch(pipe):
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        generate(pipe, guidance=1.0)
        assert set(handle.states[0]._slots) == {"cond"}
        assert handle.report().calls == 3 * 2


def test_both_experts_run_sparse():
    pipe = random_wan_pipeline("t2v-2.2")
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        generate(pipe, steps=4)
        report = handle.report()
    names = {layer.name.split(".")[0]: layer.calls for layer in report.layers}
    assert set(names) == {"transformer", "transformer_2"}
    assert [s.step for s in report.steps] == [0, 1, 2, 3], (
        "steps are the pipeline's, not each expert's"
    )
    assert report.num_steps == 4


def test_an_exception_in_mid_run_leaves_the_pipeline_usable(pipe):
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        expected = generate(pipe)

        def stop(pipe, step, timestep, kwargs):
            if step == 1:
                raise KeyboardInterrupt
            return kwargs

        with pytest.raises(KeyboardInterrupt):
            generate(pipe, seed=5, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), expected)
    generate(pipe)


def test_enabling_twice_replaces_the_settings(pipe):
    stock = generate(pipe)
    first = sparsediff.enable(pipe, HALF, schedule=SPARSE)
    second = sparsediff.enable(pipe, HALF, schedule=DENSE)
    assert not first.enabled
    assert second.enabled
    assert torch.equal(generate(pipe), stock)
    first.disable()  # a stale handle must not undo the new one
    assert second.enabled
    assert second.report().calls
    second.disable()
    assert torch.equal(generate(pipe), stock)


def test_a_bare_transformer_follows_its_timesteps():
    model = random_wan_pipeline().transformer
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 16, 5, 16, 16, generator=g), torch.randn(1, 16, 32, generator=g)

    def loop():
        for t in (900.0, 600.0, 300.0):
            for branch in ("cond", "uncond"):
                with torch.no_grad(), model.cache_context(branch):
                    out = model(x, torch.tensor([t]), text, return_dict=False)[0]
        return out

    with sparsediff.enable(model, HALF, schedule=SPARSE) as handle:
        first, again = loop(), loop()
        report = handle.report()
    assert torch.equal(first, again)
    assert [s.step for s in report.steps] == [0, 1, 2]
    assert [s.sigma for s in report.steps] == pytest.approx([0.9, 0.6, 0.3])
    with sparsediff.enable(model, HALF, schedule=Schedule(dense_steps=1)) as handle:
        handle.begin_generation(3)
        loop()
        assert [s.dense_share for s in handle.report().steps] == [1.0, 0.0, 0.0]


def test_gradients_take_the_stock_path_and_are_reported(pipe):
    model = pipe.transformer
    x = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        with pytest.warns(RuntimeWarning, match="gradients are on"):
            loss = (
                model(x, torch.tensor([500.0]), torch.zeros(1, 16, 32), return_dict=False)[0]
                .square()
                .mean()
            )
        loss.backward()
        assert model.blocks[0].attn1.to_q.weight.grad is not None
        assert handle.report().dense_calls == {"gradients are on": 2}


def test_short_sequences_run_dense_and_say_so(pipe):
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        with pytest.warns(RuntimeWarning, match="too few"):
            out = generate(pipe, height=32, width=32, frames=5)
        report = handle.report()
    assert torch.equal(out, generate(pipe, height=32, width=32, frames=5))
    assert report.density == 1.0
    assert "too few" in handle.summary()


def test_the_progress_bar_shows_density(pipe, capsys):
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        pipe.set_progress_bar_config(disable=False)
        stock_config = pipe._progress_bar_config
        pipe(
            "a circle",
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=2,
            max_sequence_length=16,
            output_type="latent",
        )
    assert pipe._progress_bar_config is stock_config
    assert "density 0.4" in capsys.readouterr().err


def test_nothing_keeps_a_disabled_pipeline_alive():
    pipe = random_wan_pipeline()
    model = weakref.ref(pipe.transformer)
    handle = sparsediff.enable(pipe, HALF)
    handle.disable()
    del pipe, handle
    gc.collect()
    assert model() is None


# -- other features of diffusers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("form", ["module.compile", "torch.compile", "repeated_blocks"])
def test_compile_fullgraph(form):
    torch._dynamo.reset()
    pipe = random_wan_pipeline()
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        expected = generate(pipe)
    counter = CompileCounterWithBackend("aot_eager")
    if form == "torch.compile":
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    sparsediff.enable(pipe, HALF, schedule=SPARSE)
    if form == "module.compile":
        pipe.transformer.compile(fullgraph=True, backend=counter)
    if form == "repeated_blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    out = generate(pipe)
    assert torch.allclose(out, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert counter.frame_count == 1, "one graph serves every step, branch and layer"
    sparsediff.disable(pipe)
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["enable", "offload"])
def test_model_cpu_offload(first, monkeypatch):
    pipe = random_wan_pipeline()
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        expected = generate(pipe)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    handle = sparsediff.enable(pipe, HALF, schedule=SPARSE)
    if first == "enable":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # hooks installed the wrong way survive one run only
        assert torch.equal(generate(pipe), expected)
        assert handle.report().density < 0.5
    handle.disable()
    assert not torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("first", ["enable", "offload"])
def test_group_offload(first):
    if not reaches("0.41") and torch.accelerator.current_accelerator() is None:
        pytest.skip(f"diffusers {installed()} offloads groups of layers beside an accelerator only")
    pipe = random_wan_pipeline()
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        expected = generate(pipe)

    def offload():
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
        )

    if first == "offload":
        offload()
    handle = sparsediff.enable(pipe, HALF, schedule=SPARSE)
    if first == "enable":
        offload()
    for _ in range(2):
        assert torch.equal(generate(pipe), expected)
        assert handle.report().density < 0.5


def test_lora_loaded_and_fused_after_enabling(pipe, tmp_path):
    from peft import LoraConfig

    def add_lora(pipe):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            pipe.transformer.add_adapter(
                LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False),
                "style",
            )

    plain = generate(pipe)
    with sparsediff.enable(pipe, schedule=DENSE):
        add_lora(pipe)
        with_lora = generate(pipe)
        pipe.fuse_lora(components=["transformer"])
        fused = generate(pipe)
    assert not torch.allclose(with_lora, plain, atol=1e-3)
    assert torch.allclose(fused, with_lora, atol=1e-4)
    stock = random_wan_pipeline()
    add_lora(stock)
    assert torch.equal(generate(stock), with_lora)


def test_lora_from_a_file_under_a_sparse_pipeline(pipe, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    donor = random_wan_pipeline()
    donor.transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "style"
    )
    weights = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(donor.transformer, adapter_name="style")
    )
    type(donor).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        before = generate(pipe)
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        after = generate(pipe)
        assert handle.report().density < 0.5
        pipe.unload_lora_weights()
        assert torch.equal(generate(pipe), before)
    assert not torch.equal(after, before)


def test_fused_qkv(pipe):
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        expected = generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        assert torch.allclose(generate(pipe), expected, atol=1e-4)
    pipe.transformer.unfuse_qkv_projections()
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        assert torch.equal(generate(pipe), expected)


def test_save_and_load_ignore_the_patch(pipe, tmp_path):
    stock = generate(pipe)
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    # Loaded weights sit at other addresses, which changes the last bit of some matrix products.
    assert torch.allclose(generate(loaded), stock, rtol=0, atol=1e-5)


def test_the_users_attention_backend_serves_dense_calls(pipe):
    with sparsediff.enable(pipe, HALF, schedule=DENSE) as handle:
        pipe.transformer.set_attention_backend("_native_math")
        assert handle.states[0].wrappers[0].user_backend == "_native_math"
        generate(pipe)
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend == "_native_math"
    pipe.transformer.set_attention_backend("native")  # the setting is global in diffusers
    pipe.transformer.reset_attention_backend()


def test_our_backend_name_alone_is_refused(pipe):
    pipe.transformer.set_attention_backend("sparsediff")
    try:
        with pytest.raises(RuntimeError, match=r"sparsediff\.enable"):
            generate(pipe)
    finally:
        pipe.transformer.set_attention_backend("native")
        pipe.transformer.reset_attention_backend()


def test_context_parallelism_is_refused(pipe):
    with sparsediff.enable(pipe):
        processor = pipe.transformer.blocks[0].attn1.processor
        with pytest.raises(ValueError, match="context parallelism"):
            processor._parallel_config = object()


# -- odd orders and odd objects -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128, 17), (96, 112, 21), (48, 176, 49)], ids=str)
@pytest.mark.parametrize(
    "method",
    [Auto(density=1.0, block=64), DraftAttention(sparsity=0.0, pool_h=8, pool_w=8)],
    ids=lambda m: m.name,
)
def test_reordered_methods_that_keep_everything_change_nothing(method, size, monkeypatch):
    """Query, key and value must move together, and the output back."""
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)
    pipe = random_wan_pipeline()
    shape = dict(zip(("height", "width", "frames"), size, strict=True))
    stock = generate(pipe, **shape)
    with sparsediff.enable(pipe, method, schedule=SPARSE) as handle:
        out = generate(pipe, **shape)
        assert handle.report().dense_calls == {}
    assert torch.allclose(out, stock, rtol=0, atol=2e-5 * stock.abs().max().item())


def test_tokens_outside_the_grid_stay_exact(monkeypatch):
    """The last latent frame plays an image segment: its rows must see everything, and every row must see it."""
    from sparsediff import Segment, TokenGrid
    from sparsediff.pipelines.wan import WanAdapter

    real = WanAdapter.token_grid

    def with_image(self, model, arguments):
        f, h, w = real(self, model, arguments).shape
        grid = Segment(role="grid", length=(f - 1) * h * w, shape=(f - 1, h, w))
        return TokenGrid((grid, Segment(role="image", length=h * w)))

    monkeypatch.setattr(WanAdapter, "token_grid", with_image)
    pipe = random_wan_pipeline()
    with sparsediff.enable(pipe, Auto(density=0.2, block=64), schedule=SPARSE) as handle:
        generate(pipe, steps=1)
        state = handle.states[0]
        bitmaps = [slot.mask((64, 64), 320).to_dense() for slot in state._slots["cond"]]
    for keep in bitmaps:
        assert keep[..., 4, :].all()
        assert keep[..., :, 4].all()
        assert not keep[..., :4, :4].all()


def test_video_to_video_is_counted_from_where_it_starts():
    from diffusers import WanVideoToVideoPipeline
    from PIL import Image

    base = random_wan_pipeline()
    parts = {
        k: v
        for k, v in base.components.items()
        if k in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    }
    pipe = WanVideoToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with sparsediff.enable(pipe, HALF, schedule=Schedule(dense_steps=0.34)) as handle:
        pipe(
            video=[Image.new("RGB", (128, 128), (i * 10, 40, 90)) for i in range(17)], prompt="a", height=128, width=128,
            strength=0.5, num_inference_steps=6, max_sequence_length=16, output_type="latent",
        )  # fmt: skip
        report = handle.report()
    expected = pipe.scheduler.timesteps[3:].tolist()
    assert report.num_steps == 3
    assert [s.sigma for s in report.steps] == pytest.approx([t / 1000 for t in expected], abs=1e-3)
    assert [s.dense_share for s in report.steps] == [1.0, 1.0, 0.0]


def test_one_processor_object_may_serve_every_module(pipe):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    stock = generate(pipe)
    shared = WanAttnProcessor()
    pipe.transformer.set_attn_processor(shared)
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        generate(pipe)
        assert handle.report().density < 0.5
    assert pipe.transformer.blocks[1].attn1.processor is shared
    assert torch.equal(generate(pipe), stock)


def test_an_interrupt_while_enabling_restores(pipe, monkeypatch):
    stock = generate(pipe)
    calls = []
    real = adapter.wrap_processor

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(adapter, "wrap_processor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparsediff.enable(pipe, HALF)
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(generate(pipe), stock)
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        generate(pipe)
        assert handle.report().density < 0.5


def test_an_exception_inside_the_transformer_leaves_it_usable(pipe):
    with sparsediff.enable(pipe, HALF, schedule=SPARSE):
        expected = generate(pipe)
        broken = pipe.transformer.blocks[1].ffn.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(pipe)
        broken.remove()
        assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_an_enabled_pipeline_are_stock(pipe, how):
    stock = generate(pipe)
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        expected = generate(pipe)
        before = handle.report()
        if how == "deepcopy":
            copied = copy.deepcopy(pipe)
        else:
            copied = random_wan_pipeline()
            copied.transformer = pickle.loads(pickle.dumps(pipe.transformer))
        assert torch.allclose(generate(copied), stock, atol=1e-5)
        assert handle.report() == before, "the copy must not write into the original's report"
        with sparsediff.enable(copied, HALF, schedule=SPARSE) as second:
            assert torch.allclose(generate(copied), expected, atol=1e-5)
            assert second.report().density < 0.5
        assert torch.allclose(generate(copied), stock, atol=1e-5)
        assert torch.equal(generate(pipe), expected)


def test_a_replaced_processor_is_counted_as_dense(pipe):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    stock = generate(pipe)
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        pipe.transformer.blocks[0].attn1.processor = WanAttnProcessor()
        with pytest.warns(RuntimeWarning, match="was replaced after enable"):
            generate(pipe)
        report = handle.report()
        with pytest.warns(RuntimeWarning, match=r"blocks\.0\.attn1"):
            handle.disable()
    assert report.dense_calls == {"the attention processor was replaced after enable()": 6}
    assert torch.equal(generate(pipe), stock)


def test_a_replaced_transformer_is_said(pipe):
    with sparsediff.enable(pipe, HALF) as handle:
        pipe.transformer = random_wan_pipeline(seed=1).transformer
        with pytest.warns(RuntimeWarning, match=r"pipe\.transformer was replaced"):
            generate(pipe)
        sparsediff.disable(pipe)
        assert not handle.enabled


def test_enabling_one_expert_anew_leaves_the_other_enabled():
    pipe = random_wan_pipeline("t2v-2.2")
    both = sparsediff.enable(pipe, HALF, schedule=SPARSE)
    one = sparsediff.enable(pipe.transformer, HALF, schedule=SPARSE)
    generate(pipe, steps=4)
    assert {layer.name.split(".")[0] for layer in both.report().layers} == {"transformer_2"}
    assert one.report().calls
    sparsediff.disable(pipe)
    assert not both.enabled
    assert not one.enabled
    assert not pipe.transformer._forward_pre_hooks
    assert not pipe.transformer_2._forward_pre_hooks


def test_first_layers_of_vace_are_those_of_both_stacks():
    pipe = random_wan_pipeline("vace")
    with sparsediff.enable(pipe, HALF, schedule=Schedule(dense_layers=1)) as handle:
        generate(pipe)
        dense = {layer.name: layer.density == 1.0 for layer in handle.report().layers}
    assert dense == {
        "transformer.vace_blocks.0.attn1": True,
        "transformer.vace_blocks.1.attn1": False,
        "transformer.blocks.0.attn1": True,
        "transformer.blocks.1.attn1": False,
    }


def test_an_enabled_pipeline_is_collected_with_its_handle():
    pipe = random_wan_pipeline()
    model = weakref.ref(pipe.transformer)
    handle = sparsediff.enable(pipe, HALF, schedule=SPARSE)
    generate(pipe)
    del pipe, handle
    gc.collect()
    assert model() is None


def test_a_disabled_handle_keeps_its_report_but_not_the_model(pipe):
    pipe = random_wan_pipeline()
    model = weakref.ref(pipe.transformer)
    handle = sparsediff.enable(pipe, HALF, schedule=SPARSE)
    generate(pipe)
    handle.disable()
    del pipe
    gc.collect()
    assert model() is None
    assert handle.report().calls == 12


@pytest.mark.parametrize(
    "batch",
    [{"num_videos_per_prompt": 2}, {"prompt": ["a circle", "two stars"]}],
    ids=["videos", "prompts"],
)
@pytest.mark.parametrize(
    "method",
    [HALF, LiteAttention(threshold=-2.0, tile=(64, 64)), DraftAttention(pool_h=8, pool_w=8)],
    ids=lambda m: m.name,
)
def test_each_row_of_a_batch_has_its_own_mask(pipe, method, batch):
    pipe.set_progress_bar_config(disable=True)
    size = {
        "height": 128,
        "width": 128,
        "num_frames": 17,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    latents = torch.randn(2, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    with sparsediff.enable(pipe, method, schedule=SPARSE) as handle:
        together = pipe(**{"prompt": "a circle", **batch}, latents=latents, **size).frames
        for slot in handle.states[0]._slots["cond"]:
            assert slot.bitmap.shape[0] == 2
        for row in range(2):
            prompt = batch.get("prompt", ["a circle"] * 2)[row]
            alone = pipe(prompt=prompt, latents=latents[row : row + 1], **size).frames
            # A batch is rounded differently, which can turn the choice between two equally good blocks.
            assert (together[row : row + 1] - alone).norm() < 0.01 * alone.norm()


@pytest.mark.parametrize("cache", ["FirstBlockCacheConfig", "PyramidAttentionBroadcastConfig"])
def test_step_caches_beside_us(pipe, cache):
    import diffusers

    config = {
        "FirstBlockCacheConfig": lambda: diffusers.FirstBlockCacheConfig(threshold=10.0),
        "PyramidAttentionBroadcastConfig": lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: pipe._current_timestep,
        ),
    }[cache]()
    with sparsediff.enable(pipe, HALF, schedule=SPARSE) as handle:
        pipe.transformer.enable_cache(config)
        first, second = generate(pipe, steps=5), generate(pipe, steps=5)
        report = handle.report()
        pipe.transformer.disable_cache()
        assert torch.equal(first, second)
        assert report.calls < 5 * 2 * 2, "the cache must have skipped something"
        assert report.num_steps == 5
        assert [s.step for s in report.steps] == list(range(5))
        generate(pipe, steps=5)
        assert handle.report().calls == 5 * 2 * 2


def test_the_estimate_is_the_arithmetic_it_says(pipe):
    with sparsediff.enable(pipe, HALF, schedule=Schedule(dense_steps=1)) as handle:
        generate(pipe, height=256, width=256)
        report = handle.report()
    tokens, width, layers = 5 * 16 * 16, 24, 2
    attention = 4 * tokens * tokens * width * layers
    # four projections of self-attention, four of cross-attention and two of the feed-forward net, in each block
    linear = 2 * tokens * layers * (8 * 24 * 24 + 2 * 24 * 32)
    share = attention / (attention + linear)
    from sparsediff.recorder import KEPT_BLOCK_COST

    relative = 1 / 3 + 2 / 3 * KEPT_BLOCK_COST["cpu"] * report.steps[1].density
    assert report.estimated_speedup == pytest.approx(1 / (1 - share + share * relative), rel=1e-6)


@pytest.mark.parametrize("stop", ["interrupt flag", "KeyboardInterrupt", None])
def test_a_loop_of_ones_own_after_a_run(pipe, stop):
    """Whatever became of the run before, two equal loops give equal results, and each is one generation."""

    def stopping(pipe, step, timestep, kwargs):
        if stop == "KeyboardInterrupt":
            raise KeyboardInterrupt
        pipe._interrupt = stop == "interrupt flag"
        return kwargs

    def loop():
        x = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
        for t, step in ((900.0, 0.3), (600.0, 0.3), (300.0, 0.3)):
            for branch in ("cond", "uncond"):
                with torch.no_grad(), pipe.transformer.cache_context(branch):
                    v = pipe.transformer(
                        x, torch.tensor([t]), torch.zeros(1, 16, 32), return_dict=False
                    )[0]
            x = x - step * v
        return x

    method = LiteAttention(threshold=-2.0, tile=(64, 64))
    with sparsediff.enable(pipe, method) as handle:
        with contextlib.suppress(KeyboardInterrupt):
            generate(pipe, steps=20 if stop else 2, callback_on_step_end=stopping)
        first, second = loop(), loop()
        report = handle.report()
        generate(pipe)
        assert handle.report().num_steps == 3
    assert torch.equal(first, second)
    assert [s.step for s in report.steps] == [0, 1, 2]
    assert report.steps[0].density == 1.0
    assert report.steps[1].density < 0.95


def test_one_cache_context_for_two_calls_of_a_step(pipe):
    """Perturbed or skip-layer guidance calls a branch twice; each call has masks of its own and all are reported."""
    with sparsediff.enable(pipe, LiteAttention(threshold=-2.0, tile=(64, 64))) as handle:
        call = type(pipe.transformer).__call__
        again = []

        def forward_twice(module, args, kwargs, output):
            if not again:
                again.append(True)
                call(module, *args, **kwargs)
                again.clear()

        second = pipe.transformer.register_forward_hook(forward_twice, with_kwargs=True)
        generate(pipe)
        second.remove()
        report = handle.report()
    assert report.calls == 3 * 2 * 2 * 2
    assert len(report.steps) == 3


def test_dense_steps_between_sparse_ones_keep_the_running_mean():
    """The running mean mixes tensors of sparse steps and plain numbers of dense ones."""
    from sparsediff.recorder import Recorder

    recorder = Recorder(method="m", schedule="s")
    recorder.begin_generation(0)
    recorder.dense("a", 0, "why", warn=False)
    assert recorder.fold().tolist() == [1.0, 1.0]
    recorder.sparse("a", 1, torch.tensor([0.2, 0.4]))
    assert recorder.fold().tolist() == pytest.approx([0.3, 0.65])
    recorder.dense("a", 2, "why", warn=False)
    assert recorder.fold().tolist() == pytest.approx([1.0, 2.3 / 3])
    assert recorder.fold() is None

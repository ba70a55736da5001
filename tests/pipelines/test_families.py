"""What every supported family must do, on tiny random instances of the real pipelines.

A family takes part by a module in `families/`; nothing here names one.
"""

import inspect
import math

import pytest
import torch
from diffusers import DiffusionPipeline
from families.registry import all_families
from torch._dynamo.testing import CompileCounterWithBackend

import sparsediff
from sparsediff import Auto, Custom, Schedule
from sparsediff.adapter import adapter_for
from sparsediff.api import COMPONENTS
from sparsediff.block_mask import unpack_bits
from sparsediff.methods import build_method

BLOCK = 32
WINDOWS = {"no order": (), "one window": ((1, 4, 8),), "windows by head": ("HWF", (1, 4, 8))}
DENSE, NEVER_DENSE = Schedule(dense_steps=1.0), Schedule()
HALF = Auto(density=0.5, block=BLOCK)


def everything(windows=()):
    """Keeps every block, through the sparse kernel."""
    return Custom(density=1.0, windows=windows, block=BLOCK, search="sparse")


class Case:
    """A family, a pipeline of it, and what it gives untouched."""

    def __init__(self, family):
        self.family, self.pipe, self._stock = family, family.pipeline(), {}

    def run(self, size=None, **options):
        return self.family.run(self.pipe, size, **options)

    def stock(self, size=None, **options):
        key = (size or self.family.size, *sorted(options.items()))
        if key not in self._stock:
            self._stock[key] = self.run(size, **options)
        return self._stock[key]

    def assert_close(self, out, stock):
        error = (out - stock).abs().max().item()
        assert out.isfinite().all()
        assert error <= self.family.tolerance * stock.abs().max().item(), error


def transformers(pipe):
    """The pipeline's own, in order."""
    return [m for m in (getattr(pipe, name, None) for name in COMPONENTS) if m is not None]


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    """Dense masks too go through the sparse kernel."""
    monkeypatch.setattr("sparsediff.block_attention.CPU_BREAK_EVEN", 2.0)


@pytest.fixture(scope="module", params=all_families(), ids=str)
def case(request):
    return Case(request.param)


def sizes(case):
    return list(case.family.sizes.items())


def test_a_dense_schedule_is_bit_identical(case):
    stock = case.stock()
    with sparsediff.enable(case.pipe, HALF, schedule=DENSE) as handle:
        assert torch.equal(case.run(), stock)
        report = handle.report()
    assert report.density == 1.0
    assert report.dense_calls == {"schedule: every step": report.calls}


@pytest.mark.parametrize("which", [0, -1], ids=["usual size", "odd size"])
@pytest.mark.parametrize("windows", WINDOWS)
def test_keeping_everything_changes_nothing(case, windows, which):
    size, grid = sizes(case)[which]
    stock = case.stock(size)
    with sparsediff.enable(case.pipe, everything(WINDOWS[windows]), schedule=NEVER_DENSE) as handle:
        out, report = case.run(size), handle.report()
    assert report.dense_calls == {}
    assert report.grid == grid
    case.assert_close(out, stock)


def test_half_density_is_finite_repeats_and_leaves_the_rest_exact(case):
    stock, seen = case.stock(), []
    with sparsediff.enable(case.pipe, HALF, schedule=Schedule(dense_steps=1)) as handle:
        for state in handle.states:
            state.witness = seen.append
        out, report = case.run(), handle.report()
        again = case.run()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(out, again)
    assert 0.4 < report.steps[-1].density < 1.0
    assert set(report.dense_calls) <= {"schedule: first steps"}
    sparse = [call for call in seen if call.bitmap is not None]
    outside = {call.grid.num_tokens - math.prod(call.grid.shape) for call in sparse}
    expected = case.family.outside
    assert outside == set(expected if isinstance(expected, tuple) else (expected,))
    for call in sparse:
        tokens = call.grid.num_tokens
        keep = unpack_bits(call.bitmap, -(-tokens // BLOCK))
        start, stop = call.grid.grid_span
        inside = stop - start
        # A reordered grid stands in front, and all that is not grid behind it.
        first = (inside if call.order is not None or start == 0 else 0) // BLOCK
        last = -(-tokens // BLOCK) if first or start == 0 else -(-start // BLOCK)
        if tokens > inside:
            assert keep[..., first:last, :].all()
            assert keep[..., first:last].all()
        assert not keep.all()


def test_disable_restores_everything(case):
    pipe, stock = case.pipe, case.stock()

    def fingerprint():
        return [
            (
                [
                    (n, m.processor, vars(m.processor).get("_attention_backend"))
                    for n, m in model.named_modules()
                    if hasattr(m, "processor")
                ],
                sorted(vars(model)),
                len(model._forward_pre_hooks),
                len(model._forward_hooks),
                sorted(vars(pipe)),
            )
            for model in transformers(pipe)
        ]

    before = fingerprint()
    handle = sparsediff.enable(pipe, HALF, schedule=NEVER_DENSE)
    case.run()
    assert fingerprint() != before
    handle.disable()
    assert fingerprint() == before
    assert torch.equal(case.run(), stock)


def test_every_form_of_guidance(case):
    for guidance in case.family.guidance:
        stock = case.stock(guidance=guidance)
        with sparsediff.enable(case.pipe, everything(), schedule=NEVER_DENSE) as handle:
            case.assert_close(case.run(guidance=guidance), stock)
            assert handle.report().dense_calls == {}
            branches = {len(state._slots) for state in handle.states}
        both = guidance == "sequential" or (guidance == "batched" and case.family.by_sample)
        assert branches == {2 if both else 1}


def test_padded_text_is_hidden(case):
    if not case.family.masks:
        pytest.skip("this family attends to its padding, or has none")
    assert torch.equal(case.stock(pad=3.0), case.stock()), "stock diffusers hides padding"
    for method in (HALF, everything(), sparsediff.LiteAttention(tile=(BLOCK, BLOCK))):
        with sparsediff.enable(case.pipe, method, schedule=NEVER_DENSE) as handle:
            out, padded = case.run(), case.run(pad=3.0)
            assert handle.report().dense_calls == {}
        assert torch.equal(out, padded), method.name


def test_a_bare_transformer(case):
    stock = case.stock()
    if len(transformers(case.pipe)) > 1:
        pytest.skip("one of several experts")
    with sparsediff.enable(case.pipe.transformer, everything(), schedule=NEVER_DENSE) as handle:
        case.assert_close(case.run(), stock)
        assert handle.report().dense_calls == {}


def test_a_bare_transformer_tells_steps_from_generations(case):
    """By the timestep alone, whatever it counts in and whichever way."""
    if len(transformers(case.pipe)) > 1:
        pytest.skip("one of several experts")
    with sparsediff.enable(case.pipe.transformer, HALF, schedule=Schedule(dense_steps=1)) as handle:
        for _ in range(2):
            case.run(steps=3)
            steps = handle.report().steps
            assert [step.density == 1.0 for step in steps] == [True, False, False]
            assert [step.sigma for step in steps] == sorted((s.sigma for s in steps), reverse=True)


def test_all_experts_run_sparse(case):
    with sparsediff.enable(case.pipe, HALF, schedule=NEVER_DENSE) as handle:
        case.run(steps=3)
        assert handle.report().dense_calls == {}
        ran = {layer.name for layer in handle.report().layers if layer.calls}
        assert ran == {name for state in handle.states for name in state.layers}
    assert len(handle.states) == 0
    assert len({name.split(".")[0] for name in ran}) == len(transformers(case.pipe))


def test_lora(case):
    from peft import LoraConfig, inject_adapter_in_model

    def with_lora():
        pipe = case.family.build()
        config = LoraConfig(r=4, target_modules=list(case.family.lora), init_lora_weights=False)
        for model in transformers(pipe):
            with torch.random.fork_rng():
                torch.manual_seed(3)
                # What `add_adapter` does, which not every model has.
                inject_adapter_in_model(config, model, "style")
        return pipe

    pipe = with_lora()
    stock = case.family.run(pipe)
    assert not torch.allclose(stock, case.stock(), rtol=1e-3)
    with sparsediff.enable(pipe, everything(), schedule=NEVER_DENSE) as handle:
        case.assert_close(case.family.run(pipe), stock)
        assert handle.report().dense_calls == {}


@pytest.mark.parametrize("first", ["enable", "offload"])
def test_model_offload_in_either_order(case, first):
    with sparsediff.enable(case.pipe, HALF, schedule=NEVER_DENSE):
        expected = case.run()
    pipe = case.family.build()
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    handle = sparsediff.enable(pipe, HALF, schedule=NEVER_DENSE)
    if first == "enable":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # hooks installed the wrong way survive one run only
        assert torch.equal(case.family.run(pipe), expected)
        assert handle.report().density < 1.0
        assert handle.report().dense_calls == {}


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_compile_makes_one_graph(case):
    if not case.family.compiled:
        pytest.skip("stock diffusers can compile neither the model nor its blocks in one graph")
    with sparsediff.enable(case.pipe, HALF, schedule=NEVER_DENSE):
        expected = case.run(steps=3)
    torch._dynamo.reset()
    pipe, counter = case.family.build(), CompileCounterWithBackend("eager")
    graphs = 0
    sparsediff.enable(pipe, HALF, schedule=NEVER_DENSE)
    for model in transformers(pipe):
        if case.family.compiled == "model":
            model.compile(fullgraph=True, backend=counter)
            graphs += 1
        else:
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
            graphs += case.family.compiled
    out = case.family.run(pipe, steps=3)
    first = counter.frame_count
    again = case.family.run(pipe, steps=4)
    case.assert_close(out, expected)
    assert 0 < first <= graphs, "one graph serves every step, branch and layer of a kind"
    assert counter.frame_count == first, "more steps need no more graphs"
    assert again.isfinite().all()
    torch._dynamo.reset()


def parameters(processor):
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(processor.__call__).parameters.values()
    ]


def test_wrappers_have_the_signature_of_what_they_wrap(case):
    """diffusers drops the arguments that a processor's signature does not name."""
    model = case.pipe.transformer
    adapter = adapter_for(model)
    layers = adapter.attention_layers(model)
    stock = [module.processor for _, module, _ in layers]
    with sparsediff.enable(case.pipe, HALF, schedule=DENSE):
        for (name, module, _), processor in zip(layers, stock, strict=True):
            assert parameters(module.processor) == parameters(processor), name


def test_depths_rise_and_modules_are_distinct(case):
    for model in transformers(case.pipe):
        layers = adapter_for(model).attention_layers(model)
        assert len({id(module) for _, module, _ in layers}) == len(layers) > 0
        assert dict(model.named_modules()).items() >= {n: m for n, m, _ in layers}.items()
        depths = {depth for _, _, depth in layers}
        assert depths == set(range(len(depths)))


def test_presets_can_be_enabled(case):
    for preset in adapter_for(case.pipe.transformer).presets:
        method = build_method(preset.method, **preset.parameters)
        assert preset.source
        assert preset.schedule is None or isinstance(preset.schedule, Schedule)
        assert method.name == preset.method


def test_models_and_pipelines_are_the_real_ones(case):
    assert isinstance(case.pipe, DiffusionPipeline)
    stock = [case.pipe, case.pipe.scheduler, *transformers(case.pipe)]
    for part in stock[case.family.modular :]:
        assert type(part).__module__.startswith("diffusers.")

"""How attention calls reach us: wrapper processors, a private diffusers backend, one opaque operation.

A wrapper takes the place of a stock attention processor and delegates everything to it: projections, norms, RoPE,
LoRA, fused QKV.  Most stock processors end in `dispatch_attention_fn(..., backend=self._attention_backend)`; we set that
attribute to a backend of our own, so the one thing that changes is the attention call.  Those that call PyTorch's
attention themselves are caught there (`sparsediff.sdpa`).  docs/adr/0002-processors.md weighs this against rewriting
processors or registering a public backend.

The backend function is traced by torch.compile; all that depends on the state of the run happens inside the opaque
operation `sparsediff::attend`, which receives its layer as a tensor so that every layer shares one graph.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from sparsediff.sdpa import CatchAttention, dense_attention

BACKEND_NAME = "sparsediff"


class _Eager(threading.local):
    layer: Tensor | None = None
    user_backend: AttentionBackendName | str | None = None


class _Traced:
    layer: Tensor | None = None
    user_backend: AttentionBackendName | str | None = None


# Which layer the backend function is being called for.  Under Dynamo the store in the wrapper and the load in the
# backend meet inside one trace, so the layer reaches the operation as a graph input; a thread-local cannot be traced.
_eager, _traced = _Eager(), _Traced()


def _channel() -> _Eager | _Traced:
    return _traced if torch.compiler.is_compiling() else _eager


def _register_backend() -> AttentionBackendName:
    """Add a member to diffusers' closed enum of backends; it only ever serves as our interception point."""
    if BACKEND_NAME in AttentionBackendName._value2member_map_:
        member = AttentionBackendName(BACKEND_NAME)
    else:
        member = str.__new__(AttentionBackendName, BACKEND_NAME)
        member._name_, member._value_ = BACKEND_NAME.upper(), BACKEND_NAME
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[BACKEND_NAME] = member
        AttentionBackendName._member_names_.append(member._name_)
    _AttentionBackendRegistry.register(member)(_backend)
    return member


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    channel = _channel()
    layer = channel.layer
    if layer is None:
        raise RuntimeError(
            f"the attention backend {BACKEND_NAME!r} is not for set_attention_backend(); call sparsediff.enable(pipe)"
        )
    if not isinstance(attn_mask, Tensor | None):
        raise TypeError(
            f"sparsediff takes attention masks that are tensors, got {type(attn_mask).__name__}: switch the model's own "
            "sparse attention off, or call sparsediff.disable(pipe)"
        )
    # The operation has no backward and no dropout, so calls that need one keep the stock path (RunState counts
    # gradients; no stock processor drops anything).
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if gradients or dropout_p:
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            backend=channel.user_backend,
        )
    return attend_op(query, key, value, attn_mask, layer, scale, is_causal, enable_gqa)


# Defined piece by piece: `torch.library.custom_op` takes three times as long a call, and attention is called often.
torch.library.define(
    "sparsediff::attend",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor layer, float? scale, bool is_causal, "
    "bool enable_gqa) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
attend_op = torch.ops.sparsediff.attend.default


@torch.library.impl("sparsediff::attend", "default")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    layer: Tensor,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
) -> Tensor:
    """One attention call, `[B, S, H, D]`; `layer` is `int64 [2]` on the CPU: (run state, layer)."""
    state_key, index = layer.tolist()
    # Triton launches on the current device, which need not be the one that holds the tensors.
    state = STATES[state_key]
    with torch.cuda.device_of(query), state.recorder.part("attention", query.device):
        out = state.attend(index, query, key, value, attn_mask, scale, is_causal, enable_gqa)
    # An operation must not change strides behind its fake's back.
    return out.contiguous()


@torch.library.register_fake("sparsediff::attend")
def _(query, key, value, attn_mask, layer, scale, is_causal, enable_gqa):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


# Run states by number, for the operation to find: it can carry tensors and numbers only.
STATES: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()

MEMBER = _register_backend()


class SparseProcessor:
    """Stands in for a stock processor; every subclass has the call signature of the class it wraps.

    diffusers drops keyword arguments that are not named in `inspect.signature(processor.__call__)`, so a wrapper with
    a signature of its own would silently lose, for instance, the rotary embedding.
    """

    place = "processor"

    def __init__(self, original: object, state_key: int, layer: int) -> None:
        self.original = original
        self.layer = torch.tensor([state_key, layer])
        self.live = True

    def attach(self, module: nn.Module) -> None:
        """Take the place of the stock processor."""
        module.processor = self

    def detach(self, module: nn.Module) -> bool:
        """Give it back; False if somebody has put another processor in place of ours, who is left alone."""
        self.live = False
        stock = self.restore()
        if module.processor is self:
            module.processor = stock
        return module.processor is stock

    def in_place(self, module: nn.Module) -> bool:
        """Whether the module still calls it."""
        return module.processor is self

    def restore(self) -> object:
        """The stock processor, as the user wants it by now."""
        return self.original

    def __reduce__(self):
        # Copied or pickled, a wrapper is the stock processor: its run state stays with the original.
        return _itself, (self.original,)


class DispatchingProcessor(SparseProcessor):
    """Around a stock processor that ends in `dispatch_attention_fn`."""

    def __init__(self, original: object, state_key: int, layer: int) -> None:
        super().__init__(original, state_key, layer)
        # A copy, because one processor object may serve several modules, cross-attention among them.
        self.stock = copy.copy(original)
        self.stock._attention_backend = MEMBER
        self.user_backend = _not_ours(original._attention_backend)

    @property
    def _attention_backend(self):
        return MEMBER

    @_attention_backend.setter
    def _attention_backend(self, backend) -> None:
        # `set_attention_backend("sage")` on an enabled model chooses what dense calls run on.
        self.user_backend = _not_ours(backend)

    @property
    def _parallel_config(self):
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config) -> None:
        if config is not None:
            raise ValueError(
                "context parallelism is not supported yet; call sparsediff.disable(pipe) before enabling it"
            )
        self.stock._parallel_config = None

    def dense(self, query: Tensor, key: Tensor, value: Tensor, **call: object) -> Tensor:
        """Attention on the backend that the user chose; `[B, S, H, D]` in and out."""
        return dispatch_attention_fn(query, key, value, backend=self.user_backend, **call)

    def restore(self) -> object:
        """The stock processor, with the backend the user chose meanwhile."""
        if getattr(self.original, "_attention_backend", None) is not self.user_backend:
            self.original._attention_backend = self.user_backend
        return self.original


class CatchingProcessor(SparseProcessor):
    """Around a stock processor that calls `scaled_dot_product_attention` itself."""

    def __init__(self, original: object, state_key: int, layer: int) -> None:
        super().__init__(original, state_key, layer)
        self.stock, self.catch = original, CatchAttention(self.layer)

    dense = staticmethod(dense_attention)


def _not_ours(backend: AttentionBackendName | str | None) -> AttentionBackendName | str | None:
    return None if backend == BACKEND_NAME else backend


def _itself(x: object) -> object:
    return x


def unwrapped(processor: object) -> object:
    """The stock processor, whoever wrapped it."""
    while isinstance(processor, SparseProcessor):
        processor = processor.original
    return processor


def wrap_processor(stock: object, state_key: int, layer: int) -> SparseProcessor:
    """A `SparseProcessor` in place of `stock`, with exactly its call signature."""
    return _wrapper_class(type(stock))(stock, state_key, layer)


@functools.cache
def _wrapper_class(stock_class: type) -> type[SparseProcessor]:
    @functools.wraps(stock_class.__call__)
    def dispatching(self, *args, **kwargs):
        if not self.live:  # somebody wrapped it since, and still calls it
            return self.original(*args, **kwargs)
        channel = _channel()
        channel.layer, channel.user_backend = self.layer, self.user_backend
        try:
            return self.stock(*args, **kwargs)
        finally:
            channel.layer = None

    @functools.wraps(stock_class.__call__)
    def catching(self, *args, **kwargs):
        if not self.live:
            return self.original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            state_key, index = self.layer.tolist()
            STATES[state_key].entered.add(index)
        with self.catch:
            return self.stock(*args, **kwargs)

    dispatches = hasattr(stock_class, "_attention_backend")
    base = DispatchingProcessor if dispatches else CatchingProcessor
    call = dispatching if dispatches else catching
    return type(f"Sparse{stock_class.__name__}", (base,), {"__call__": call})

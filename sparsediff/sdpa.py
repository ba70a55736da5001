"""How attention calls reach us where stock code calls PyTorch's attention itself.

Some diffusers processors (CogVideoX, SD3, Mochi) and every model of transformers end in
`torch.nn.functional.scaled_dot_product_attention`.  A function mode around the stock code sees that one call and hands
it to `sparsediff::attend`; all else is the model's own.  Dynamo traces function modes, so that a compiled model stays
one graph, and the layer reaches the operation as a tensor, so that every layer shares it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class CatchAttention(TorchFunctionMode):
    """Inside it, calls of `scaled_dot_product_attention` go to one attention layer of a run.

    Args:
        layer: `int64 [2]` on the CPU, (run state, layer), as `sparsediff::attend` takes it.
    """

    def __init__(self, layer: Tensor) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return _attend(self.layer, *args, **(kwargs or {}))
        if func is Tensor.unflatten:  # a method of `super()` within, which Dynamo cannot trace
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    layer: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The signature of `scaled_dot_product_attention`, `[B, H, S, D]`."""
    # The operation has no backward and no dropout, so calls that need one keep the stock path (RunState counts them).
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if gradients or dropout_p or query.ndim != 4:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.ops.sparsediff.attend.default(
        *tokens_first, attn_mask, layer, scale, is_causal, enable_gqa
    )
    return out.transpose(1, 2)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
) -> Tensor:
    """What the stock code would have computed, bit for bit; `[B, S, H, D]` in and out."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    out = functional.scaled_dot_product_attention(
        *heads_first, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)


class CaughtForward:
    """Stands in for the `forward` of an attention module that has no processor, as models of transformers have none.

    An attribute of the instance, because Dynamo notices when it comes and goes; it would not notice hooks.
    """

    place = "forward"

    def __init__(self, module: nn.Module, layer: Tensor) -> None:
        self._own = vars(module).get("forward")  # accelerate's, under its offloading
        self._module, self.stock = module, module.forward
        self.catch = CatchAttention(layer)
        self.live = True
        functools.update_wrapper(self, self.stock)

    def __call__(self, *args, **kwargs):
        """The stock forward, with its attention call caught."""
        if not self.live:  # somebody wrapped it since, and still calls it
            return self.stock(*args, **kwargs)
        with self.catch:
            return self.stock(*args, **kwargs)

    dense = staticmethod(dense_attention)

    def attach(self, module: nn.Module) -> None:
        """Take the place."""
        module.forward = self

    def detach(self, module: nn.Module) -> bool:
        """Give it back; False if somebody has replaced ours since, who is left alone."""
        self.live = False
        if vars(module).get("forward") is not self:
            return "forward" not in vars(module)
        del module.forward
        if self._own is not None:
            module.forward = self._own
        return True

    def in_place(self, module: nn.Module) -> bool:
        """Whether the module still calls it."""
        return vars(module).get("forward") is self

    def __reduce__(self):
        # Copied or pickled, it is the stock forward: the run state stays with the original.
        if self._own is not None:
            return _itself, (self._own,)
        return functools.partial, (type(self._module).forward, self._module)


def _itself(x: object) -> object:
    return x

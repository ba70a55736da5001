"""What an adapter reads off a model."""

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from sparsediff.adapter import weight_dtype
from sparsediff.testing import random_wan_pipeline


def test_a_half_precision_model_is_one_although_diffusers_keeps_layers_in_float32(tmp_path):
    random_wan_pipeline().transformer.save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    assert weight_dtype(model) == torch.bfloat16


def test_whole_numbers_do_not_count():
    model = nn.Linear(2, 2).half()
    model.codes = nn.Parameter(torch.zeros(99, dtype=torch.uint8), requires_grad=False)
    assert weight_dtype(model) == torch.float16
    assert weight_dtype(nn.Identity()) == torch.float32

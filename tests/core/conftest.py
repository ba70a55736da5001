import pytest

from sparsediff.pipelines import tiny
from sparsediff.testing import record_attention


@pytest.fixture(scope="session")
def recorded():
    """Four attention layers of a denoising step of the bundled model: 3 x 16 x 16 tokens, 4 heads of 64."""
    calls = record_attention(
        tiny.load("tiny-wan"),
        step=1,
        prompt="a large red star spinning on a navy background",
        num_inference_steps=3,
        height=128,
        width=128,
        num_frames=9,
        guidance_scale=1.0,
        max_sequence_length=64,
    )
    return calls[::3]

import pytest

from sparsediff.demo.settings import Settings
from sparsediff.demo.studio import Studio
from sparsediff.eval.compare import Request

# A clip of random weights of 512 tokens: four blocks of 128, the fewest that any method takes.
SMALL = {"steps": 3, "height": 128, "width": 128, "frames": 29}


@pytest.fixture(scope="session")
def studio():
    """A studio of random weights, loaded."""
    studio = Studio("random-wan", device="cpu")
    studio.start_loading()
    assert studio._loaded.wait(120)
    assert studio.failure is None
    yield studio
    studio.close()


@pytest.fixture(scope="session")
def settings():
    """`settings(method, seed=1, **parameters)` of a clip that takes a second."""

    def make(method="auto", *, seed=0, steps=SMALL["steps"], schedule=None, **parameters):
        request = Request(prompt="a red circle", seed=seed, **{**SMALL, "steps": steps})
        return Settings(request=request, method=method, parameters=parameters, schedule=schedule)

    return make

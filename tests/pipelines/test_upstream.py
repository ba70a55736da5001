"""What adapters rely on in diffusers: any change of it must be read before it is trusted.

`upstream.json` holds, for each release that was read, the signature and the source hash of every attention processor,
attention class and transformer that an adapter stands on.  After reading what changed, record it:

    python tests/pipelines/test_upstream.py
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("upstream.json")
VERSION = importlib.metadata.version("diffusers")
INSTRUCTION = (
    "{what} of {name} is not what the adapters were written for. Read its source again: which modules attend over the "
    "video, in which order tokens come, which masks they get, how often attention is called, and what pipelines/*.py says "
    "about it. Mend the adapter, then record it: python tests/pipelines/test_upstream.py"
)


@functools.cache
def classes() -> dict[str, type]:
    """Every stock class that a family's tiny pipeline runs through on its way to attention."""
    from families.registry import all_families

    from sparsediff.adapter import adapter_for
    from sparsediff.api import COMPONENTS

    found = set()
    for family in all_families():
        pipe = family.build()
        models = (getattr(pipe, name, None) for name in COMPONENTS)
        for model in (m for m in models if m is not None):
            adapter = adapter_for(model)
            found.add(type(model))
            # Processors that other checkpoints of the family, or fused projections, bring.
            module = sys.modules[type(model).__module__]
            found |= {getattr(module, name) for name in adapter.processors if hasattr(module, name)}
            for _, attention, _ in adapter.attention_layers(model):
                found |= {type(attention), type(attention.processor)}
    return {f"{c.__module__}.{c.__qualname__}": c for c in found}


def described(cls: type) -> dict[str, str]:
    """How it is called, and a hash of all it does."""
    call = cls.__call__ if "__call__" in vars(cls) else cls.forward
    source = inspect.getsource(cls)
    return {
        "signature": ", ".join(inspect.signature(call).parameters),
        "sha256": hashlib.sha256(source.encode()).hexdigest()[:16],
    }


def record() -> None:
    """Write down what is installed."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[VERSION] = {name: described(cls) for name, cls in sorted(classes().items())}
    RECORD.write_text(json.dumps(known, indent=1) + "\n")


def test_stock_attention_is_what_was_read():
    known = json.loads(RECORD.read_text())
    if VERSION not in known:
        pytest.skip(
            f"diffusers {VERSION} has not been read ({', '.join(known)} have); after reading it, run "
            "python tests/pipelines/test_upstream.py"
        )
    known, installed = known[VERSION], {n: described(c) for n, c in classes().items()}
    for name, now in installed.items():
        assert name in known, f"{name} : " + INSTRUCTION.format(what="A class", name=name)
        for what, value in now.items():
            assert value == known[name][what], INSTRUCTION.format(what=f"The {what}", name=name)
    assert not known.keys() - installed.keys(), "recorded, but no adapter stands on it any more"


@pytest.mark.parametrize("what", ["signature", "sha256"])
def test_a_change_upstream_fails_with_what_to_do(what, monkeypatch, tmp_path):
    known = json.loads(RECORD.read_text())
    if VERSION not in known:
        pytest.skip(f"diffusers {VERSION} has not been read")
    known[VERSION][min(known[VERSION])][what] = "something else"
    changed = tmp_path / "upstream.json"
    changed.write_text(json.dumps(known))
    monkeypatch.setattr(sys.modules[__name__], "RECORD", changed)
    with pytest.raises(AssertionError, match="Read its source again"):
        test_stock_attention_is_what_was_read()


if __name__ == "__main__":
    record()

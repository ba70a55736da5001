"""The stock sources that adapters stand on: what they were when they were read, and what they are now.

`upstream.json` holds the signature and the source hash of every attention processor, attention class and transformer that
an adapter stands on, in the release that was read (`REVISION`).

    python tests/pipelines/upstream.py            # what differs in the installed release, and the change of each source
    python tests/pipelines/upstream.py --brief    # one line
    python tests/pipelines/upstream.py --record   # it was read: write down what is installed
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from families.registry import all_families

from sparsediff.adapter import adapter_for
from sparsediff.api import COMPONENTS
from sparsediff.pipelines.releases import REVISION, installed

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("upstream.json")
INSTRUCTION = (
    "Read their sources again: which modules attend over the video, in which order tokens come, which masks they get, how "
    "often attention is called, and what pipelines/*.py says about it. Mend the adapters, then record what was read: "
    "python tests/pipelines/upstream.py --record"
)

Described = Mapping[str, Mapping[str, str]]  # class -> its "signature" and "sha256"


@functools.cache
def classes() -> dict[str, tuple[type, str]]:
    """Every stock class that a family's tiny pipeline runs through on its way to attention, and the adapter's file.

    Families that the installed release lacks are left out.
    """
    found = {}
    for family in all_families():
        if family.lacking:
            continue
        pipe = family.build()
        models = (getattr(pipe, name, None) for name in COMPONENTS)
        for model in (m for m in models if m is not None):
            adapter = adapter_for(model)
            stock = {type(model)}
            # Processors that other checkpoints of the family, or fused projections, bring.
            module = sys.modules[type(model).__module__]
            stock |= {getattr(module, name) for name in adapter.processors if hasattr(module, name)}
            for _, attention, _ in adapter.attention_layers(model):
                stock |= {type(attention), type(attention.processor)}
            source = Path(inspect.getsourcefile(type(adapter))).name
            found |= {f"{c.__module__}.{c.__qualname__}": (c, f"pipelines/{source}") for c in stock}
    return found


@functools.cache
def described(cls: type) -> Mapping[str, str]:
    """How it is called, and a hash of all it does."""
    call = cls.__call__ if "__call__" in vars(cls) else cls.forward
    source = inspect.getsource(cls)
    return {
        "signature": ", ".join(inspect.signature(call).parameters),
        "sha256": hashlib.sha256(source.encode()).hexdigest()[:16],
    }


def now() -> Described:
    """Of the installed release."""
    return {name: described(cls) for name, (cls, _) in sorted(classes().items())}


def read() -> Described:
    """Of the release that was read.

    Raises:
        KeyError: it is not the one that the adapters say they were written for.
    """
    return json.loads(RECORD.read_text())[REVISION]


def record() -> None:
    """Write down what is installed.

    Raises:
        SystemExit: the adapters say that they were written for another release.
    """
    if installed() != REVISION:
        sys.exit(
            f"diffusers {installed()} is installed, pipelines/releases.py says that {REVISION} was read; once "
            "the new one is read, say so there"
        )
    RECORD.write_text(json.dumps({REVISION: now()}, indent=1) + "\n")


def differences(then: Described, here: Described) -> dict[str, str]:
    """What became of each class that is not as it was: `"signature and source"`, `"source"`, `"new"` or `"not here"`."""
    changed = {}
    for name in sorted(then.keys() | here.keys()):
        if name not in here:
            changed[name] = "not here"
        elif name not in then:
            changed[name] = "new"
        elif then[name]["signature"] != here[name]["signature"]:
            changed[name] = "signature and source"
        elif then[name] != here[name]:
            changed[name] = "source"
    return changed


def in_words(changed: Mapping[str, str]) -> str:
    """`"2 of 62 classes differ: WanAttention (source), ..."`, for one line."""
    if not changed:
        return f"all {len(read())} classes are those of diffusers {REVISION}"
    listed = ", ".join(f"{name.rpartition('.')[2]} ({what})" for name, what in changed.items())
    return (
        f"{len(changed)} of {len(read())} classes are not those of diffusers {REVISION}: {listed}"
    )


def fetch(release: str) -> Path:
    """The sources of a release, from the package index; kept under build/."""
    folder = ROOT / "build" / "diffusers" / release
    if not (folder / "diffusers").exists():
        pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder))
        subprocess.run([*pip, f"diffusers=={release}"], check=True)
    return folder


def source_in(folder: Path, name: str) -> str:
    """The source of class `module.Name` under a folder of packages; empty where there is none."""
    module, _, qualname = name.rpartition(".")
    path = folder / (module.replace(".", "/") + ".py")
    if not path.exists():
        return ""
    text = path.read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == qualname:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])
    return ""


def explained(changed: Mapping[str, str], old: Path, new: Path) -> Iterator[str]:
    """For each class that differs: where it is, whose adapter stands on it, and the change of its source."""
    for name, what in changed.items():
        yield f"\n{name}: {what}"
        if name in classes():
            yield f"  read beside {classes()[name][1]}"
        before, after = (source_in(folder, name).splitlines() for folder in (old, new))
        yield from difflib.unified_diff(before, after, REVISION, installed(), lineterm="")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brief", action="store_true", help="one line, and nothing is fetched")
    parser.add_argument("--record", action="store_true", help="write down what is installed")
    options = parser.parse_args(arguments)
    if options.record:
        return record()
    changed = differences(read(), now())
    words = in_words(changed)
    print(f"diffusers {installed()}: {words.partition(':')[0] if options.brief else words}")
    if changed and not options.brief:
        import diffusers

        new = Path(diffusers.__file__).parents[1]
        print("\n".join(explained(changed, fetch(REVISION), new)))
        print(f"\n{INSTRUCTION}")
    return None


if __name__ == "__main__":
    main()

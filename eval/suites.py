"""Versioned lists of prompts, so that two figures of one suite and version are of the same prompts.

Ours are JSON files in `suites/`: a changed list gets a new version.  Standard lists of others are not ours to ship:
they are read from a file that the user has, and their version is that file's hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "suites"
# Lists that papers report on -> where their authors publish them.
EXTERNAL = {
    "vbench": "VBench_full_info.json of the package vbench (github.com/Vchitect/VBench)",
    "penguin": "the Penguin Video Benchmark, assets/PenguinVideoBenchmark.csv of github.com/Tencent/HunyuanVideo",
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is generated.

    Attributes:
        name, version: of the list.
        prompts: in order, without repetition.
        seeds: every prompt is generated with each.
        call: arguments of the pipeline's call, unless the user says otherwise.
        about: one line.
    """

    name: str
    version: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    call: dict[str, object] = field(default_factory=dict)
    about: str = ""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"suite {self.name} holds no prompts")
        if len(set(self.prompts)) < len(self.prompts):
            twice = next(p for p in self.prompts if self.prompts.count(p) > 1)
            raise ValueError(f"suite {self.name} holds a prompt twice: {twice!r}; use seeds")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError("seeds must be different from one another, and at least one")


def suite_names() -> dict[str, str]:
    """Name -> one line."""
    ours = {
        path.stem: json.loads(path.read_text())["about"] for path in sorted(FOLDER.glob("*.json"))
    }
    return ours | {name: f"from a file of yours: {where}" for name, where in EXTERNAL.items()}


def load_suite(name: str | None = None, prompts: str | Path | None = None) -> Suite:
    """A suite by name, one of others' lists from a file, or any list of prompts, one a line.

    Args:
        name: from `suite_names()`; with a file and no name the suite is called after the file.
        prompts: text file (one prompt a line), `.csv` with a column `prompt` (or of one column), or `.json`: a list
            of texts or of records with `prompt` or `prompt_en`.

    Raises:
        ValueError: an unknown name, one of ours beside a file, or a file without prompts.
        FileNotFoundError: a list that is not ours and whose file was not given; the message says where it is.
    """
    if name in EXTERNAL:
        path = Path(prompts) if prompts is not None else _installed(name)
        return Suite(name=name, version=_hash(path), prompts=read_prompts(path))
    if prompts is not None:
        if name is not None:
            raise ValueError(
                f"suite {name} has prompts of its own; give a suite or a file, not both"
            )
        path = Path(prompts)
        return Suite(name=path.stem, version=_hash(path), prompts=read_prompts(path))
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(suite_names())}")
    data = json.loads(path.read_text(encoding="utf-8"))
    return Suite(**data | {"prompts": tuple(data["prompts"]), "seeds": tuple(data["seeds"])})


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a file, each once, in order.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no prompts in it, or JSON of another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text; save it as UTF-8, one prompt a line") from None
    if path.suffix == ".json":
        found = _from_json(text, path)
    elif path.suffix == ".csv":
        found = _from_csv(text)
    else:
        found = text.splitlines()
    prompts = tuple(dict.fromkeys(p.strip() for p in found if p.strip()))
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def _from_json(text: str, path: Path) -> list[str]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(data, list):
        raise ValueError(f"{path} must hold a list of prompts, or of records with a prompt")
    found = [x.get("prompt_en", x.get("prompt")) if isinstance(x, dict) else x for x in data]
    if not all(isinstance(x, str) for x in found):
        raise ValueError(f"{path} holds a record without `prompt` or `prompt_en`")
    return found


def _from_csv(text: str) -> list[str]:
    import csv

    rows = [row for row in csv.reader(text.splitlines()) if row]
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((i for i, n in enumerate(names) if n in ("prompt", "prompt_en")), None)
    return [row[column] for row in rows[1:]] if column is not None else [row[0] for row in rows]


def _installed(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    path = Path(spec.origin).parent / "VBench_full_info.json" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"suite {name} needs its file, --prompts FILE: {EXTERNAL[name]}")
    return path


def _hash(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]

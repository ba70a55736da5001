"""What a method has to measure before it can run: observed on a few prompts, stored once, checked when used.

A `Calibration` is one safetensors file: tensors by name, and a JSON header that says for which method, model and tokens
they were measured, how, and what density and error they reached.
"""

from __future__ import annotations

import functools
import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsediff.methods import AttentionSite

SCHEMA = 1
FILE = "sparsediff_calibration.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """What of a model a calibration depends on: a fine-tune or a LoRA of the same shape passes.

    Attributes:
        transformers: class name of each transformer by component name.
        layers: eligible attention layers, in execution order, as `component.module`.
        heads: attention heads of a layer.
        head_dim: channels of one head.
    """

    transformers: dict[str, str]
    layers: tuple[str, ...]
    heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A measured artefact; `save_pretrained`, `from_pretrained` and `push_to_hub` as everywhere in diffusers.

    Attributes:
        method: name of the method it belongs to.
        parameters: of the method, when it was measured.
        model: what it was measured on.
        grid: the tokens it was measured on, as `str(TokenGrid)`; None if it serves any.
        tensors: the measurements; the first dimensions are `[bins or steps, layers, heads]` where they apply.
        density: kept share of the token area over all attention calls of a run with it, the dense ones counted.
        error: relative L2 error of the attention outputs of its sparse calls against dense ones of the same inputs.
        provenance: prompts, seeds, steps, versions, device and date, for people.
    """

    method: str
    parameters: dict[str, object]
    model: ModelLayout
    grid: str | None
    tensors: Mapping[str, Tensor]
    density: float = float("nan")
    error: float = float("nan")
    provenance: dict[str, object] = field(default_factory=dict)

    # -- use ------------------------------------------------------------------------------------------------------

    def check_method(self, name: str) -> None:
        """Refuse to serve another method.

        Raises:
            ValueError: it was measured for another.
        """
        if name != self.method:
            raise ValueError(f"this calibration is for {self.method}, not for {name}")

    def check_tensors(self, names: Collection[str]) -> None:
        """Refuse to run without what the method looks up.

        Raises:
            ValueError: the message names what is missing.
        """
        if missing := [name for name in names if name not in self.tensors]:
            raise ValueError(
                f"this {self.method} calibration lacks {', '.join(missing)}: it is incomplete; calibrate again with "
                "`sparsediff calibrate`"
            )

    def check_model(self, layout: ModelLayout) -> None:
        """Refuse another model.

        Raises:
            ValueError: the message names the fields that differ.
        """
        pairs = {
            f.name: (getattr(self.model, f.name), getattr(layout, f.name))
            for f in fields(ModelLayout)
        }
        differ = [
            f"{name}: {_difference(*pair)}" for name, pair in pairs.items() if pair[0] != pair[1]
        ]
        if differ:
            raise ValueError(
                f"this {self.method} calibration was measured on another model ({'; '.join(differ)}); "
                "calibrate again with `sparsediff calibrate`"
            )

    def check_grid(self, grid: object) -> None:
        """Refuse tokens whose blocks would not be the ones measured.

        Raises:
            ValueError: the message names both.
        """
        if self.grid is not None and str(grid) != self.grid:
            raise ValueError(
                f"this {self.method} calibration was measured on {self.grid} latent tokens and this run has {grid}; "
                "its blocks mean nothing there: calibrate at this size, or take a method that needs no calibration"
            )

    def row(self, layer: str) -> int:
        """The place of a layer in the tensors."""
        return self._rows[layer]

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.model.layers)}

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **hub) -> None:
        """Write `sparsediff_calibration.safetensors` into a folder; `hub` goes to `push_to_hub`."""
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        header |= {"schema": SCHEMA, "model": asdict(self.model)}
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
        save_file(tensors, folder / FILE, {"sparsediff": json.dumps(header)})
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.name), **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub) -> Calibration:
        """Read a folder, a file, or a repository of the Hugging Face hub (`hub`: `revision`, `token`, ...).

        Raises:
            ValueError: not a calibration, or one of a later version of the library.
            OSError: nothing there.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            path = path / FILE
            if not path.exists():
                raise OSError(f"{path.parent} holds no {FILE}; `sparsediff calibrate` writes one")
        elif not path.exists():
            path = _from_hub(str(pretrained_model_name_or_path), **hub)
        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no sparsediff calibration: {error}") from None
        with opened as file:
            try:
                header = json.loads((file.metadata() or {}).get("sparsediff", "null"))
            except json.JSONDecodeError:
                header = None
            if not isinstance(header, dict):
                raise ValueError(f"{path} is no sparsediff calibration")
            if (schema := header.pop("schema", None)) != SCHEMA:
                raise ValueError(
                    f"{path} has schema {schema}, this version of sparsediff reads {SCHEMA}; upgrade sparsediff or "
                    "calibrate again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        try:
            model = header.pop("model")
            model["layers"] = tuple(model["layers"])
            header["parameters"] = {k: _tuples(v) for k, v in header["parameters"].items()}
            return cls(model=ModelLayout(**model), tensors=tensors, **header)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is a damaged sparsediff calibration ({error}); calibrate again with `sparsediff calibrate`"
            ) from None

    def push_to_hub(self, repo_id: str, **hub) -> str:
        """Upload to the Hugging Face hub (`hub`: `private`, `token`, `commit_message`, ...); returns the commit's URL.

        Raises:
            OSError: the hub cannot be reached, or refuses.
        """
        import tempfile

        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(token=hub.pop("token", None))
        private = hub.pop("private", None)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        except HfHubHTTPError:
            raise  # says itself what the hub objects to
        # Its base class is that of all errors of the HTTP client in use.
        except (ConnectionError, HfHubHTTPError.__base__) as error:
            raise OSError(
                f"cannot reach the Hugging Face hub ({error}); save_pretrained(folder) keeps the calibration on disk"
            ) from error
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub.setdefault("commit_message", f"sparsediff calibration for {self.method}")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **hub))

    def __str__(self) -> str:
        size = sum(x.nbytes for x in self.tensors.values()) / 2**10
        return (
            f"calibration of {self.method} for {', '.join(self.model.transformers.values())}, "
            f"{self.grid or 'any size'}: density {self.density:.3f}, attention error {self.error:.2%}, {size:,.1f} KiB"
        )


def _tuples(value: object) -> object:
    """JSON has lists where a method's parameters have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _difference(measured: object, here: object) -> str:
    if isinstance(measured, tuple):
        if len(measured) != len(here):
            measured, here = f"{len(measured)} layers", f"{len(here)} layers"
        else:
            measured, here = next(
                pair for pair in zip(measured, here, strict=True) if len({*pair}) > 1
            )
    return f"measured {measured}, here {here}"


def _from_hub(repo_id: str, **hub) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, FILE, **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"{repo_id} is neither a folder nor a repository with {FILE}: {error}"
        ) from error


@dataclass(frozen=True)
class Call:
    """One attention call that a calibrator sees; tensors are `[B, S, H, D]`, after RoPE, in the model's own order."""

    site: AttentionSite
    query: Tensor
    key: Tensor
    value: Tensor
    dense: Callable[[], Tensor]
    # What the enabled method returns, and whether it did so sparsely; None where it has no say.
    sparse: Callable[[], tuple[Tensor, bool]] | None

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.query.shape[-1] ** -0.5 if self.site.scale is None else self.site.scale


def per_calibration(function: Callable) -> Callable:
    """Cache a function of a calibration and hashable arguments for as long as the calibration is in use.

    A cache that counts its entries would keep a gigabyte of blocks in memory after the pipeline that used them is gone.
    The values must not refer to the calibration.
    """
    found: weakref.WeakKeyDictionary[Calibration, dict] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def cached(calibration: Calibration, *arguments, **named):
        values = found.setdefault(calibration, {})
        key = (arguments, tuple(sorted(named.items())))
        if key not in values:
            values[key] = function(calibration, *arguments, **named)
        return values[key]

    return cached


class Calibrator(ABC):
    """Watches whole generations and turns what it saw into tensors; one a method, deterministic for a seed."""

    passes: int = 1  # generations of every prompt

    def begin_generation(self, number: int) -> None:
        """A generation of pass `number`, from 0, starts."""
        self.number = number

    @abstractmethod
    def attend(self, call: Call) -> Tensor:
        """Look at one attention call; returns its output."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What `Calibration.tensors` is to hold."""

    @abstractmethod
    def state(self) -> dict[str, object]:
        """Everything needed to go on later, for `torch.save`."""

    @abstractmethod
    def load_state(self, state: dict[str, object]) -> None:
        """Go on from what `state` returned."""


def step_bin(step: int, num_steps: int | None, bins: int) -> int:
    """Which of `bins` equal stretches of a run a step lies in.

    Raises:
        ValueError: nobody knows how many steps there are.
    """
    if num_steps is None:
        raise ValueError(
            "a calibrated method must know the number of steps: call the pipeline, or in a loop of your own "
            "handle.begin_generation(num_steps)"
        )
    return min(bins - 1, step * bins // max(1, num_steps))


def nearest_seen(
    seen: Mapping[str, object], bins: int, layers: Mapping[str, int]
) -> dict[str, str]:
    """For every `"bin row"` the entry of `seen` that serves it: its own, or the nearest bin's.

    A run with more steps than the calibration, or with experts that take over elsewhere, meets bins that it did not.

    Raises:
        ValueError: some of `layers` (name to row) was never seen.
    """
    met: dict[int, list[int]] = {}
    for where in seen:
        stretch, row = map(int, where.split())
        met.setdefault(row, []).append(stretch)
    if missing := [name for name, row in layers.items() if row not in met]:
        raise ValueError(
            f"{len(missing)} layers were never called while calibrating ({missing[0]}, ...): take as many steps as the "
            "runs to come, so that every expert has its turn, and no cache that skips layers"
        )
    return {
        f"{stretch} {row}": f"{min(there, key=lambda b: abs(b - stretch))} {row}"
        for row, there in met.items()
        for stretch in range(bins)
    }


@per_calibration
def pinned(calibration: Calibration, name: str) -> Tensor:
    """A tensor of a calibration where copies to a GPU need not wait for the host."""
    tensor = calibration.tensors[name]
    return tensor.pin_memory() if torch.cuda.is_available() else tensor

"""Which pipelines the page can serve, known before any weights are loaded: those that need a prompt and nothing else."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sparsediff.adapter import ADAPTERS
from sparsediff.api import COMPONENTS
from sparsediff.eval.measure import makes_video
from sparsediff.eval.models import RANDOM, check_name
from sparsediff.pipelines import tiny
from sparsediff.pipelines.cards import CARDS

INDEX = "model_index.json"
FPS = 16  # of models that leave it to those who write the file
# What a pipeline's call may ask for beside words.
MEDIA = ("image", "video", "conditions", "controls", "keyframes")
# These take pictures, and make something of a prompt alone, too.
MEDIA_OPTIONAL = frozenset(
    {
        "AnyFlowPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Flux2KleinKVPipeline",
        "Flux2KleinPipeline",
        "Flux2Pipeline",
        "FluxKontextPipeline",
        "HeliosPipeline",
        "HeliosPyramidPipeline",
        "LTX2ConditionPipeline",
        "LTXConditionPipeline",
        "WanVACEPipeline",
        "ZImageOmniPipeline",
    }
)
SUCH_AS = (
    "this page serves pipelines that make a video or a picture of a prompt alone, such as WanPipeline, HunyuanVideoPipeline, "
    "LTXPipeline or FluxPipeline"
)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is known of a pipeline by its class.

    Attributes:
        pipeline: name of its class in diffusers.
        video: whether it makes videos; it makes pictures otherwise.
        defaults: argument of its call -> default.
    """

    pipeline: str
    video: bool
    defaults: Mapping[str, object]

    @property
    def fps(self) -> int:
        """Frames a second of its clips: what its call says, if anything."""
        said = (self.defaults.get(name) for name in ("frame_rate", "fps"))
        return next((round(n) for n in said if isinstance(n, int | float)), FPS)

    @property
    def noun(self) -> str:
        """What people call what it makes."""
        return "clip" if self.video else "picture"

    def takes(self, argument: str) -> bool:
        """Whether its call has this argument, and makes use of it as it comes."""
        if argument == "guidance_scale":  # some have it for form's sake
            return isinstance(self.defaults.get(argument), int | float)
        if argument == "negative_prompt" and self.defaults.get("true_cfg_scale", 2.0) <= 1.0:
            return False  # a model with its guidance built in: a second branch runs only above 1
        return argument in self.defaults


def served(model: str) -> Served:
    """What a bundled model, a folder or a model id would bring; reads its index and nothing more.

    Raises:
        ValueError: it cannot be served; the message is a sentence that says what can.
        OSError: it can be neither found nor downloaded.
    """
    check_name(model)
    if model == RANDOM:
        return served_class("WanPipeline", ["WanTransformer3DModel"])
    folder = tiny.WEIGHTS / model if model in tiny.names() else Path(model)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{model} is a file; --model takes the folder of a whole pipeline, a bundled name or a model id")  # fmt: skip
    path = folder / INDEX if folder.is_dir() else _downloaded(model)
    if not path.is_file():
        raise ValueError(
            f"{model} holds no {INDEX}, so it is no diffusers pipeline; give a folder that `save_pretrained` of a whole pipeline "
            "wrote"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        name = index["_class_name"]
        parts = [index[c][1] for c in COMPONENTS if isinstance(index.get(c), list)]
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"the {INDEX} of {model} is damaged; save or download the pipeline again") from None  # fmt: skip
    return served_class(name, parts)


def served_class(name: object, transformers: Iterable[str]) -> Served:
    """The same of a pipeline's class and the classes of its transformers.

    Raises:
        ValueError: as above.
    """
    import diffusers

    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(cls):
        raise ValueError(
            f"diffusers {diffusers.__version__} has no pipeline {name}; update diffusers, or give another model: {SUCH_AS}"
        )
    known = [part for part in transformers if part in ADAPTERS]
    if not known:
        raise ValueError(
            f"{name} has no transformer that sparsediff supports (`sparsediff models` lists them); {SUCH_AS}"
        )
    needs = what_else(cls)
    if needs is None:
        return Served(
            pipeline=name,
            video=makes_video(cls),
            defaults=MappingProxyType(_defaults(cls)),
        )
    siblings = [p for card in CARDS if card.transformer in known for p in card.pipelines]
    usable = [p for p in siblings if what_else(getattr(diffusers, p, None)) is None]
    family = f"of its family this page serves {', '.join(usable)}" if usable else SUCH_AS
    raise ValueError(f"{name} {needs}; {family}")


def what_else(cls: type | None) -> str | None:
    """What keeps the page from serving a pipeline class, as the predicate of a sentence; None if nothing does."""
    if cls is None:
        return "is not in this release of diffusers"
    defaults = _defaults(cls)
    if "prompt" not in defaults or not {"num_frames", "height"} & defaults.keys():
        return "makes neither videos nor pictures of a prompt"
    required = [n for n, default in defaults.items() if default is inspect.Parameter.empty]
    if required == ["prompt"]:
        required = []
    asked = [n for n in defaults if any(word in n for word in MEDIA)]
    asked = [n for n in asked if not n.startswith("num_") and "ip_adapter" not in n]
    if cls.__name__ in MEDIA_OPTIONAL:
        asked = []
    first = next(iter([*required, *asked]), None)
    return None if first is None else f"needs {first!r} beside a prompt, which this page does not ask for"  # fmt: skip


def _defaults(cls: type) -> dict[str, object]:
    parameters = inspect.signature(cls.__call__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}  # fmt: skip


def _downloaded(model: str) -> Path:
    """The index of a model id, from the cache or the hub."""
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    # It would tell of every attempt in a line of its own.
    noisy = logging.getLogger("huggingface_hub")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        return Path(hub.hf_hub_download(model, INDEX))
    except errors.RepositoryNotFoundError:
        raise OSError(f"the hub has no model {model}, or shows it only to those who are logged in: `hf auth login`") from None  # fmt: skip
    except errors.LocalEntryNotFoundError:
        raise OSError(f"cannot download {model}: the hub cannot be reached, and the model has not been downloaded before; a folder or a bundled model needs no network") from None  # fmt: skip
    except errors.EntryNotFoundError:
        raise ValueError(f"{model} has no {INDEX} on the hub, so it is no diffusers pipeline; {SUCH_AS}") from None  # fmt: skip
    except errors.HFValidationError as error:
        raise ValueError(f"{model!r} is neither a folder nor a model id: {error}") from None
    finally:
        noisy.setLevel(before)

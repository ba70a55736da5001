"""Which blocks attention calls read, mapped back to the tokens they hold; kept in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparsediff.block_mask import area_density, block_areas, unpack_bits
from sparsediff.token_grid import Segment, TokenGrid, TokenOrder, Window

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedCall:
    """One attention call; tensors are on the CPU.

    Attributes:
        layer: its name, as `component.module`.
        step, num_steps, sigma, branch: where in the generation; `num_steps` and `sigma` None if unknown.
        grid: its tokens; None if nobody could tell (such a call ran dense).
        block_size: `(query, key/value)` tokens a block; None without a grid.
        dense_reason: why it ran dense; None for a sparse call.
        heads: the numbers of the heads captured, in the order of the tensors' second dimension.
        windows: the windows in use, see `TokenOrder`; empty if blocks follow the sequence's own order.
        head_windows: `uint8 [B|1, H]`, which of `windows` each head walks; None where there are none.
        bitmap: `uint8 [B|1, H|1, Mq, ceil(Nk / 8)]`, block `j` in bit `j % 8` of byte `j // 8`; None for a dense call.
        mass: `float16 [B, H, Mq, Nk]`, share of the softmax mass of a query block that each key block holds, in the
            order of the mask; rows sum to 1; None unless scores were asked for.
    """

    layer: str
    step: int
    num_steps: int | None
    sigma: float | None
    branch: str
    grid: TokenGrid | None
    block_size: tuple[int, int] | None
    dense_reason: str | None
    heads: tuple[int, ...]
    windows: tuple[Window, ...] = ()
    head_windows: Tensor | None = None
    bitmap: Tensor | None = None
    mass: Tensor | None = None

    @property
    def num_blocks(self) -> tuple[int, int]:
        """`(Mq, Nk)`.

        Raises:
            ValueError: a call whose tokens nobody knows.
        """
        if self.grid is None:
            raise ValueError(f"{self.layer} at step {self.step} has no grid: {self.dense_reason}")
        tokens = self.grid.num_tokens
        return -(-tokens // self.block_size[0]), -(-tokens // self.block_size[1])

    def keep(self) -> Tensor:
        """The blocks read, `bool [B|1, H, Mq, Nk]`; all of them in a dense call."""
        rows, columns = self.num_blocks
        if self.bitmap is None:
            return torch.ones(1, len(self.heads), rows, columns, dtype=torch.bool)
        kept = unpack_bits(self.bitmap, columns)
        return kept.expand(-1, len(self.heads), -1, -1)

    def density(self) -> Tensor:
        """Kept share of the token area, `float32 [B|1, H]`."""
        return area_density(self.keep(), self.block_size, (self.grid.num_tokens,) * 2)

    def kept_mass(self) -> Tensor | None:
        """Share of the softmax mass in the blocks read, `float32 [B, H]`; None without scores."""
        if self.mass is None:
            return None
        rows, _ = block_areas(self.block_size, (self.grid.num_tokens,) * 2)
        inside = (self.mass.float() * self.keep()).sum(-1)
        return (inside @ rows) / self.grid.num_tokens

    def blocks_of_tokens(self, head: int, *, clip: int = 0) -> tuple[Tensor, Tensor]:
        """The query block and the key block that hold each token of the model's own order: `int64 [S]` twice.

        Args:
            head: place among `heads`.
            clip: row of the batch.
        """
        place = torch.arange(self.grid.num_tokens)
        if self.windows:
            windows = self.head_windows
            window = int(windows[clip % len(windows), head])
            place = TokenOrder((self.windows[window],)).inverse(self.grid)[0].long()
        return place // self.block_size[0], place // self.block_size[1]

    def attended(self, token: int, head: int, *, clip: int = 0) -> Tensor:
        """Which tokens the query block that holds `token` reads: `bool [S]`, in the model's own order."""
        kept = self.keep()
        query_blocks, key_blocks = self.blocks_of_tokens(head, clip=clip)
        return kept[clip % len(kept), head, query_blocks[token]][key_blocks]

    def attended_patch(self, patch: tuple[int, int, int], head: int, *, clip: int = 0) -> Tensor:
        """Which patches of the video the one at `(frame, row, column)` reads: `bool [F, H, W]` in latent tokens.

        Raises:
            ValueError: no such patch.
        """
        shape = self.grid.shape
        if any(not 0 <= at < size for at, size in zip(patch, shape, strict=True)):
            raise ValueError(f"patch {patch} lies outside the grid {shape}")
        start, stop = self.grid.grid_span
        frame, row, column = patch
        token = start + (frame * shape[1] + row) * shape[2] + column
        return self.attended(token, head, clip=clip)[start:stop].view(shape)


@dataclass(kw_only=True)
class Capture:
    """What one generation read, call by call; `capture` fills it, `save` and `load` keep it.

    Attributes:
        calls: in the order in which they ran.
        complete: False if the memory cap ended the recording before the run ended.
        about: method, schedule and version, for people.
    """

    calls: list[CapturedCall] = field(default_factory=list)
    complete: bool = True
    about: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors; masks that did not change from one call to the next are held once."""
        return sum(x.nbytes for x in self._tensors().values())

    def find(
        self, *, layer: str | None = None, step: int | None = None, branch: str | None = None
    ) -> list[CapturedCall]:
        """The calls of a layer, step and branch; None takes any."""
        wanted = {"layer": layer, "step": step, "branch": branch}
        return [
            call
            for call in self.calls
            if all(v is None or getattr(call, name) == v for name, v in wanted.items())
        ]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header.

        Raises:
            ValueError: nothing was captured.
        """
        from safetensors.torch import save_file

        if not self.calls:
            raise ValueError(
                "nothing was captured: run the pipeline inside `with capture(handle):`, and check that its layers=, "
                "steps= and branches= name calls of the run"
            )
        tensors = self._tensors()
        names = {id(tensor): name for name, tensor in tensors.items()}
        header = {
            "schema": SCHEMA,
            "complete": self.complete,
            "about": self.about,
            "calls": [_call_to_json(call, names) for call in self.calls],
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"sparsediff_capture": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Capture:
        """Read what `save` wrote.

        Raises:
            ValueError: not a capture, or one of a later version of the library.
            OSError: nothing there.
        """
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no mask capture: {error}") from None
        with opened as file:
            header = json.loads((file.metadata() or {}).get("sparsediff_capture", "null"))
            if header is None:
                raise ValueError(f"{path} is no mask capture")
            if header["schema"] != SCHEMA:
                raise ValueError(
                    f"{path} has schema {header['schema']}, this version of sparsediff reads {SCHEMA}; upgrade "
                    "sparsediff or capture again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(
            calls=[_call_from_json(call, tensors) for call in header["calls"]],
            complete=header["complete"],
            about=header["about"],
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Each tensor once, by a name for the file."""
        found = {}
        for call in self.calls:
            for tensor in (call.head_windows, call.bitmap, call.mass):
                if tensor is not None:
                    found.setdefault(id(tensor), tensor)
        return {str(number): tensor for number, tensor in enumerate(found.values())}


def _call_to_json(call: CapturedCall, names: dict[int, str]) -> dict[str, object]:
    plain = ("layer", "step", "num_steps", "sigma", "branch", "block_size", "dense_reason", "heads", "windows")  # fmt: skip
    data = {name: getattr(call, name) for name in plain}
    for name in ("head_windows", "bitmap", "mass"):
        tensor = getattr(call, name)
        data[name] = None if tensor is None else names[id(tensor)]
    segments = call.grid.segments if call.grid else ()
    data["grid"] = [[s.role, s.length, s.shape] for s in segments] or None
    return data


def _call_from_json(data: dict[str, object], tensors: dict[str, Tensor]) -> CapturedCall:
    data = dict(data)
    if data["grid"] is not None:
        data["grid"] = TokenGrid(
            tuple(
                Segment(role=role, length=length, shape=shape and tuple(shape))
                for role, length, shape in data["grid"]
            )
        )
    data["block_size"] = data["block_size"] and tuple(data["block_size"])
    data["heads"] = tuple(data["heads"])
    data["windows"] = tuple(w if isinstance(w, str) else tuple(w) for w in data["windows"])
    for name in ("head_windows", "bitmap", "mass"):
        data[name] = None if data[name] is None else tensors[data[name]]
    return CapturedCall(**data)

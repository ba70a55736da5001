"""What the demo keeps of its runs: a folder of results like an evaluation's, of one prompt and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sparsediff.demo.studio import REPORT, SparseRun, Studio
from sparsediff.eval.arms import DENSE, Arm
from sparsediff.eval.clips import Reference, clip_result
from sparsediff.eval.compare import Request
from sparsediff.eval.measure import Made
from sparsediff.eval.metrics import choose
from sparsediff.eval.report import write_report
from sparsediff.eval.results import CAPTURES, CLIPS, ArmResult, ClipResult, save_arm
from sparsediff.eval.run_folder import blank_arm, configuration
from sparsediff.eval.suites import Suite
from sparsediff.eval.video import to_pixels, write_mp4

# What a visitor can wait for: optical flow takes minutes, and two clips of one scene flicker alike.
METRICS = ("psnr", "ssim", "lpips", "st_lpips")
# A page carries its clips; larger ones are linked.
PAGE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """The results of one request.

    Attributes:
        studio: whose pipeline ran.
        folder: where they go.
        request: what was generated.
        metrics: what can be measured here.
        blanks: name of each arm -> its result before the first clip.
    """

    studio: Studio
    folder: Path
    request: Request
    metrics: tuple[str, ...]
    blanks: dict[str, ArmResult]

    @classmethod
    def begin(cls, studio: Studio, folder: Path, request: Request, arms: Sequence[Arm]) -> Record:
        """Nothing measured yet.  The caller has its turn: what is noted of the pipeline is noted of the stock one."""
        possible, notes = choose(None, (request.height, request.width), request.frames or 1)
        metrics = tuple(name for name in METRICS if name in possible)
        call = request.arguments()
        for name in ("prompt", "generator", "output_type"):
            del call[name]
        shared = {
            "suite": Suite(
                name="demo", version="1", prompts=(request.prompt,), seeds=(request.seed,)
            ),
            "call": call,
            "configuration": configuration(studio.pipe, metrics, repeats=1),
            "model": studio.model,
            "fps": studio.served.fps,
            "notes": tuple(note for note in notes if "LPIPS" in note),
        }
        return cls(
            studio=studio,
            folder=folder,
            request=request,
            metrics=metrics,
            blanks={arm.name: blank_arm(arm, studio.pipe, **shared) for arm in (DENSE, *arms)},
        )

    def add_dense(self, made: Made) -> None:
        """The stock pipeline's clip and times."""
        self._save(DENSE, made, clip_result([made], metrics=(), **self._clip))

    def add_sparse(self, arm: Arm, run: SparseRun, dense: Made) -> None:
        """A method's clip, how it compares with the dense one, and the blocks that it read."""
        reference = Reference.of(dense)
        about = {"metrics": self.metrics, "reference": reference, "report": run.report}
        self._save(arm, run.made, clip_result([run.made], **about, **self._clip))
        run.masks.save(self.folder / CAPTURES / f"{arm.name}.safetensors")

    def clip(self, arm: Arm) -> Path:
        """Where an arm's clip is."""
        return self.folder / CLIPS / arm.name / "0.mp4"

    def handed_out(self, arm: Arm) -> Path:
        """The file for people: the clip, or the picture without the losses of a film's compression."""
        clip = self.clip(arm)
        return clip if self.studio.served.video else clip.with_suffix(".png")

    def write_report(self) -> Path:
        """The evaluation's page of what is there so far."""
        return write_report(self.folder, out=self.folder / REPORT, max_bytes=PAGE_BYTES)

    @property
    def _clip(self) -> dict[str, object]:
        return {"index": 0, "prompt": self.request.prompt, "seed": self.request.seed}

    def _save(self, arm: Arm, made: Made, clip: ClipResult) -> None:
        path = self.clip(arm)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, made.video, self.studio.served.fps)
        if not self.studio.served.video:
            Image.fromarray(to_pixels(made.video[0])).save(self.handed_out(arm))
        clip = dataclasses.replace(clip, video=path.relative_to(self.folder).as_posix())
        save_arm(self.folder, dataclasses.replace(self.blanks[arm.name], clips=(clip,)))

"""The options of a training run, which ``hpdm train`` takes and a run's ``config.json`` keeps."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hpdm.checks import at_least
from hpdm.data.mixture import parse_root
from hpdm.objective import Objective
from hpdm.recipe import Recipe, RecipeChanges
from hpdm.system import Architecture
from hpdm.training.ema import laws
from hpdm.training.steering import Steering


@dataclass(frozen=True)
class TrainOptions:
    """Train a model on videos. Options that are not given take the preset's values (Table 8). Works under torchrun."""

    data: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    """Required. Folder of videos or images (UCF-101's layout, class folders, or flat) or of tar shards, or a pattern of
    shards. Given several times, the sets are mixed; --data images:0.5 gives a set the weight 0.5 instead of 1."""
    out: Path
    """Folder of the run; a run that exists already is resumed."""
    data_changed: bool = False
    """Resume a run although its clips or embeddings are others than before, which the run's history then keeps."""
    embeddings: Path | None = None
    """Embeddings of the clips' captions, from `hpdm data embed`: the model is conditioned on text, not on classes."""
    init: Path | None = None
    """Run of the same model whose newest weights to start from, with a fresh optimizer, schedule and moving average. Or
    a file that `hpdm export` wrote, or the name of weights that come with hpdm."""
    base: Path | None = None
    """Run of the same network with fewer levels, trained at low resolution, to start from."""
    preset: str = "tiny"
    """hpdm_s, hpdm_m, hpdm_l, hpdm_t2v, hpdm_t2v_1k or tiny; the autoencoders lvdm_ae or lvdm_ae_tiny; latent diffusion
    with lvdm_ucf, lvdm_released, lvdm_predict, lvdm_interpolate or lvdm_tiny."""
    autoencoder: Path | None = None
    """Required for latent diffusion: run of the autoencoder on whose latents it works, or a file that `hpdm export`
    wrote of one. The new run contains it."""
    latents: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Latents of the clips of --data by that autoencoder, from `hpdm data encode`: clips are then not encoded in every
    step, and videos not decoded. Given once for each --data, in the same order."""
    recipe: Annotated[RecipeChanges, tyro.conf.arg(name="")] = field(default_factory=RecipeChanges)
    """How to train."""
    architecture: Annotated[Architecture, tyro.conf.arg(name="")] = field(default_factory=Architecture)
    """What to train."""
    steering: Annotated[Steering, tyro.conf.arg(name="")] = field(default_factory=Steering)
    """How to follow and keep the run."""
    micro_batch: int | Literal["auto"] | None = None
    """Clips at a time per process; gradients are accumulated over the step. Default: a process's whole share. "auto":
    as many as fit into memory by the prediction of `hpdm plan`."""
    compile: bool = False
    """Compile the network with torch.compile."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    """Backend of every op; "reference" is the paper's formulas without our kernels."""
    recompute: Literal["none", "selective", "block"] = "none"
    """What the backward pass computes again instead of keeping it: less memory, more work; see `hpdm plan`."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of matrix products: "tf32" on CUDA, "bf16" by automatic mixed precision. The paper found that mixed
    precision trains worse."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 for no clipping."""
    max_skipped: int = 10
    """A step whose gradient is not finite is skipped; so many in a row end the run."""
    timeout: float = 300.0
    """Seconds after which a process that does not answer ends the run, by name; for runs of several processes."""
    objective: Annotated[Objective, tyro.conf.arg(name="")] = field(default_factory=Objective)
    """What training samples show."""
    split: Literal["train", "test"] | None = None
    """Use UCF-101's official split, of each set that has one."""
    stride: int = 1
    """Step between the frames of a clip."""
    fps: float | None = None
    """Frame rate to which clips are resampled before --stride counts; each clip's own if not given."""
    short: Literal["error", "skip", "loop"] | None = None
    """What to do with a clip that is shorter than a window: leave it out and count it, stop, or play it again from its
    start. Default: skip, or what the run had that is resumed."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """What decodes videos; all give the same frames. "auto" takes decord where it is proven to, else PyAV."""
    seed: int = 0
    workers: int = 1
    """Processes that read clips ahead, per training process; with 0 the training process reads them itself."""
    cache_mb: int = 1024
    """Memory for decoded clips and for the processes that decode, shared between the workers."""
    log: Literal["jsonl", "tensorboard", "wandb"] = "jsonl"
    """log.jsonl is always written; "tensorboard" and "wandb" write to these, too."""
    log_every: int = 10
    """Steps between rows of the log, which are means over these steps."""
    save_every: int = 500
    sample_every: int = 0
    """Steps between sheets of the averaged weights in RUN/samples; 0 for none. They show samples, or of an autoencoder
    clips and their reconstructions."""
    sample_steps: int = 32
    """Sampling steps on level 0 for the grids."""
    profile: int = 0
    """Steps to profile, from the fifth on, into RUN/profile; 0 for none."""
    device: str = "auto"
    """"auto" takes CUDA when there is one."""

    def __post_init__(self) -> None:
        if isinstance(self.data, str | os.PathLike):
            raise TypeError(f"data: got {self.data!r}, expected a tuple of folders; train_options() takes one as it is")
        if not self.data:
            raise ValueError("data: got none, expected --data with a folder of videos or shards")
        at_least(self.recipe, 1, "steps", "batch", "shard_ranks")
        at_least(self.recipe, 0, "lr", "warmup", "weight_decay", "cooldown")
        if self.recipe.ema is not None or self.recipe.ema_decay is not None:
            laws(self.recipe.ema or (), self.recipe.ema_decay)
        if self.micro_batch != "auto":
            at_least(self, 1, "micro_batch")
            if self.steering.memory_gb is not None:
                raise ValueError(f"memory_gb: got {self.steering.memory_gb}, expected it with --micro-batch auto alone")
        at_least(self, 1, "stride", "log_every", "save_every", "sample_steps", "max_skipped", "timeout")
        at_least(self, 0, "clip_norm", "workers", "cache_mb", "sample_every", "seed", "profile")
        if self.init is not None and self.base is not None:
            raise ValueError("base: got both init and base, expected one of them")

    def as_json(self, recipe: Recipe) -> dict[str, Any]:
        """All options as one flat dictionary of JSON values, with the full ``recipe`` in place of the changes to it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["recipe"], values["architecture"], values["objective"], values["steering"]
        del values["data_changed"]  # about the command, not about the run
        if len(self.data) == 1:
            values["data"] = self.data[0]
        weights = [parse_root(root).weight for root in self.data]
        values["data_weights"] = [weight / weights[0] for weight in weights]
        for part in (self.architecture, self.objective, recipe, self.steering):
            values |= dataclasses.asdict(part)
        return json.loads(json.dumps(values, default=str))


def train_options(**values: Any) -> TrainOptions:
    """:class:`TrainOptions` from flat names, as on the command line: ``train_options(steps=9, ...)``.

    ``data`` and ``latents`` are one folder, or several in a list or tuple.

    Raises:
        TypeError: an unknown name, or ``data`` or ``out`` missing.
        ValueError: a value out of range.
    """
    parts = {"recipe": RecipeChanges, "architecture": Architecture, "objective": Objective, "steering": Steering}
    names = {part: {f.name for f in dataclasses.fields(kind)} for part, kind in parts.items()}
    nested = {part: kind(**{n: values.pop(n) for n in names[part] & set(values)}) for part, kind in parts.items()}
    for name in ("data", "latents"):
        if isinstance(values.get(name), str | os.PathLike):
            values[name] = [values[name]]
        if name in values:
            values[name] = tuple(map(Path, values[name]))
    return TrainOptions(**nested, **values)

"""Settings of distillation and of probes: schema, defaults and help text, as in splatkit.config. No torch here: --help is instant.

Defaults are what works best as far as it is known; configs/distill/faithful.yaml is the paper and its code, switch by switch.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ..config import _require
from ..errors import BadConfig


@dataclass(frozen=True)
class BackboneConfig:
    """The vision transformer that is taught, and whose first state is the teacher."""

    name: str = "vit_small_patch14_dinov2"
    """Name in timm: any vision transformer with patch tokens. Empty: what the file of `weights` says."""
    weights: str = "pretrained"
    """`pretrained` fetches the published ones by the network, `random` takes none, else a file (.safetensors, .pth)."""
    embed_dim: int = 0
    """Channels; 0 here and below is what the name says."""
    depth: int = 0
    """Blocks."""
    num_heads: int = 0
    """Heads of attention."""
    patch_size: int = 0
    """Pixels a side of a patch."""
    img_size: int = 0
    """Pixels a side for which the position embedding is made; it is interpolated to other sizes."""

    def __post_init__(self):
        _require(self, "0 or more", embed_dim=self.embed_dim >= 0, depth=self.depth >= 0, num_heads=self.num_heads >= 0, patch_size=self.patch_size >= 0, img_size=self.img_size >= 0)


@dataclass(frozen=True)
class Adapter:
    """What of the backbone trains."""

    kind: Literal["lora", "full"] = "lora"
    """Low-rank adapters beside the frozen layers of attention (qkv and proj), or every weight."""
    rank: int = 8
    """Of the adapters."""
    alpha: float = 8.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.1
    """Of the adapters' input."""
    patch_embed: bool = False
    """Adapt the patch embedding too, as the suffix rule of the paper's code has it."""

    def __post_init__(self):
        _require(self, "1 or more", rank=self.rank >= 1)
        _require(self, "above 0", alpha=self.alpha > 0)
        _require(self, "0 to below 1", dropout=0 <= self.dropout < 1)


@dataclass(frozen=True)
class HeadConfig:
    """The head that scores prototypes, for the losses that have one."""

    prototypes: int = 65_536
    """Prototypes."""
    hidden: int = 2048
    """Channels of the hidden layers."""
    bottleneck: int = 256
    """Channels before the prototypes."""
    shared: bool = False
    """Score labels with the student's own head, as summaries of the paper say; else with its moving average, as the code does."""

    def __post_init__(self):
        _require(self, "2 or more", prototypes=self.prototypes >= 2, hidden=self.hidden >= 2, bottleneck=self.bottleneck >= 2)


@dataclass(frozen=True)
class LossConfig:
    """What brings the student to its label."""

    kind: Literal["dino", "cosine", "features"] = "dino"
    """Cross-entropy of prototypes (paper, eq. 5); 1 - cos of the features; their mean absolute difference."""
    student_temperature: float = 1.0
    """Of the student's scores. The paper's code has 1 and 1, DINOv2 0.1 and 0.05 with centering."""
    teacher_temperature: float = 1.0
    """Of the teacher's scores."""
    centering: Literal["none", "mean", "sinkhorn"] = "none"
    """Against the collapse of prototypes at low temperatures: take a running mean from the teacher's scores, or share the prototypes out."""
    center_momentum: float = 0.9
    """Of that running mean."""

    def __post_init__(self):
        _require(self, "above 0", student_temperature=self.student_temperature > 0, teacher_temperature=self.teacher_temperature > 0)
        _require(self, "0 to below 1", center_momentum=0 <= self.center_momentum < 1)


@dataclass(frozen=True)
class EMAConfig:
    """How the teacher follows the student."""

    rate: float = 0.999
    """Of what the teacher keeps at each update; 1 freezes it."""
    every: int = 10
    """Optimiser steps between two updates: 10 in the paper's code, 1 in the paper."""
    when: Literal["before", "after"] = "before"
    """Before the optimiser's step, after backward, as in the paper's code, or after it."""
    of: Literal["factors", "merged"] = "factors"
    """Average the adapters' factors, as the code does, or the weights that they stand for."""

    def __post_init__(self):
        _require(self, "0 to 1", rate=0 <= self.rate <= 1)
        _require(self, "1 or more", every=self.every >= 1)


@dataclass(frozen=True)
class LabelConfig:
    """How the teacher's features of the context photos become the label of the target photo."""

    upsampling: Literal["masks", "bilinear"] = "masks"
    """Inside of objects only (paper, eq. 2 and 3), or across their borders."""
    positions: Literal["half_pixel", "align_corners"] = "half_pixel"
    """Where tokens lie: in the middle of their patches, or pushed outwards by up to half a patch, as in the paper's code."""
    fallback: Literal["ladder", "zero"] = "ladder"
    """A pixel with no token of its object around it takes one farther away, else plain bilinear; or zeros, as in the paper's code."""
    blend: float = 0.5
    """Share of the splatted feature against the mean of its object (paper, eq. 4); 1 is off: for matching across views."""
    blend_unlabelled: bool = False
    """Whether pixels without a label are a region too."""
    coverage: Literal["normalise", "zero"] = "normalise"
    """Divide by the accumulated alpha, and leave out tokens of less than alpha_min; or count what nothing covers with features of zero, as the paper's code does."""
    alpha_min: float = 0.5
    """Alpha from which a pixel of the splatted label is valid."""
    shrink: Literal["bilinear", "area"] = "bilinear"
    """How the label comes to the student's token grid: four pixels in the middle of each patch, as the paper's code does, or all of them."""
    regions: Literal["masks", "kmeans", "none"] = "masks"
    """Where objects come from: instance masks, k-means of the teacher's tokens, or nowhere (plain up-sampling, no blending)."""
    kmeans: int = 24
    """Regions of k-means."""

    def __post_init__(self):
        _require(self, "0 to 1", blend=0 <= self.blend <= 1, alpha_min=0 <= self.alpha_min < 1)
        _require(self, "1 or more", kmeans=self.kmeans >= 1)


@dataclass(frozen=True)
class GeometryConfig:
    """Where the Gaussians come from that carry features."""

    source: Literal["depth", "lift", "scene"] = "lift"
    """`depth`: one per pixel at its known depth; `lift`: what the frozen network of `splatkit lift` makes of the context photos; `scene`: a run of `splatkit reconstruct`."""
    weights: Path | None = None
    """Of `lift`."""
    cache: Path | None = None
    """Folder in which the Gaussians of `lift` are kept, in half precision, by pair and weights."""
    runs: Path | None = None
    """Folder with a run, or a scene file, for each scene of the data, by its name; for one scene alone the run itself."""
    sigma_px: float = 0.5
    """Standard deviation of the Gaussians of `depth`, in pixels of their photo where depth is dense; larger where it has holes."""
    optimise: int = 0
    """Steps in which the features of the Gaussians are fitted to the maps of all context photos, after the weighted mean that they start from."""
    permuted: bool = False
    """Wrong on purpose: the geometry of another pair, to see what of a gain is due to geometry."""

    def __post_init__(self):
        _require(self, "above 0", sigma_px=self.sigma_px > 0)
        _require(self, "0 or more", optimise=self.optimise >= 0)


@dataclass(frozen=True)
class DataConfig:
    """Photos with poses, in scenes, and how views are drawn from them."""

    folder: Path | None = None
    """One posed folder (COLMAP, transforms.json, ScanNet, ScanNet++), or a folder of such; None takes rooms."""
    rooms: int = 0
    """Procedural rooms instead of a folder."""
    first_room: int = 0
    """Seed of the first of them."""
    photos: int = 24
    """Photos of each room."""
    cache: Path | None = None
    """Folder in which what is seen of rooms is kept, 11 bytes a pixel."""
    height: int = 336
    """Photos are brought to this size; both sides must be multiples of the patch, and of 16 for `lift`."""
    width: int = 448
    """Likewise."""
    masks: str = "auto"
    """Folder with one label picture for each photo, beside the photos' folder; `auto` looks for instances, instance_segmentation, instance-filt; `none` reads none."""
    gap: tuple[int, int] = (8, 12)
    """Photos between the two context photos, from and to; the paper's code always takes the first."""
    contexts: int = 2
    """Context photos of a sample, evenly over the gap."""
    targets: int = 1
    """Target photos of a sample, between the outer context photos."""
    allow_context_target: bool = False
    """Whether a target may be a context photo, as in the paper's code."""
    flip: bool = True
    """Mirror half of the samples, cameras too."""
    workers: int = 0
    """Processes that read photos; 0 reads them in this one."""

    def __post_init__(self):
        _require(self, "1 or more", height=self.height >= 1, width=self.width >= 1, targets=self.targets >= 1, photos=self.photos >= 3)
        _require(self, "0 or more", rooms=self.rooms >= 0, workers=self.workers >= 0, first_room=self.first_room >= 0)
        _require(self, "2 or more", contexts=self.contexts >= 2)
        _require(self, "from and to, 1 or more", gap=1 <= self.gap[0] <= self.gap[1])


@dataclass(frozen=True)
class Distill:
    """Teach a vision backbone 3D: two photos, through Gaussians, say what it must see in a third."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="RUN")] = Path("runs/distill")
    """Run folder: config, metrics, checkpoint, backbone.safetensors."""
    method: Literal["geometry", "self", "correspondence"] = "geometry"
    """The label: features through Gaussians; the teacher's own features of the target photo (the control without geometry); or that features of one point agree in two views
    (after MEF), which needs depth."""
    steps: int = 50_000
    """Optimiser steps."""
    batch: int = 1
    """Samples of an optimiser step, over all processes."""
    micro_batch: int = 1
    """Samples that go through the network at once in a process; gradients of a batch are accumulated."""
    lr: float = 2e-5
    """Step size of AdamW after the warm-up."""
    weight_decay: float = 0.0
    """Of AdamW."""
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    """After a linear warm-up to 0 by half a cosine; or torch's one-cycle over ten steps more than there are, as in the paper's code."""
    warmup: float = 0.01
    """Share of the steps."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """Precision of the backbones: half on a card, full on a CPU, where a run repeats itself bit by bit."""
    seed: int = 0
    """The same seed on the same CPU gives the same backbone, bit by bit."""
    save_every: int = 500
    """Steps between two checkpoints."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto takes a CUDA device where there is one."""
    tensorboard: bool = False
    """Write metrics for TensorBoard too, where it is installed."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    adapter: Adapter = field(default_factory=Adapter)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        _require(self, "1 or more", steps=self.steps >= 1, batch=self.batch >= 1, micro_batch=self.micro_batch >= 1, save_every=self.save_every >= 1, log_every=self.log_every >= 1)
        _require(self, "above 0", lr=self.lr > 0)
        _require(self, "0 or more", weight_decay=self.weight_decay >= 0, clip=self.clip >= 0)
        _require(self, "0 to 1", warmup=0 <= self.warmup <= 1)
        _require(self, "0 to 2^31 - 1", seed=0 <= self.seed < 2 ** 31)
        if self.batch % self.micro_batch:
            raise BadConfig(f"batch is {self.batch}; expected a multiple of micro_batch, {self.micro_batch}")
        if (self.data.folder is None) == (self.data.rooms == 0):
            raise BadConfig("no data, or two kinds of it: give either data.folder or data.rooms")
        if self.label.positions == "align_corners" and self.label.upsampling == "bilinear":
            raise BadConfig("label.positions align_corners belongs to label.upsampling masks")

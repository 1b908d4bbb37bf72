"""A study's recipe: one TOML file read into frozen, strictly checked models.

Defaults live here, once; a recipe in `configs/` holds only what differs. The same reader checks the
JSON form in which a recipe travels to the sites.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from core.privacy.config import PrivacyConfig, refuse_unproven
from core.strict import Count, Jitter, NonNegative, Positive, Share, Strict, load_toml, validate


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("must be [low, high]")
    return pair


Area = Annotated[
    tuple[Annotated[float, Field(ge=1e-3, le=1)], Annotated[float, Field(ge=1e-3, le=1)]],
    AfterValidator(_ordered),
]
Window = tuple[Annotated[float, Field(ge=-2000, le=5000)], Annotated[float, Field(ge=1, le=10_000)]]
Sigma = Annotated[
    tuple[Annotated[float, Field(ge=0, le=10)], Annotated[float, Field(ge=0, le=10)]],
    AfterValidator(_ordered),
]


class ModelConfig(Strict):
    """Backbone (any timm vision transformer) and projection head."""

    backbone: Annotated[str, Field(min_length=1)] = "vit_tiny_patch16_224"
    """timm model name."""
    options: dict[str, int | float | bool | str] = Field(default={})
    """Further arguments of timm.create_model, such as depth or patch_size."""
    init_file: str = ""
    """Where round 1 starts, read by the coordinator: a pretrained backbone (.safetensors, timm's
    names), or a round of another run (its teacher, heads included); empty: random weights."""
    phantom_steps: Annotated[int, Field(ge=0)] = 0
    """Steps by which the coordinator pretrains the backbone on drawn pictures before round 1
    (core.pretrain), on its GPU if it has one; 0: none."""
    phantom_batch: Annotated[int, Field(ge=7)] = 14
    """Pictures of such a step, of all seven modalities together. On a GPU many cost as much as few;
    the learning rate grows with the root of it."""
    phantoms: Annotated[int, Field(ge=0)] = 0
    """Different pictures drawn of each modality; 0: five for eight steps."""
    head_hidden: Count = 256
    embedding_dim: Annotated[int, Field(ge=2)] = 64
    drop_path: Jitter = 0.0
    """Stochastic depth of the student."""
    checkpointing: bool = False
    """Keep of each block of the student its input alone, and compute the rest anew on the way back:
    a step takes a fraction of the memory and about a quarter more time. The gradient is the same up
    to rounding."""

    @model_validator(mode="after")
    def _can_start(self) -> Self:
        if self.init_file and self.phantom_steps:
            raise ValueError("'init_file' and 'phantom_steps' are two starts: give one of them")
        if self.phantoms == 1:
            raise ValueError("'phantoms' must be 2 or more, or 0: one picture tells no deviation")
        return self

    @model_validator(mode="after")
    def _fetches_nothing(self) -> Self:
        """A recipe comes from outside a site: it must not make timm download or read files."""
        if ":" in self.backbone:
            raise ValueError("'backbone' must be a plain timm name, without a source before ':'")
        for option in sorted(self.options):
            if option.startswith(("pretrained", "checkpoint")) or option == "cache_dir":
                raise ValueError(
                    f"option '{option}' is not allowed: weights come from 'init_file' alone"
                )
        return self


class ImagesConfig(Strict):
    """How sites make their pictures, so that those of all sites go together."""

    px: Annotated[int, Field(ge=16)] = 64
    """Side of the square pictures: at least a view's, so that a crop enlarges little."""
    ct_window: Window = (40.0, 400.0)
    """Centre and width in Hounsfield units, shown from black to white."""


class ViewsConfig(Strict):
    """Multi-crop augmentation."""

    global_px: Annotated[int, Field(ge=8)] = 64
    local_px: Annotated[int, Field(ge=8)] = 32
    local_views: Annotated[int, Field(ge=0)] = 4
    global_area: Area = (0.2, 1.0)
    """Cropped share of the image's area, lowest and highest."""
    local_area: Area = (0.05, 0.2)
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 30.0
    flip_probability: Share = 0.5
    jitter_probability: Share = 0.8
    brightness: Jitter = 0.2
    contrast: Jitter = 0.2
    saturation: Jitter = 0.1
    hue: Jitter = 0.02
    blur_sigma: Sigma = (0.1, 1.0)
    """Gaussian sigma in pixels of a 224-pixel view; scaled with the view."""
    blur_probability: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)
    """For the first global, the second global and the local views."""


class MemoryConfig(Strict):
    """Memory bank of past teacher embeddings, one ring a modality."""

    entries_per_modality: Annotated[int, Field(ge=16)] = 256
    blocks: Count = 1
    at_round_start: Literal["kept", "refilled"] = "kept"
    centred: bool = False
    """Compare embeddings and entries by their difference from the mean of the modality's ring."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.blocks > self.entries_per_modality // 8:
            raise ValueError("a block needs at least 8 entries: lower 'blocks' or raise 'entries'")
        return self


class LossConfig(Strict):
    """Semantic consistency against the memory, KoLeo, and description."""

    student_temperature: Positive = 0.1
    teacher_temperature: tuple[Positive, Positive] = (0.02, 0.03)
    """First and last value of the warm-up."""
    temperature_warmup: Share = 0.3
    """Share of all steps over which the teacher temperature rises."""
    koleo_weight: NonNegative = 0.1
    description_weight: NonNegative = 0.0
    """Of telling what a view shows (core.description); 0: no such heads."""


class OptimConfig(Strict):
    """AdamW with schedules on the global step."""

    batch_size: Annotated[int, Field(ge=2)] = 56
    """Images a step and site, split evenly over the modalities that the site holds."""
    learning_rate: Positive = 2e-3
    """For 256 images a step; scaled linearly with `batch_size`. Under record-mode privacy a step
    takes patients: with `privacy.expected_patients`."""
    final_learning_rate: NonNegative = 1e-6
    warmup: Share = 0.1
    """Share of all steps with rising learning rate."""
    weight_decay: tuple[NonNegative, NonNegative] = (0.04, 0.4)
    accumulate: Count = 1
    """Parts of a site's share of a batch that go through the networks one after another: so many
    times less memory for activations. The gradient is that of the whole batch, KoLeo included, up
    to rounding (core.step); above 1, each step passes the global views once more for it."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_norm: Annotated[float, Field(ge=1e-3, allow_inf_nan=False)] = 1.0
    """Per tensor, not over all. Gradients as small as AdamW's 1e-8 would pass through it in
    proportion, and what leaves after a step could be turned back into an image (benchmarks)."""
    ema_momentum: Share = 0.97
    """At the first step; rises to 1 by a cosine. 1 freezes the teacher."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU and on a CPU with bf16 units, else fp32. Record-mode privacy is fp32."""

    @model_validator(mode="after")
    def _parts_hold_images(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate = {self.accumulate} parts of {self.batch_size} images leave some "
                "empty: lower 'accumulate' or raise 'batch_size'"
            )
        return self


class FederationConfig(Strict):
    """Rounds, quorum and what is exchanged."""

    rounds: Count = 3
    local_steps: Count = 20
    min_sites: Count = 2
    """Quorum: a round with fewer admitted updates than this fails the run."""
    round_timeout_seconds: Positive = 3600.0
    wait_for_sites_seconds: Positive = 600.0
    """How long a round waits for `min_sites` to be connected."""
    grace_seconds: NonNegative = 180.0
    """How long a round waits for a site of the round before that has gone; Flower takes a minute to
    let a killed one back in."""
    teacher: Literal["average", "rebuild"] = "average"
    """average: sites send teachers too; rebuild: the server continues the EMA from the students."""
    transport: Literal["float32", "delta16", "delta8"] = "float32"
    """delta16: half the bytes; delta8: half of them again on the way up. core/transport.py states
    the error of each."""
    prototypes_per_modality: Annotated[int, Field(ge=0)] = 16
    """To be looked at; with record privacy they are sent back as well. 0: none."""
    prototype_min_patients: Annotated[int, Field(ge=2)] = 10
    """A prototype made of fewer patients never leaves a site."""
    prototype_decay: Share = 0.9
    """Factor a round on the counts of a site that is absent."""
    keep_every: Count = 1
    """The coordinator keeps the checkpoints of rounds that this divides, the first and the last
    three."""
    max_update_norm: Positive = 10.0
    """Largest admitted |update| in units of |global student|."""
    max_examples: Count = 100_000_000
    """Largest admitted number of images of a site and modality."""
    robust: Literal["norm_bound", "trimmed_mean", "none"] = "norm_bound"
    """norm_bound: longer updates are cut to `norm_bound`; trimmed_mean: at every weight the lowest
    and highest fifth of the sites are left out (needs five sites); none: the plain mean."""
    norm_bound: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    """In units of the median of the round's updates; a site beyond it is reported in any case."""
    quarantine_after: Annotated[int, Field(ge=0)] = 3
    """A site rejected, or with an update beyond `norm_bound`, so many times in a row is not asked
    again until the coordinator releases it; 0: never."""

    @model_validator(mode="after")
    def _trimming_leaves_some(self) -> Self:
        if self.robust == "trimmed_mean" and self.min_sites < 5:
            raise ValueError(
                "robust = 'trimmed_mean' leaves out the lowest and the highest fifth of the sites: "
                "raise 'min_sites' to 5 at the least, or take 'norm_bound'"
            )
        return self


class EvaluationConfig(Strict):
    """kNN of the received global teacher on a site's own labelled split; only the metric leaves."""

    every_rounds: Annotated[int, Field(ge=0)] = 1
    """0 switches it off."""
    max_images: Count = 1000
    """Labelled training images used at most, per modality."""
    neighbours: Count = 20


class Recipe(Strict):
    """Everything a study fixes for all sites."""

    name: Annotated[str, Field(min_length=1)] = "study"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: ModelConfig = ModelConfig()
    images: ImagesConfig = ImagesConfig()
    views: ViewsConfig = ViewsConfig()
    memory: MemoryConfig = MemoryConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    federation: FederationConfig = FederationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        refuse_unproven(self)
        return self

    @property
    def total_steps(self) -> int:
        """Steps of a site over the whole study."""
        return self.federation.rounds * self.federation.local_steps

    @property
    def from_scratch(self) -> "Recipe":
        """The same with random first weights: for who needs their number and shapes alone."""
        model = self.model.model_copy(update={"phantom_steps": 0, "init_file": ""})
        return self.model_copy(update={"model": model})

    def to_json(self) -> str:
        """The complete recipe, defaults included, in a fixed order: equal recipes, equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UserError: the file is missing, is not TOML, or holds an unknown key or a value of the wrong
            type or range; the message names file, key, what was expected and what was found.
    """
    return load_toml(Recipe, path, "recipe")


def recipe_from_json(text: str, where: str) -> Recipe:
    """Read a recipe as `Recipe.to_json` wrote it; `where` names the source in error messages."""
    return validate(Recipe, text, where)

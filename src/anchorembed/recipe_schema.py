"""What a recipe may say: its sections, with types, defaults and meanings. `recipe_file` reads it from YAML."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

UNSET = "unset_variable"


def expanded(name: object) -> str:
    """A path, or a name that may be one, with the home folder and environment variables put in."""
    if not isinstance(name, str | Path) or not str(name).strip():
        raise ValueError("no path or name; write one, in quotes if YAML takes it for a number or date")
    text = os.path.expanduser(os.path.expandvars(str(name)))  # noqa: PTH111 - a name may be no path
    if "$" in text:
        raise PydanticCustomError(
            UNSET, "it names an environment variable that is not set; set it (compare: by --data)"
        )
    return text


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError("a folder gets this name; use letters, digits, dots, - and _")
    return name


Positive = Annotated[int, Field(ge=1)]
ArmName = Annotated[str, AfterValidator(_folder_name)]
ExpandedPath = Annotated[Path, BeforeValidator(expanded)]
NameOrPath = Annotated[str, BeforeValidator(expanded)]  # of a model, of a task, or of pairs


class Section(BaseModel):
    """A part of a recipe: unknown keys are faults, and values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - checked next
        """Refuse true and false where they are no values: pydantic would take them for the numbers 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("in YAML no and off are false, yes and on are true; quote a name, or write null for none")
        return value


class Source(Section):
    """One file, folder or hub data set of pairs; the pairs of a step all come from one source."""

    name: str = Field(min_length=1, description="Name in logs and errors.")
    path: NameOrPath = Field(
        description="JSONL, CSV or Parquet file, folder of such, saved datasets folder, BEIR folder, or "
        "hf://owner/name[:config][@split][#revision]."
    )
    instruction: str | None = Field(
        None, description="Instruction put before this source's queries; default data.instruction."
    )
    symmetric: bool = Field(False, description="Both sides are alike: the instruction is put before documents, too.")


class Data(Section):
    """The pairs to train on."""

    sources: list[Source] = Field(min_length=1, description="Files or folders of pairs, each with a name.")
    instruction: str = Field(
        "",
        description="Instruction put before queries of sources that have none, and kept in the model as its default. "
        "Without it the model keeps the instruction that all sources share.",
    )
    query_tokens: Positive = Field(512, description="Longest query, template and instruction included.")
    document_tokens: Positive = Field(512, description="Longest document, template included.")
    temperature: float = Field(
        1.0, ge=1, description="Sources are drawn by size ** (1 / temperature); the higher, the more evenly."
    )
    held_out: int = Field(256, ge=0, description="Pairs set aside for evaluate_every, at most a tenth of all.")
    skip_bad: bool = Field(False, description="Drop and count unusable lines instead of stopping at the first.")

    @field_validator("sources")
    @classmethod
    def _named_once(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        repeated = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if repeated is not None:
            raise ValueError(f"two of them are called {repeated}; rename one")
        return sources

    def instruction_of(self, source: Source) -> str | None:
        """The instruction before a source's queries; None for the model's own."""
        return source.instruction if source.instruction is not None else self.instruction or None

    @property
    def instructions(self) -> list[str | None]:
        """The instructions that the model may keep as its default: the common one, or the different ones of sources."""
        return [self.instruction] if self.instruction else list(dict.fromkeys(map(self.instruction_of, self.sources)))


class TemplateOverride(Section):
    """The template, instead of the one derived from the model."""

    bos: str = Field("", description="Token before the header.")
    header: str = Field("", description="What precedes a text.")
    suffix: str = Field("", description="What follows a text, before the end token.")
    end: str = Field(description="The EOS token, whose state is the embedding.")


class Model(Section):
    """The decoder to start from."""

    name: NameOrPath = Field("smollm2-135m", description="smollm2-135m, a hub id, a local folder, or a .gguf file.")
    template: TemplateOverride | None = Field(None, description="Instead of the template derived from the model.")
    precision: Literal["auto", "bfloat16", "float32"] = Field("auto", description="Number format of matrix products.")
    weights: Literal["float32", "bfloat16", "nf4"] = Field(
        "float32",
        description="How the model's own weights are stored. bfloat16 and nf4 (4 bits, by bitsandbytes) are for "
        "LoRA: those weights are frozen, and the adapters stay float32.",
    )
    residual: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Number format of the residual stream in training: bfloat16 is faster on a GPU and less exact. "
        "With weights in bfloat16 or nf4 it is bfloat16, with products in float32 it is float32, whatever is set here.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")

    @model_validator(mode="after")
    def _residual_has_effect(self) -> Self:
        if self.residual == "bfloat16" and self.precision == "float32":
            raise ValueError("residual: bfloat16 has no effect with precision: float32; leave one of them out")
        return self


class Schedule(Section):
    """What both stages share: how long, how fast, how much memory, what to keep."""

    steps: Positive = Field(2000, description="Optimizer steps.")
    epochs: float | None = Field(None, gt=0, description="Passes over the pairs, instead of steps.")
    batch_size: Positive = Field(512, description="Pairs a step, which is what the loss sees.")
    learning_rate: float = Field(4e-5, gt=0, description="Highest learning rate of AdamW.")
    warmup_steps: int = Field(300, ge=0, description="Steps of linear warm-up.")
    decay: Literal["linear", "cosine", "none"] = Field("linear", description="How the rate falls after warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    skip_steps: int = Field(
        0, ge=0, description="Steps that may be left out because loss or gradient is not finite; one more is an error."
    )
    max_gradient_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    tokens_per_micro_batch: Positive | Literal["auto"] = Field(
        "auto",
        description="Tokens computed at once; a pair that has more is computed alone. Decides memory, not the result, "
        "except for LoRA's dropout. auto is 8192 on the CPU, and on a GPU what its memory holds, at most 65536.",
    )
    recompute: bool = Field(
        False, description="Compute activations again in the backward pass: a third slower, far less memory."
    )
    save_every: Positive = Field(200, description="Steps between checkpoints.")
    keep_checkpoints: Positive = Field(2, description="Checkpoints kept while a stage runs.")
    evaluate_every: int = Field(100, ge=0, description="Steps between evaluations on held-out pairs; 0 for never.")
    evaluate_on: list[NameOrPath] = Field(
        [], description="BEIR folders, test files or mteb's names to evaluate on, too; their mean is the quality."
    )
    keep_best: bool = Field(False, description="Keep the model of the evaluation with the best quality, not the last.")
    patience: Positive | None = Field(
        None, description="Stop after so many evaluations in a row without a better quality; best with keep_best."
    )

    @field_validator("tokens_per_micro_batch", mode="wrap")
    @classmethod
    def _tokens(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:  # noqa: ANN401 - checked here
        """One message, where pydantic has one for each type that the value may have."""
        try:
            return check(value)
        except ValidationError as error:
            raise ValueError("give a whole number of 1 or more, or auto") from error

    @property
    def cost_only(self) -> set[str]:
        """Keys that decide what a stage costs, not what comes out."""
        keys = {"save_every", "keep_checkpoints", "tokens_per_micro_batch", "recompute"}
        return keys if self.keep_best or self.patience else keys | {"evaluate_every", "evaluate_on"}

    def budget(self, automatic: int) -> int:
        """Tokens computed at once; ``automatic`` where the recipe says auto."""
        return automatic if self.tokens_per_micro_batch == "auto" else self.tokens_per_micro_batch

    @property
    def other_models(self) -> dict[str, str]:
        """Models other than the trained one that decide what comes out, by key."""
        return {}


class Lora(Section):
    """Low-rank adapters; without them all weights train."""

    rank: Positive = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="Adapters are scaled by alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the adapters.")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Names of the linear modules to adapt.",
    )


class Reconstruct(Schedule):
    """Stage I: reconstruct each side of a pair from the other's anchor."""

    directions: Literal["both", "alternate", "q2d", "d2q"] = Field(
        "both", description="Both losses a step, one a step in turn, or one only."
    )
    d2q_weight: float = Field(0.8, ge=0, le=1, description="w in w * L_D2Q + (1 - w) * L_Q2D, when both.")
    sink: bool = Field(True, description="EOS before the anchor when decoding, an attention sink; the paper has none.")
    bag_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of an added loss: predict the text's tokens, in any order, from the anchor alone "
        "(Llama2Vec); the paper has none.",
    )
    anchor: Literal["raw", "centred", "centred_gradient"] = Field(
        "raw",
        description="How anchors enter the decoder. raw: unchanged, as in the paper. centred: less the step's mean, "
        "scaled to the length of a token's vector. centred_gradient: unchanged, but their gradients less the mean.",
    )
    target_tokens: Positive | None = Field(
        None, description="Write only the first so many tokens of each text, without EOS; null for all, as the paper."
    )
    read_weight: float | None = Field(
        None,
        gt=0,
        description="Weight of an added loss: each text must be likelier from its own anchor than from those of three "
        "other pairs of the step; null for none, as the paper.",
    )
    contrast_weight: float | None = Field(
        None,
        gt=0,
        description="Weight of Stage II's loss, added to the decoder's, on the same anchors, with cosines times 20; "
        "null for none, as the paper.",
    )
    lora: Lora | None = Field(
        None, description="Train adapters, merged when the stage ends; null trains all weights, as the paper does."
    )

    @model_validator(mode="after")
    def _has_both_sides(self) -> Self:
        if self.contrast_weight is not None and self.directions != "both":
            raise ValueError(
                f"contrast_weight compares queries' anchors with documents', and directions: {self.directions} has not "
                "both in a step. Set directions: both, or leave contrast_weight out"
            )
        return self

    @model_validator(mode="after")
    def _has_other_pairs(self) -> Self:
        least = {"read_weight": 4, "contrast_weight": 2, "anchor": 1 if self.anchor == "raw" else 2}
        for key, pairs in least.items():
            if getattr(self, key) is not None and self.batch_size < pairs:
                raise ValueError(
                    f"{key}: {getattr(self, key)} needs {pairs} pairs a step, and batch_size is {self.batch_size}. Set "
                    f"batch_size: {pairs} or more, or leave {key} out"
                )
        return self


class Contrast(Schedule):
    """Stage II: contrastive learning with in-batch and hard negatives."""

    from_: NameOrPath | None = Field(None, alias="from", description="Start here, not from Stage I or model.name.")
    steps: Positive = Field(1000, description="Optimizer steps.")
    learning_rate: float = Field(2e-4, gt=0, description="Highest learning rate of AdamW.")
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up.")
    scale: float = Field(50.0, gt=0, description="Cosines are multiplied by this: the inverse temperature.")
    hard_negatives: int = Field(1, ge=0, description="Hard negatives used of each pair that has them.")
    mask_above: float | None = Field(
        None, description="A document whose cosine exceeds the positive's by more than this is not used as a negative."
    )
    guide: NameOrPath | None = Field(
        None, description="Model whose cosines mask_above compares; default: the model being trained."
    )
    distill: float = Field(
        0.0, ge=0, description="Weight of the distillation loss, against the scores of another model in the pairs."
    )
    dimensions: list[Positive] = Field([], description="Train the first so many dimensions, too (Matryoshka).")
    lora: Lora | None = Field(Lora(), description="Adapter settings; null trains all weights.")

    @property
    def other_models(self) -> dict[str, str]:
        """The guide, if there is one."""
        return {} if self.guide is None else {"guide": self.guide}

    @model_validator(mode="after")
    def _without_effect(self) -> "Contrast":
        if self.guide is not None and self.mask_above is None:
            raise ValueError("guide has no effect without mask_above; set that, such as 0.0")
        if self.distill and not self.hard_negatives:
            raise ValueError("distill has no effect without hard_negatives; set them to 1 or more")
        return self


class Choice(Section):
    """Stage II settings to choose from; those left out are the recipe's."""

    learning_rate: float | None = Field(None, gt=0, description="Highest learning rate.")
    warmup_steps: int | None = Field(None, ge=0, description="Steps of linear warm-up.")
    scale: float | None = Field(None, gt=0, description="Inverse temperature.")


class OwnArm(Section):
    """An arm that the recipe defines: another arm with other settings."""

    like: str = Field(description="The arm to start from: a ready one, or one defined above.")
    title: str = Field("", description="Title in the report.")
    what: str = Field("", description="One sentence for the report.")
    before: dict[str, Any] = Field({}, description="Keys of the stage before Stage II.")
    contrast: dict[str, Any] = Field({}, description="Keys of Stage II.")
    budget: float | None = Field(
        None,
        gt=0,
        description="Compute, as a share of that of the primary arm's Stage I: 2 is twice that. Default: that of like.",
    )


class Compare(Section):
    """Arms x seeds x collections; what an arm trains beside Stage II costs what the primary arm's Stage I does."""

    arms: list[str] = Field(
        [
            "base",
            "contrast",
            "contrast_longer",
            "q2d",
            "d2q",
            "both",
            "auto",
            "full_contrast",
            "next_token",
        ],
        min_length=1,
        description="Arms, ready or of own_arms.",
    )
    primary: str = Field("both", description="The arm whose worth is in question.")
    declared: list[str] = Field(
        ["contrast", "contrast_longer", "full_contrast", "next_token"],
        description="Arms it is tested against; all else is called exploratory.",
    )
    explore: dict[str, list[str]] = Field(
        {}, description="Further tests, reported as exploratory: arm -> the arms it is tested against, if both are run."
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 2], min_length=1, description="Seeds of each arm; an arm that is not trained has only the first."
    )
    grid: list[Choice] = Field(
        [], description="Stage II settings each arm's first seed chooses from, by accuracy on held-out training pairs."
    )
    own_arms: dict[ArmName, OwnArm] = Field(
        {}, description="Arms of your own, by name, which is also that of a folder."
    )
    collections: dict[str, list[NameOrPath]] = Field(
        description="Tables of the report: title -> BEIR folders, test files or mteb's names; null leaves one out."
    )
    instructions: dict[str, str] = Field({}, description="By task, task type or default, as in evaluate.")
    quick: bool = Field(False, description="A fixed part of each collection only.")
    notes: list[str] = Field([], description="Sentences for the top of the report.")

    @field_validator("arms", "declared", "explore", "seeds")
    @classmethod
    def _once(cls, chosen: Any) -> Any:  # noqa: ANN401 - lists of names, of numbers, and by name
        for values in chosen.values() if isinstance(chosen, dict) else [chosen]:
            for number, value in enumerate(values):
                if value in values[:number]:
                    raise ValueError(f"{value} stands there twice; leave one out")
        return chosen

    @field_validator("collections", mode="before")
    @classmethod
    def _left_out(cls, tables: Any) -> Any:  # noqa: ANN401 - checked next
        """Drop tables that are null or empty, by which a recipe leaves out tables of the recipe it extends."""
        if not isinstance(tables, dict):
            return tables
        kept = {title: names for title, names in tables.items() if names not in (None, [])}
        if not kept:
            raise ValueError("no table is left; name at least one collection")
        return kept


class Recipe(Section):
    """A whole run: data, model, both stages, and where the results go."""

    data: Data = Field(description="The pairs.")
    model: Model = Field(Model(), description="The decoder to start from.")
    reconstruct: Reconstruct | None = Field(
        None, description="Stage I; null leaves it out, {} has the paper's values, but for sink."
    )
    contrast: Contrast | None = Field(Contrast(), description="Stage II; null leaves it out.")
    output: ExpandedPath = Field(description="Run folder: models, checkpoints, logs.")
    seed: int = Field(0, ge=0, description="Seed of the order of pairs and of dropout.")
    trackers: list[str] = Field([], description="accelerate trackers, such as tensorboard or wandb.")
    compare: Compare | None = Field(None, description="What `anchorembed compare` runs.")

    @property
    def model_before(self) -> str:
        """The model that a trained one is compared with: the one that Stage II is told to start from, or the base."""
        return (self.contrast and self.contrast.from_) or self.model.name

    def stage(self, name: Literal["reconstruct", "contrast"]) -> Schedule | None:
        """The settings of a stage; None if the recipe leaves it out."""
        return self.reconstruct if name == "reconstruct" else self.contrast

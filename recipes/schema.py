"""What a recipe is: the pydantic models behind the YAML. Field names are the recipe's keys."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from ..modifiers.base import Modifier

Whole = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Arg = int | float | str | bool | None | list[int | float | str | bool | None]

# Set in a validation context by the reader of files, which gives the same mistakes a place.
PLACED = "placed"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class RowsConfig(_Part):
    """Rows of one data set, and how they become text."""

    dataset: str = Field(
        default="",
        description="`zoo:...`, a Hugging Face id, or a path to .txt, .jsonl or .parquet",
    )
    split: str = Field(default="train", min_length=1)
    text: str | None = Field(default=None, description="the column that holds the text")
    prompt: str | None = Field(
        default=None, description="template over columns, e.g. 'Question: {question}'"
    )
    answer: str | None = Field(
        default=None, description="template over columns; the loss is on it alone"
    )
    messages: str | None = Field(
        default=None,
        description="the column that holds a chat, a list of {role, content}; the loss is on the assistant's turns",
    )
    chat: bool = Field(
        default=False, description="put 'prompt' and 'answer' into the model's chat template"
    )

    @property
    def has_answers(self) -> bool:
        """Whether the loss is on part of the text."""
        return self.answer is not None or self.messages is not None

    @model_validator(mode="after")
    def _columns(self) -> RowsConfig:
        if self.answer is not None and self.prompt is None:
            raise ValueError("'answer' needs a 'prompt'; add one")
        if self.chat and self.prompt is None:
            raise ValueError("'chat' needs a 'prompt'; add one, or name a column with 'messages'")
        kinds = [name for name in ("text", "prompt", "messages") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ValueError(f"'{kinds[0]}' and '{kinds[1]}' exclude each other; keep one")
        for name, template in (("prompt", self.prompt), ("answer", self.answer)):
            try:
                fields = [field for _, field, _, _ in string.Formatter().parse(template or "")]
            except ValueError as error:
                raise ValueError(f"'{name}' is no template ({error}), got {template!r}") from None
            if "" in fields:
                raise ValueError(f"'{name}' has an empty {{}}, got {template!r}; name a column")
        return self


class MixturePart(RowsConfig):
    """One of the data sets of a mixture."""

    weight: Positive = Field(description="its share of the sequences, of the sum of all weights")

    @model_validator(mode="after")
    def _named(self) -> MixturePart:
        if not self.dataset:
            raise ValueError("a part of a mixture needs 'dataset'; add one")
        return self


class DataConfig(RowsConfig):
    """Where text comes from and how it is cut."""

    mixture: list[MixturePart] | None = Field(
        default=None, min_length=1, description="several data sets instead of one, by weight"
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="a mixture ends with the first part that does, or repeats the others until all have",
    )
    samples: Whole | None = Field(default=None, description="sequences to use; all when left out")
    length: Whole = Field(default=512, description="tokens per sequence")
    packing: bool = Field(
        default=False,
        description="put several answers into one sequence, kept apart; plain text always is packed",
    )
    streaming: bool = Field(
        default=False,
        description="read while training, for more text than fits into memory; 'samples' then make an epoch",
    )
    buffer_size: Whole = Field(default=1000, description="rows that a stream is shuffled among")
    seed: Count = 0
    windows: Whole | None = Field(
        default=None, description="windows of `length` tokens; for `evaluate` only"
    )

    @property
    def parts(self) -> Sequence[RowsConfig]:
        """The data sets: those of the mixture, or the only one."""
        return self.mixture or [self]

    @property
    def source(self) -> str:
        """What to call it: `zoo:python-docs`, or `70% web.jsonl + 30% code.jsonl`."""
        if not self.mixture:
            return self.dataset
        total = sum(part.weight for part in self.mixture)
        return " + ".join(f"{part.weight / total:.0%} {part.dataset}" for part in self.mixture)

    @model_validator(mode="after")
    def _whole(self) -> DataConfig:
        if bool(self.dataset) is (self.mixture is not None):
            raise ValueError("data needs either 'dataset' or 'mixture'; give one of them")
        if self.mixture is not None:
            own = self.model_fields_set & (RowsConfig.model_fields.keys() - {"dataset"})
            if own:
                raise ValueError(f"'{min(own)}' belongs to the parts of the mixture; move it there")
        if self.packing and not any(part.has_answers for part in self.parts):
            raise ValueError("'packing' is for answers, plain text is packed anyway; remove it")
        if "buffer_size" in self.model_fields_set and not self.streaming:
            raise ValueError("'buffer_size' is for 'streaming'; remove it, or add streaming: true")
        if "stopping_strategy" in self.model_fields_set and self.mixture is None:
            raise ValueError("'stopping_strategy' is for a 'mixture'; remove it")
        if self.streaming and self.samples is None:
            raise ValueError("'streaming' needs 'samples', the sequences of an epoch; add it")
        return self


class LoraConfig(_Part):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) in the words of `peft`, which it needs installed."""

    r: Whole = Field(default=8, description="rank of what is added to each weight")
    lora_alpha: Whole = Field(
        default=16, description="what is added is multiplied by lora_alpha / r"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | None = Field(
        default=None, min_length=1, description="names of Linears; all but the head when left out"
    )


class TrainingConfig(_Part):
    """The training loop of a `train` stage, in the words of Hugging Face's `TrainingArguments`."""

    epochs: Positive
    batch_size: Whole = Field(description="sequences per step and process")
    learning_rate: Positive
    warmup_steps: Count = 0
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_accumulation: Whole = 1
    max_steps: Whole | None = Field(default=None, description="end after so many optimizer steps")
    seed: Count = 0
    save_steps: Whole | None = Field(
        default=None, description="save a checkpoint every so many steps"
    )
    bf16: bool = False
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = Field(
        default=None, description="train low-rank additions, merged in the end, not the weights"
    )
    report_to: list[str] = Field(
        default_factory=list,
        description="e.g. tensorboard (into the output folder's `runs/`), wandb",
    )


class ExportConfig(_Part):
    """How the engine's graph is written."""

    head: Literal["keep", "f16", "int8"] = Field(
        default="keep",
        description="how the logits matrix is stored: a copy, where the embedding it is tied to is stored otherwise",
    )
    embedding: Literal["keep", "f16", "int8"] = Field(
        default="keep", description="how the embedding rows are stored"
    )


class Stage(_Part):
    """Modifiers that act together: in one-shot passes over the blocks, or while training."""

    name: str = Field(default="", description="unique; the kind of run when left out")
    run: Literal["oneshot", "train"]
    data: DataConfig | None = Field(
        default=None,
        description="a one-shot stage without it uses the data of the one-shot stage before",
    )
    training: TrainingConfig | None = None
    modifiers: list[InstanceOf[SerializeAsAny[Modifier]]] = Field(
        default_factory=list, description="in the order in which they act"
    )

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> Stage:
        if not self.name:
            self.name = self.run
        if info.context != PLACED:
            _refuse(stage_mistakes(self))
        return self


class Recipe(_Part):
    """A whole recipe, resolved: every expression computed, every modifier made.

    `load` and `parse` read YAML; a recipe can equally be put together in Python from its parts.
    """

    version: Literal[1] = 1
    model: str | None = Field(
        default=None, min_length=1, description="`zoo:...`, a Hugging Face id, or a folder"
    )
    args: dict[str, Arg] = Field(
        default_factory=dict, description="values for `${...}`; `--set name=value` changes them"
    )
    stages: list[Stage]
    evaluate: DataConfig | None = Field(
        default=None, description="text for perplexity before and after"
    )
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> Recipe:
        if info.context != PLACED:
            _refuse(name_mistakes([stage.name for stage in self.stages]))
        if self.evaluate is not None and (self.evaluate.mixture or self.evaluate.streaming):
            raise ValueError("'evaluate' takes one data set, without 'mixture' or 'streaming'")
        if self.evaluate is not None and self.evaluate.samples and not self.evaluate.has_answers:
            raise ValueError("'evaluate' counts a text in 'windows', not in 'samples'")
        if self.evaluate is not None and self.evaluate.windows and self.evaluate.has_answers:
            raise ValueError("'evaluate' counts answers in 'samples', not in 'windows'")
        previous = None
        for stage in self.stages:
            if stage.run == "oneshot":
                stage.data = previous = stage.data or previous
        return self

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        set: Mapping[str, Any] | None = None,
        model: str | None = None,
        use: Sequence[str | Path] = (),
    ) -> Recipe:
        """Read a recipe from a file, or from the library by name.

        `set` overrides args (typed: text is read as the arg's own type), `model` the model. `use` names
        Python files with custom modifiers; they are run, so name only files you trust.

        Raises RecipeError with every mistake found.
        """
        from .library import read_recipe

        text, source = read_recipe(path_or_name)
        return cls.parse(text, source, set=set, model=model, use=use)

    @classmethod
    def parse(
        cls,
        text: str,
        source: str = "<string>",
        set: Mapping[str, Any] | None = None,
        model: str | None = None,
        use: Sequence[str | Path] = (),
    ) -> Recipe:
        """Read a recipe from YAML text; `source` stands in messages. Otherwise as `load`."""
        from .build import build

        return build(text, source, set or {}, model, use)

    def to_yaml(self) -> str:
        """The recipe as YAML without expressions; it loads to an equal recipe."""
        from .dump import dump

        return dump(self)


Mistakes = Iterator[tuple[tuple[str | int, ...], str]]


def stage_mistakes(stage: Stage) -> Mistakes:
    """What is wrong between the fields of a stage: (path below the stage, message)."""
    if stage.run == "train":
        if stage.training is None:
            yield (), "a train stage needs 'training'; add {epochs, batch_size, learning_rate}"
        if stage.data is None:
            yield (), "a train stage needs 'data'; add {dataset: ...}"
    else:
        if stage.training is not None:
            yield (
                ("training",),
                "a one-shot stage does not train; remove 'training' or use run: train",
            )
        if not stage.modifiers:
            yield (), "a one-shot stage without modifiers does nothing; add 'modifiers'"
    if stage.data is not None and stage.data.streaming and stage.run == "oneshot":
        yield ("data", "streaming"), "'streaming' is for training; remove it"
    if stage.data is not None and stage.data.packing and stage.run == "oneshot":
        yield ("data", "packing"), "'packing' is for training; remove it"
    if stage.data is not None and stage.data.windows is not None:
        yield ("data", "windows"), "'windows' is for 'evaluate'; use 'samples' here"
    for index, modifier in enumerate(stage.modifiers):
        for path, message in _modifier_mistakes(stage, modifier):
            yield ("modifiers", index, *path), message


def _modifier_mistakes(stage: Stage, modifier: Modifier) -> Mistakes:
    name = modifier.key()
    if stage.run not in modifier.stages:
        kinds = " or ".join(sorted(modifier.stages))
        yield (), f"{name} does not work in a {stage.run} stage; move it to one with run: {kinds}"
        return
    for key in sorted(modifier.unused & modifier.model_fields_set):
        yield (key,), f"{key!r} means nothing to {name}; remove it"
    if stage.run == "oneshot":
        for key in sorted(modifier.timing & modifier.model_fields_set):
            yield (key,), f"{key!r} is about time and a one-shot stage has none; remove it"
        for key in sorted(modifier.training_only & modifier.model_fields_set):
            yield (key,), f"{key!r} matters in a training stage alone; remove it"
        return
    if stage.training is None:
        return
    if modifier.trains_weights and stage.training.lora is not None:
        yield (
            (),
            f"{name} needs the weights trained, which lora freezes; give each a stage of its own",
        )
    parts = getattr(modifier, "parts", None) if name in ("Distillation", "TaskLoss") else None
    if parts and stage.data is not None:
        count = len(stage.data.mixture or ())
        if max(parts) >= count:
            has = f"which has {count}, from 0" if count else "and there is none"
            yield ("parts",), f"parts are places in the data's mixture, {has}; got {max(parts)}"
    # How many steps a stage has is known here only if it says so; the session checks it again.
    steps = modifier.unit == "steps"
    length = stage.training.max_steps if steps else stage.training.epochs
    if length is None:
        return
    has = f"it has {'at most ' if steps else ''}{length:g} {modifier.unit}"
    if modifier.start >= length:
        yield ("start",), f"start is not before the stage ends, got {modifier.start:g}; {has}"
    if modifier.end is not None and modifier.end > length:
        yield ("end",), f"end is after the stage ends, got {modifier.end:g}; {has}"
    freeze = getattr(modifier, "freeze_observer", None)
    if freeze is not None and freeze > length:
        yield (
            ("freeze_observer",),
            f"freeze_observer is after the stage ends, got {freeze:g}; {has}",
        )
    if "milestones" in modifier.timing:
        last = max(getattr(modifier, "milestones", None) or {0.0: 0.0})
        if last > length:
            yield ("milestones",), f"milestones go on after the stage ends, got {last:g}; {has}"


def name_mistakes(names: Sequence[str | None]) -> Mistakes:
    """What is wrong between stages, given their names (None: unknown): (path, message)."""
    if not names:
        yield ("stages",), "a recipe without stages does nothing; add one"
    for index, name in enumerate(names):
        if name is not None and name in names[:index]:
            where = ("stages", index, "name")
            yield where, f"two stages are named {name!r}; give each its own 'name'"


def _refuse(mistakes: Mistakes) -> None:
    found = [
        ": ".join([".".join(map(str, path)), text] if path else [text]) for path, text in mistakes
    ]
    if found:
        raise ValueError("; ".join(found))

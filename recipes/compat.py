"""Recipes in the dialects of SparseML and llm-compressor, turned into native ones.

Legacy SparseML: YAML tags in lists (`- !GMPruningModifier`), groups `*modifiers`, Markdown front matter. Modern
SparseML and llm-compressor: `<name>_stage` with `<group>_modifiers`, a mapping keyed by class name. In both,
top-level scalars are variables and `eval(...)` computes with them.

What has no native equal is left as it stands, so that the ordinary checks report it at its place in the old file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .compat_tables import (
    CLASSES,
    DROPPED,
    DROPPED_OF,
    FIELDS,
    LEGACY_QUANTIZATION,
    QUANTIZATION_TIMES,
    SCHEDULERS,
    TARGETS,
    TRAINING,
)
from .yaml_loader import Document, Path

_EVAL = re.compile(r"eval\((.*)\)", re.DOTALL)
_KEPT = re.compile(r"(\d+):(\d+)")
_STAGE_KEYS = ("run_type", "metadata", "version", "framework", "framework_metadata")


def front_matter(text: str) -> str:
    """The YAML between the first two `---` lines of a Markdown file; lines keep their numbers."""
    lines = text.splitlines()
    fences = [n for n, line in enumerate(lines) if line.rstrip() == "---"]
    if len(fences) < 2:
        return text
    first, last = fences[:2]
    return "\n" * (first + 1) + "\n".join(lines[first + 1 : last]) + "\n"


def is_foreign(document: Document) -> bool:
    """Whether a recipe is of another dialect."""
    data = document.data
    if not isinstance(data, dict) or isinstance(data.get("stages"), list):
        return False
    return any(True for _ in _stages(data))


def to_native(document: Document) -> tuple[Document, list[str]]:
    """The native recipe, with the places of the old file, and notes on what changed on the way."""
    conversion = _Conversion(document)
    conversion.run()
    return conversion.native, list(dict.fromkeys(conversion.notes))


def _stages(data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each stage: the file itself, or its entries that hold groups of modifiers."""
    if _groups(data):
        yield (), data
    nested = data.get("stages")
    for prefix, entries in (((), data), (("stages",), nested if isinstance(nested, dict) else {})):
        for key, value in entries.items():
            if isinstance(value, dict) and _groups(value):
                yield (*prefix, key), value


def _groups(data: dict[str, Any]) -> list[str]:
    return [
        key
        for key, value in data.items()
        if key.endswith("modifiers") and isinstance(value, list | dict)
    ]


class _Conversion:
    def __init__(self, document: Document) -> None:
        self.old = document
        self.native = Document(document.source, problems=document.problems)
        self.native.values[()] = (1, 1)
        self.notes: list[str] = []
        self.args: dict[str, Any] = {}

    def run(self) -> None:
        data, stages = self.old.data, list(_stages(self.old.data))
        self._read_args(data, {path[0] for path, _ in stages if path})
        made: list[dict[str, Any]] = []
        for path, stage in stages:
            self._stage(path, stage, made)
        self.native.data = {"version": 1, "args": self.args, "stages": made}
        self.notes.append("it names no model; give one with --model, or add 'model:'")

    def _read_args(self, data: dict[str, Any], stages: set[str | int]) -> None:
        for key, value in data.items():
            if key in stages or key in ("stages", *_STAGE_KEYS) or key in _groups(data):
                continue
            self.args[key] = _expression(value)
            self._place((key,), ("args", key))

    def _place(self, old: Path, new: Path) -> None:
        """What the native recipe has at `new` stands in the old file at `old`."""
        tables = ((self.old.values, self.native.values), (self.old.keys, self.native.keys))
        for source, target in tables:
            for path, place in source.items():
                if path[: len(old)] == old:
                    target[(*new, *path[len(old) :])] = place

    def _stage(self, path: Path, stage: dict[str, Any], made: list[dict[str, Any]]) -> None:
        name = str(path[-1]).removesuffix("_stage") if path else "sparsify"
        entries = list(_entries(self.old, path, stage))
        trains = _trains(name, stage, [kind for kind, _, _ in entries])
        where: Path = ("stages", len(made))
        self._place(path, where)
        training: dict[str, Any] = {}
        modifiers: list[dict[str, Any]] = []
        for kind, fields, old in entries:
            if kind in TRAINING:
                if kind == "LearningRateFunction" and _is_window(fields):
                    kind = "LearningRate"  # the modifier; outside of its window the stage's rate
                    if "init_lr" in fields:
                        training.setdefault("learning_rate", _expression(fields["init_lr"]))
                else:
                    self._training(kind, fields, old, training, (*where, "training"))
                    continue
            self._modifier(kind, fields, old, modifiers, (*where, "modifiers"), trains)
        native: dict[str, Any] = {"name": name, "run": "train" if trains else "oneshot"}
        native["data"] = self._data(trains)
        if trains:
            native["training"] = self._complete(training, entries)
        made.append({**native, "modifiers": modifiers})

    def _data(self, trains: bool) -> dict[str, Any]:
        if "dataset" not in self.args:
            self.args["dataset"] = "zoo:python-docs"
            self.notes.append("it names no data; arg 'dataset' is zoo:python-docs, change it")
        data = {"dataset": "${dataset}", "length": 512}
        return data if trains else {**data, "samples": 64}

    def _training(
        self, kind: str, fields: dict[str, Any], old: Path, training: dict[str, Any], new: Path
    ) -> None:
        for key, field in TRAINING[kind].items():
            if key not in fields:
                continue
            if field in training:
                self.notes.append(f"{kind}: only the first {field} counts, later ones are left out")
                continue
            value = _expression(fields[key])
            if field == "lr_scheduler":
                value = SCHEDULERS.get(str(value), value)
            training[field] = value
            self._place((*old, key), (*new, field))
        if kind == "SetLearningRate":
            training.setdefault("lr_scheduler", "constant")
        silent = {"end_epoch"} | (
            {"start_epoch"} if fields.get("start_epoch") in (None, 0, -1) else set()
        )
        for key in sorted(fields.keys() - TRAINING[kind].keys() - silent):
            self.notes.append(f"{kind}: {key} is left out")

    def _complete(
        self, training: dict[str, Any], entries: list[tuple[str, dict[str, Any], Path]]
    ) -> dict[str, Any]:
        """The training settings, with args for those that the old dialects leave to a script."""
        ends = [fields.get("end_epoch", fields.get("end")) for _, fields, _ in entries]
        numbers = [end for end in ends if isinstance(end, int | float) and end > 0]
        epochs = training.pop("epochs", None) or max(numbers, default=None)
        if epochs is None:
            epochs = 1.0
            self.notes.append("it gives no epochs; 'epochs' is 1, change it")
        missing = {"batch_size": 8, "learning_rate": 1e-4}
        for name, value in missing.items():
            if name not in training:
                training[name] = "${" + name + "}"
                if name not in self.args:
                    self.args[name] = value
                    self.notes.append(f"it gives no {name}; arg {name!r} is {value:g}, change it")
        return {"epochs": epochs, **training}

    def _modifier(
        self, kind: str, fields: dict[str, Any], old: Path, made: list[Any], new: Path, trains: bool
    ) -> None:
        name = CLASSES.get(kind, kind)
        said = fields.keys() & {"scheme", "config_groups"}
        if name == "Quantization" and (
            fields.keys() & LEGACY_QUANTIZATION or (trains and not said)
        ):
            times = {key: fields[key] for key in QUANTIZATION_TIMES if trains and key in fields}
            fields = {"scheme": "W8A8", **times}
            self.notes.append(
                "Quantization: all Linears become W8A8; its own settings are left out"
            )
        split = fields.get("final_sparsity")
        if isinstance(split, dict):  # {0.8: [params], ...}: a modifier for each sparsity
            for sparsity, targets in split.items():
                one = {**fields, "final_sparsity": float(sparsity), "params": targets}
                self._modifier(kind, one, old, made, new, trains)
            return
        if name == "Distillation" and fields.get("hardness") == 1:  # of the teacher alone
            made.append({"TaskLoss": {"weight": 0}})
        where = (*new, len(made), name)
        self._place(old, where)
        self.native.keys[where] = self.old.place(old, key=True)
        native = {"global_sparsity": True} if kind == "GlobalMagnitudePruning" else {}
        for key, value in fields.items():
            if value is None or (key == "leave_enabled" and value is True):
                continue  # not given; a mask is always held
            if key in (
                "start_epoch",
                "end_epoch",
                "update_frequency",
                "start",
                "end",
            ) and value in (-1, -1.0):
                continue  # their word for "not given"
            why = DROPPED.get(key, DROPPED_OF.get((name, key)))
            if why is not None:
                self.notes.append(f"{name}: {key} is left out{why and ', '}{why}")
                continue
            field = FIELDS.get(key, key)
            native[field] = self._value(name, field, _expression(value))
            self._place((*old, key), (*where, field))
        if name == "Distillation":
            self._distillation(native)
        made.append({name: native})

    def _distillation(self, fields: dict[str, Any]) -> None:
        """Their loss is (1 - h) CE + h KL with hardness h, ours CE + weight KL: the same ratio of the two."""
        if "teacher" not in fields:
            fields["teacher"] = "self"
            self.notes.append(
                "Distillation: it names no teacher; 'self' is the model before the recipe"
            )
        fields.setdefault("temperature", 2.0)  # SparseML's default
        hardness = fields.get("hardness", 0.5)
        if isinstance(hardness, str) and hardness.startswith("${"):
            inner = hardness[2:-1]
            fields["weight"] = "${(" + inner + ") / (1 - (" + inner + "))}"
        elif isinstance(hardness, int | float) and 0 < hardness < 1:
            fields["weight"] = hardness / (1 - hardness)
        elif hardness == 1:
            fields["weight"] = 1.0
        else:
            return  # left as it stands, and reported
        fields.pop("hardness", None)

    def _value(self, name: str, field: str, value: Any) -> Any:
        if field in ("targets", "ignore"):
            items = [value] if isinstance(value, str) and not value.startswith("${") else value
            return [TARGETS.get(i, i) for i in items] if isinstance(items, list) else items
        if field == "mask_structure":
            return self._mask(name, value)
        return value

    def _mask(self, name: str, value: Any) -> Any:
        """Their N:M drops N of every M weights, ours keeps N."""
        if isinstance(value, list):
            return "x".join(map(str, value))
        if isinstance(value, str) and value.startswith("${"):  # written out, as N:M differs
            value = self.args.get(value[2:-1], value)
        pattern = _KEPT.fullmatch(value) if isinstance(value, str) else None
        if pattern is None:
            return value
        dropped, window = int(pattern[1]), int(pattern[2])
        if window == 0:
            return "unstructured"
        kept = f"{window - dropped}:{window}"
        if kept != value:
            self.notes.append(
                f"{name}: mask_structure {value} dropped {dropped} of {window}; ours is {kept}"
            )
        return kept


def _is_window(fields: dict[str, Any]) -> bool:
    """Whether a rate does more than fall to 0 by the stage's own schedule."""
    cyclic = fields.get("lr_func") in SCHEDULERS
    return not cyclic and bool(fields.get("final_lr") or fields.get("start_epoch"))


def _entries(
    document: Document, path: Path, stage: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Class name without `Modifier`, fields and place of every modifier of a stage."""
    for group in _groups(stage):
        entries = stage[group]
        for key, value in enumerate(entries) if isinstance(entries, list) else entries.items():
            where = (*path, group, key)
            tag = document.tags.get(where)
            if (
                tag is None
                and isinstance(entries, list)
                and isinstance(value, dict)
                and len(value) == 1
            ):
                ((tag, value),) = (
                    value.items()
                )  # llm-compressor also writes lists of one-key mappings
                where = (*where, tag)
            name = tag or str(key)
            fields = value if isinstance(value, dict) else {}
            yield name.removesuffix("Modifier") or name, fields, where


def _trains(name: str, stage: dict[str, Any], kinds: list[str]) -> bool:
    run = str(stage.get("run_type", "")).lower()
    if run:
        return run == "train"
    if "oneshot" in name:
        return False
    return (
        "train" in name or "finetun" in name or bool(set(kinds) & (TRAINING.keys() | {"GMPruning"}))
    )


def _expression(value: Any) -> Any:
    """`eval(a * b)` as `${a * b}`, anywhere in a value."""
    if isinstance(value, dict):
        return {key: _expression(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_expression(item) for item in value]
    found = _EVAL.fullmatch(value.strip()) if isinstance(value, str) else None
    return "${" + found[1].strip() + "}" if found else value

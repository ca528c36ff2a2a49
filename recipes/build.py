"""From YAML text to a Recipe, collecting every mistake on the way."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError
from ..modifiers.base import Modifier, load_modifiers, registry
from .compat import front_matter, is_foreign, to_native
from .explain import explain, shown
from .expressions import ExpressionError, evaluate
from .overrides import read_args
from .schema import PLACED, Recipe, Stage, name_mistakes, stage_mistakes
from .suggest import did_you_mean
from .yaml_loader import Document, Path, read_yaml

log = logging.getLogger("paring.recipes")

Model = TypeVar("Model", bound=BaseModel)


def build(
    text: str,
    source: str,
    overrides: Mapping[str, Any],
    model: str | None = None,
    use: Sequence[str | FilePath] = (),
) -> Recipe:
    """See `Recipe.parse`. Notes on a recipe of another dialect go to the log."""
    for path in use:
        load_modifiers(path)
    document, notes = read_document(text, source)
    recipe = build_document(document, overrides, model)
    for note in notes:
        log.warning("%s: %s", source, note)
    return recipe


def read_document(text: str, source: str) -> tuple[Document, list[str]]:
    """The file as plain data, made native if it is of another dialect, with notes on that."""
    markdown = source.lower().endswith(".md")
    document = read_yaml(front_matter(text) if markdown else text, source)
    return to_native(document) if is_foreign(document) else (document, [])


def build_document(
    document: Document, overrides: Mapping[str, Any], model: str | None = None
) -> Recipe:
    """The recipe in a document. Raises RecipeError."""
    if document.data is None and not document.problems:
        document.complain((), "the file is empty; `recipe copy` gives you one to start from")
    elif document.data is not None and not isinstance(document.data, dict):
        got = shown(document.data)
        document.complain((), f"a recipe is a mapping, got {got}; start with version: 1")
    made = isinstance(document.data, dict)
    recipe = _Builder(document).recipe(overrides, model) if made else None
    if recipe is None or document.problems:
        problems = sorted(document.problems, key=lambda problem: (problem.line, problem.column))
        raise RecipeError(problems)
    return recipe


class _Builder:
    def __init__(self, document: Document) -> None:
        self.document = document

    def recipe(self, overrides: Mapping[str, Any], model: str | None) -> Recipe | None:
        data: dict[str, Any] = self.document.data
        for path, tag in self.document.tags.items():
            self.document.complain(path, f"tag '!{tag}' has no meaning here; write {tag}: as a key")
        args = read_args(self.document, overrides, self.resolve)
        if model is not None:
            data = {**data, "model": model}
        shell = {
            key: self.resolve(value, (key,), args)
            for key, value in data.items()
            if key not in ("args", "stages")
        }
        entries = data.get("stages")
        if "stages" in data:
            shell["stages"] = [] if isinstance(entries, list) else entries
        top = self.validate(Recipe, shell, (), "the recipe")
        stages = [
            self.stage(entry, ("stages", index), args)
            for index, entry in enumerate(entries if isinstance(entries, list) else [])
        ]
        if isinstance(entries, list):
            for where, message in name_mistakes(list(map(_stage_name, stages, entries))):
                self.document.complain(where, message)
        if top is None or None in stages:
            return None
        fields = {name: getattr(top, name) for name in top.model_fields_set}
        if "args" in data:
            fields["args"] = args
        return Recipe.model_validate({**fields, "stages": stages}, context=PLACED)

    def stage(self, data: Any, path: Path, args: Mapping[str, Any]) -> Stage | None:
        if not isinstance(data, dict):
            message = (
                f"a stage is a mapping, got {shown(data)}; write {{run: oneshot, modifiers: [...]}}"
            )
            self.document.complain(path, message)
            return None
        names = dict(args)
        shell = {}
        if "training" in data:
            shell["training"] = training = self.resolve(data["training"], (*path, "training"), args)
            if isinstance(training, dict):  # `${epochs}` in a modifier means this stage's
                names |= {k: v for k, v in training.items() if not isinstance(v, dict | list)}
        for key in data:
            if key not in ("training", "modifiers"):
                shell[key] = self.resolve(data[key], (*path, key), names)
        entries = data.get("modifiers")
        if "modifiers" in data:
            shell["modifiers"] = [] if isinstance(entries, list) else entries
        stage = self.validate(Stage, shell, path, "the stage")
        if not isinstance(entries, list):
            entries = []
        made = [
            self.modifier(entry, (*path, "modifiers", index), names)
            for index, entry in enumerate(entries)
        ]
        if stage is None:
            return None
        # A bare Modifier stands in for one that failed, so that the others keep their place.
        stage = stage.model_copy(
            update={"modifiers": [modifier or Modifier() for modifier in made]}
        )
        for where, message in stage_mistakes(stage):
            if where[:1] == ("modifiers",):
                index = int(where[1])
                where = ("modifiers", index, next(iter(entries[index]), ""), *where[2:])
            self.document.complain((*path, *where), message, key=True)
        return stage

    def modifier(self, entry: Any, path: Path, names: Mapping[str, Any]) -> Modifier | None:
        if not isinstance(entry, dict) or len(entry) != 1:
            self.document.complain(path, _entry_shape(entry))
            return None
        ((key, fields),) = entry.items()
        where = (*path, key)
        kind = registry().get(key)
        if kind is None:
            known = sorted({kind.key() for kind in registry().values()})
            hint = did_you_mean(key.removesuffix("Modifier"), known, f"known: {', '.join(known)}")
            self.document.complain(where, f"unknown modifier {key!r}; {hint}", key=True)
            return None
        fields = self.resolve({} if fields is None else fields, where, names)
        return self.validate(kind, fields, where, key)

    def resolve(self, value: Any, path: Path, names: Mapping[str, Any]) -> Any:
        """Plain data with every expression computed."""
        if isinstance(value, dict):
            return {key: self.resolve(item, (*path, key), names) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item, (*path, i), names) for i, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            try:
                return evaluate(value, names)
            except ExpressionError as error:
                self.document.complain(path, str(error))
                return None
        if isinstance(value, float) and not math.isfinite(value):
            self.document.complain(
                path, f"not a finite number, got {value}; write the number meant"
            )
            return None
        return value

    def validate(self, kind: type[Model], data: Any, path: Path, name: str) -> Model | None:
        """`data` as a `kind`, strictly typed; its mistakes are added to the document's."""
        try:
            # JSON mode: strict about numbers and texts, yet a list may become a tuple or a set.
            return kind.model_validate_json(json.dumps(data), strict=True, context=PLACED)
        except ValidationError as error:
            mistakes = explain(
                error, kind, name, lambda below: (*path, *below) in self.document.values
            )
        for mistake in mistakes:
            where = (*path, *mistake.path)
            # What is known to be wrong already makes no second mistake.
            if not any(where[:n] in self.document.failed for n in range(len(where) + 1)):
                self.document.complain(where, mistake.message, mistake.on_key)
        return None


def _stage_name(stage: Stage | None, data: Any) -> str | None:
    """Also of a stage that could not be made, where it has one."""
    if stage is not None:
        return stage.name
    name = data.get("name") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def _entry_shape(entry: Any) -> str:
    if isinstance(entry, str):
        return f"a modifier is a mapping, got {entry!r}; write '{entry}: {{}}'"
    if isinstance(entry, dict) and entry:
        name = next(iter(entry))
        keys = " and ".join(map(repr, entry))
        slip = entry[name] is None  # `- SparseGPT:` with its fields on the same level
        hint = f"indent the rest under {name}" if slip else "begin each with '- '"
        return f"a modifier has one key, its name, got {keys}; {hint}"
    return f"a modifier is a mapping, got {shown(entry)}; write 'Name: {{field: value}}'"

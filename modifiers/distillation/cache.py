"""A teacher's next-token distributions on disk, one file for each sequence.

What is stored depends on the sequence alone: the teacher reads it by itself, in its own precision. So a run that finds
it on disk, one that computes it, and one that was killed in between are the same to the bit.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ...errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Distributions:
    """The teacher's distribution for each predicted token of one sequence.

    `logits` float16 [predicted, vocab], less each row's largest; or, of the `top_k` likeliest tokens only [predicted,
    k], with their ids in `tokens` int32 [predicted, k] and in `rest` float32 [predicted] the log of the sum of
    exp(logit / temperature) over all others.
    """

    logits: torch.Tensor
    tokens: torch.Tensor | None = None
    rest: torch.Tensor | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, top_k: int | None, temperature: float) -> Distributions:
        """From float logits [predicted, vocab]."""
        logits = logits.float()
        logits = logits - logits.amax(-1, keepdim=True)
        if top_k is None or top_k >= logits.shape[-1]:
            return cls(logits.half().cpu())
        values, tokens = logits.topk(top_k, dim=-1)
        rest = (logits / temperature).scatter(-1, tokens, -torch.inf).logsumexp(-1)
        return cls(values.half().cpu(), tokens.int().cpu(), rest.cpu())

    def divergence(self, student: torch.Tensor, temperature: float) -> torch.Tensor:
        """Sum over tokens of KL(teacher || student); student logits [predicted, vocab].

        With `top_k` all other tokens count as one.
        """
        s = student.float() / temperature
        t = self.logits.to(s.device).float() / temperature
        if self.tokens is not None and self.rest is not None:
            tokens = self.tokens.to(s.device).long()
            others = s.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
            s = torch.cat([s.gather(-1, tokens), others], dim=-1)
            t = torch.cat([t, self.rest.to(s.device)[:, None]], dim=-1)
        s, t = s.log_softmax(-1), t.log_softmax(-1)
        return torch.nn.functional.kl_div(s, t, reduction="sum", log_target=True)


class LogitCache:
    """The files of one teacher under `folder`; settings that change what is stored get folders of their own."""

    def __init__(self, folder: Path, fingerprint: str, top_k: int | None, temperature: float):
        kept = "full" if top_k is None else f"top{top_k}-t{temperature:g}"
        self.folder = folder / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}-{kept}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Distributions | None:
        """None if there is none yet. DataError when the file is damaged."""
        file = self.path(key)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Distributions(**load(content))
        except (SafetensorError, TypeError) as error:
            raise DataError(f"{file}: damaged ({error}); delete it to compute it again") from error

    def write(self, key: str, found: Distributions) -> None:
        """Whole or not at all; several processes may write the same sequence at once."""
        parts = {name: part for name, part in vars(found).items() if part is not None}
        file = self.path(key)
        file.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".partial", delete=False) as out:
            out.write(save(parts))
            out.flush()
            os.fsync(out.fileno())
        os.replace(out.name, file)


def sequence_key(*parts: torch.Tensor | None) -> str:
    """Hex digest of a sequence's tokens, and of whatever else the stored distributions depend on."""
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for part in parts:
        values = b"-" if part is None else part.to(torch.int64).cpu().numpy().tobytes()
        digest.update(len(values).to_bytes(8, "little") + values)
    return digest.hexdigest()

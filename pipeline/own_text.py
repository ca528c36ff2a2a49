"""Text that a model writes by itself: to calibrate and recover on what it knows, where nobody has its training data.

Williams, Chrysostomou and Aletras 2024 (arXiv 2410.17170) calibrate on such text; a chat model that is given nothing
but the opening of a user's turn writes question and answer (Magpie, Xu et al. 2024, arXiv 2406.08464).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import ModelError
from ..progress import Progress
from .durable import write_text
from .models import quiet_transformers

TOGETHER = 16  # texts written side by side
NEVER = -1  # no token: with none given, generation ends at the model's own last one
LOOP = 3.0  # times that a text may be larger than compressed; prose has 2 to 2.5, code up to 3
SHORTEST = 256  # bytes of a text of which that can be said
TRIES = 4  # texts drawn for each one wanted, at most
MARK = "\x02"  # stands for the user's message in the chat template


@torch.inference_mode()
def write_texts(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int = 320,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """`count` texts of `length` tokens each, which end where the tokens do, not where the model would.

    Every second batch of a model with a chat template begins in a user's turn, the others at the beginning of a
    document. Texts that repeat themselves, as small models' do, are drawn anew. The same seed gives the same texts.
    Raises ModelError when the model has no token to begin with, is too short for `length`, its logits are not finite,
    or it writes hardly anything but repetitions.
    """
    openings = list(_openings(tokenizer))
    if not openings:
        raise ModelError("the tokenizer has no token to begin or end a text, and no chat template")
    longest = max(map(len, openings)) + length
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ModelError(
            f"a text of {longest} tokens is longer than the model's context of {context}; ask for fewer"
        )
    settings = GenerationConfig(
        max_new_tokens=length,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        eos_token_id=NEVER,
        pad_token_id=0,
    )
    texts: list[str] = []
    batches = drawn = 0
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        while len(texts) < count:
            if drawn > TRIES * max(count, TOGETHER):
                raise ModelError(
                    f"of {drawn} texts {drawn - len(texts)} repeat themselves; give a higher temperature"
                )
            opening = openings[batches % len(openings)]
            ids = torch.tensor([opening] * min(TOGETHER, count - len(texts)), device=model.device)
            try:
                found = model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=settings
                )
            except RuntimeError as error:  # torch's, of drawing among chances that are none
                raise ModelError(
                    f"the model can't write: {error}; check that its weights are finite"
                ) from error
            batches, drawn = batches + 1, drawn + len(found)
            written = tokenizer.batch_decode(found[:, len(opening) :])
            texts += [text for text in written if not is_loop(text)]
            if progress:
                progress("write", len(texts), count)
    return texts


def is_loop(text: str) -> bool:
    """Whether a text repeats itself, so that it compresses far better than prose or code."""
    data = text.encode(errors="replace")
    return len(data) >= SHORTEST and len(data) > LOOP * len(zlib.compress(data))


def store_texts(file: Path, texts: list[str]) -> None:
    """As rows with the column `text`, JSON Lines."""
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    write_text(file, "\n".join(rows) + "\n")


def _openings(tokenizer: Any) -> Iterator[list[int]]:
    """Token ids that a document, and a user's turn, begin with."""
    # What stood between documents in pretraining; tuning for chat often makes other tokens the first and last.
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    firsts = (separator, tokenizer.bos_token_id, tokenizer.eos_token_id)
    yield from [[token] for token in firsts if token is not None][:1]
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        yield tokenizer(text.partition(MARK)[0], add_special_tokens=False)["input_ids"]

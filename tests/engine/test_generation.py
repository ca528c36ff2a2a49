"""Text as it comes: streaming, stop strings, characters, sampling, ends of an answer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokenizers
from tokenizers import decoders, models, pre_tokenizers

from paring.engine import Engine
from paring.engine.detokenize import REPLACEMENT, Detokenizer, StopStrings
from paring.engine.export import export
from paring.engine.sampling import Sampler, Sampling, nucleus
from paring.engine.tokenizer import Tokenizer
from paring.errors import GraphError, ParingError

PROMPT = [7, 60, 12]


@pytest.fixture
def engine(llama: Callable[..., Path]) -> Engine:
    return Engine.load(export(llama()), threads=1)


def byte_level() -> Tokenizers:
    """One token for each byte of UTF-8, as in GPT-2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizers(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback() -> Tokenizers:
    """Words with a leading space, and bytes for everything else, as in Llama 2."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    vocabulary |= {"▁": 256, "a": 257, "b": 258, "▁a": 259}
    made = Tokenizers(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


# --- decoding ----------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_token_of_the_logits(engine: Engine) -> None:
    answer = engine.generate(PROMPT, max_tokens=20)
    tokens = list(PROMPT)
    for token in answer.tokens:
        assert token == int(engine.logits(tokens)[-1].argmax())
        tokens.append(token)
    assert answer.finish_reason == "length"
    assert answer.timings.prompt_tokens == 3
    assert answer.timings.tokens == len(answer.tokens) == 20
    assert answer.timings.tokens_per_second > 0


def test_a_stream_adds_up_to_the_completion(engine: Engine) -> None:
    how: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 3}
    stream = engine.stream(PROMPT, **how)
    with pytest.raises(GraphError, match="not finished"):
        _ = stream.completion
    pieces = list(stream)
    assert len(pieces) > 10
    answer = engine.generate(PROMPT, **how)
    assert "".join(pieces) == stream.completion.text == answer.text
    assert stream.completion.tokens == answer.tokens


def test_an_end_token_ends_the_answer_and_is_not_shown(engine: Engine) -> None:
    free = engine.generate(PROMPT, max_tokens=10)
    last = free.tokens[4]
    engine.end_tokens = frozenset({last})
    answer = engine.generate(PROMPT, max_tokens=10)
    assert answer.finish_reason == "stop"
    assert answer.tokens == free.tokens[: free.tokens.index(last) + 1]
    assert answer.text == engine.decode(answer.tokens[:-1])


def test_the_answer_ends_where_the_context_does(engine: Engine) -> None:
    answer = engine.generate([5] * 120, max_tokens=1000)
    assert answer.finish_reason == "context"
    assert len(answer.tokens) == 128 - 120 + 1  # the last one is chosen, but has no place
    assert engine.generate([5] * 128).finish_reason == "context"
    with pytest.raises(GraphError, match="context length is 128"):
        engine.generate([5] * 129)


def test_a_following_answer_computes_only_what_is_new(engine: Engine) -> None:
    first = engine.stream(PROMPT, max_tokens=10)
    list(first)
    prompt = [*PROMPT, *first.completion.tokens, 9, 9]
    follow = engine.stream(prompt, max_tokens=10, after=first)
    list(follow)
    fresh = engine.generate(prompt, max_tokens=10)
    assert follow.completion.tokens == fresh.tokens
    # The last token of an answer is never computed: nothing came after it.
    assert follow.completion.timings.prompt_tokens == 3
    assert fresh.timings.prompt_tokens == len(prompt)
    other = Engine(engine.graph, threads=1)
    with pytest.raises(GraphError, match="another engine"):
        other.stream(prompt, after=follow)


def test_prompts_of_every_kind(llama: Callable[..., Path]) -> None:
    folder = llama()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'fool' %}{{ raise_exception('no fools') }}"
        "{% endif %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    engine = Engine.load(export(folder), threads=1)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert engine.tokens(chat) == [ord(c) for c in "u:hi;a:yo;a:"]
    assert engine.tokens("abc") == [97, 98, 99]
    assert (
        engine.generate("abc", max_tokens=3).tokens
        == engine.generate([97, 98, 99], max_tokens=3).tokens
    )
    with pytest.raises(GraphError, match="no fools"):
        engine.generate([{"role": "fool", "content": ""}])
    with pytest.raises(GraphError, match="empty"):
        engine.generate("")
    with pytest.raises(GraphError, match="empty"):
        engine.generate([])


def test_templates_made_for_training_render_as_in_transformers(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% if tools is not none or documents is not none %}tools{% endif %}"
    )
    tokenizer = Tokenizer(file, chat_template=template)
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == tokenizer.encode("hi")


def test_errors_of_the_tokenizers_library_are_told(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    Tokenizers(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(file))
    with pytest.raises(GraphError, match=r"tokenizer\.json: the tokenizer refuses this text"):
        Tokenizer(file).encode("b")


def test_chat_templates_can_reach_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    for template in (
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[0].role.missing.deep }}",
        "{{ 1 // 0 }}",
        "{{ 'x'.encode('nope') }}",
        "{{ cycler() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ):
        with pytest.raises(GraphError, match="chat template"):
            Tokenizer(file, chat_template=template).chat([{"role": "user"}])
    for template in ("{% for", "{% for a in b %}" * 30 + "{% endfor %}" * 30):
        broken = Tokenizer(file, chat_template=template)
        assert broken.encode("a")  # plain text does not need it
        with pytest.raises(GraphError, match="can't be parsed"):
            broken.chat([{"role": "user"}])
    with pytest.raises(GraphError, match="not valid Unicode"):
        Tokenizer(file).encode("\udcff")
    with pytest.raises(GraphError, match="no chat template"):
        Tokenizer(file).chat([])
    file.write_text("{}")
    with pytest.raises(GraphError, match="not a tokenizer file"):
        Tokenizer(file)


def test_without_a_tokenizer_only_ids_will_do(llama: Callable[..., Path]) -> None:
    engine = Engine.load(export(llama(tokenizer=False)), threads=1)
    answer = engine.generate(PROMPT, max_tokens=3)
    assert (answer.text, len(answer.tokens)) == ("", 3)
    with pytest.raises(GraphError, match="no tokenizer"):
        engine.generate("abc")


def test_settings_that_mean_nothing_are_refused(engine: Engine) -> None:
    for how in (
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
        {"stop": ["x", ""]},
    ):
        with pytest.raises(ParingError, match=next(iter(how))):
            engine.generate(PROMPT, **how)  # type: ignore[arg-type]


# --- stop strings ------------------------------------------------------------------------------


def test_a_stop_string_cuts_the_text(engine: Engine) -> None:
    text = engine.generate(PROMPT, max_tokens=30).text
    stop = text[10:14]
    answer = engine.generate(PROMPT, max_tokens=30, stop=["never in there", stop])
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) < 30
    assert engine.generate(PROMPT, max_tokens=30, stop=stop).text == answer.text


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.floats(0, 1), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_never_show_however_the_text_comes(
    text: str, stops: list[str], places: list[float]
) -> None:
    """After every piece exactly what can't become part of a stop string is out."""

    def certain(seen: str) -> str:
        complete = [
            (seen.find(stop) + len(stop), seen.find(stop)) for stop in stops if stop in seen
        ]
        if complete:
            return seen[: min(complete)[1]]
        open_ends = [n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        return seen[: len(seen) - max(open_ends, default=0)]

    matcher = StopStrings(stops)
    shown = ""
    for start, end in pairwise([0, *sorted(int(p * len(text)) for p in places), len(text)]):
        shown += matcher.push(text[start:end])
        assert shown == certain(text[:end])
    assert matcher.found == any(stop in text for stop in stops)
    assert shown + matcher.flush() == (certain(text) if matcher.found else text)


# --- characters --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(text=st.text(st.sampled_from("ab é€😀\n"), max_size=12))
@settings(max_examples=100, deadline=None)
def test_characters_come_whole(make: Callable[[], Tokenizers], text: str) -> None:
    tokenizer = make()
    ids = (
        tokenizer.encode(text).ids
        if make is byte_level
        else [256 if c == " " else b for c in text for b in c.encode()]
    )
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push(token) for token in ids]
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 255), max_size=20))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_come_as_replacements(ids: list[int]) -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.decode)
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids)


def test_the_last_unfinished_character_comes_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("x😀").ids[:-1]
    detokenizer = Detokenizer(tokenizer.decode)
    assert [detokenizer.push(token) for token in ids] == ["x", "", "", ""]
    assert detokenizer.flush() == REPLACEMENT


# --- sampling ----------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)) + np.float32(7)


def frequencies(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.next(LOGITS) for _ in range(draws)], minlength=5) / draws


@pytest.mark.parametrize(
    ("how", "chances"),
    [
        ({"temperature": 1.0}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.0025, 0.16, 0.01, 0.09, 0.0225]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 0.4, 0, 0.3, 0.15]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_chances(how: dict[str, Any], chances: list[float]) -> None:
    expected = np.array(chances) / sum(chances)
    found = frequencies(Sampling(**how))
    assert found[expected == 0].sum() == 0
    # 5 standard deviations of a count of 20,000 draws.
    assert np.abs(found - expected).max() <= 5 * np.sqrt(0.25 / 20_000)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99999])
def test_a_nucleus_is_that_of_a_full_sort(spread: float, top_p: float) -> None:
    weights = np.exp(spread * np.random.default_rng(0).standard_normal(3000).round(1))
    order = np.lexsort((np.arange(len(weights)), -weights))
    held = np.cumsum(weights[order])
    expected = order[: int(np.searchsorted(held, top_p * weights.sum())) + 1]
    found = nucleus(weights, top_p)
    assert abs(len(found) - len(expected)) <= 1  # the edge of the sum may be rounded either way
    shorter = min(len(found), len(expected))
    assert found[:shorter].tolist() == expected[:shorter].tolist()


def test_the_seed_decides(engine: Engine) -> None:
    def answer(seed: int) -> list[int]:
        return engine.generate(PROMPT, max_tokens=20, temperature=1.0, seed=seed).tokens

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-320, 1e-50, 1e-46, 1e-45, 1e-40, 1e-30])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert Sampler(Sampling(temperature=temperature)).next(LOGITS) == int(LOGITS.argmax())


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for bad in (np.nan, np.inf):
        logits = LOGITS.copy()
        logits[2] = bad
        with pytest.raises(GraphError, match="not finite"):
            Sampler(Sampling(temperature=1.0)).next(logits)

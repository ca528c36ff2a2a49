"""Several sequences at a time: each gets the bits it would get alone, whoever else is there."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import Builder
from numpy.typing import NDArray
from pico_checkpoints import VOCABULARY

from paring.engine import Batch, Engine, Request, _core
from paring.engine.export import export
from paring.engine.graph import Attention, Rope
from paring.engine.state import State, advance
from paring.errors import GraphError, ParingError

RANDOM = np.random.default_rng(11)
LENGTHS = (1, 3, 64, 100, 129, 200, 300)
PROMPTS = [RANDOM.integers(0, VOCABULARY, n) for n in LENGTHS]
CACHES = ("f32", "f16", "int8")


@pytest.fixture
def engine(llama: Callable[..., Path]) -> Engine:
    return Engine.load(export(llama(max_position_embeddings=400)), threads=2)


class Interrupting:
    """A model whose `forward` does its work and is then interrupted, as Python delivers Ctrl-C."""

    def __init__(self, model: Any) -> None:
        self.model, self.armed = model, True

    def forward(self, *arguments: Any) -> None:
        self.model.forward(*arguments)
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_an_interrupt_leaves_sequences_as_they_were(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [engine.logits(prompt)[-1] for prompt in PROMPTS[:2]]
    states = [engine.state() for _ in PROMPTS[:2]]
    parts = [(state, prompt, True) for state, prompt in zip(states, PROMPTS, strict=False)]
    out = np.empty((2, VOCABULARY), np.float32)
    monkeypatch.setattr(engine, "_model", Interrupting(engine._model))
    with pytest.raises(KeyboardInterrupt):
        advance(parts, out)
    assert [(state.length, state._tokens) for state in states] == [(0, [])] * 2
    advance(parts, out)
    assert np.array_equal(out, expected)


def test_a_sequence_takes_all_tokens_or_none(engine: Engine) -> None:
    state = engine.state()
    assert np.isnan(state.logits).all()
    state.extend([1, 2, 3])
    assert np.array_equal(state.logits, engine.logits([1, 2, 3])[-1])
    with pytest.raises(GraphError, match="context"):
        state.extend(np.ones(engine.context, np.int64))
    assert (state.length, state._tokens) == (3, [1, 2, 3])
    state.append(4)
    assert np.array_equal(state.logits, engine.logits([1, 2, 3, 4])[-1])


def test_a_prompt_is_of_one_kind(engine: Engine) -> None:
    assert engine.tokens(iter([1, 2])) == [1, 2]  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="mixes messages and token ids"):
        engine.generate([{"role": "user", "content": "x"}, 5])  # type: ignore[list-item]


def test_a_batch_goes_on_after_an_interrupt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [engine.generate(prompt, 6).tokens for prompt in PROMPTS[:4]]
    batch = engine.batch(4)
    requests = [batch.submit(prompt, 6) for prompt in PROMPTS[:4]]
    model = Interrupting(engine._model)
    monkeypatch.setattr(engine, "_model", model)
    interrupts = 0
    while batch.busy:
        try:
            batch.step()
        except KeyboardInterrupt:
            interrupts += 1
        model.armed = interrupts < 4 and not model.armed
    assert interrupts == 4
    assert [request.answer.tokens for request in requests] == expected


def test_an_interrupt_between_two_answers_loses_no_event(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [engine.generate(PROMPTS[0], 2), engine.generate(PROMPTS[1], 5)]
    batch = engine.batch(2)
    requests = [batch.submit(PROMPTS[0], 2), batch.submit(PROMPTS[1], 5)]
    choose, interrupts = requests[1].answer.choose, 0

    def interrupted(logits: NDArray[Any], room: bool) -> str:
        nonlocal interrupts
        if requests[0].done and not interrupts:
            interrupts += 1
            raise KeyboardInterrupt
        return choose(logits, room)

    monkeypatch.setattr(requests[1].answer, "choose", interrupted)
    events = []
    while batch.busy:
        with contextlib.suppress(KeyboardInterrupt):
            events += batch.step()
    assert interrupts == 1
    for request, wanted in zip(requests, expected, strict=True):
        assert request.completion.tokens == wanted.tokens
        news = [event for event in events if event.request is request]
        assert "".join(event.text for event in news) == wanted.text
        assert [event.done for event in news] == [*[False] * (len(news) - 1), True]


def test_a_step_that_fails_tells_of_the_cancelled_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = engine.batch(2)
    going, leaving = batch.submit(PROMPTS[0], 3), batch.submit(PROMPTS[1], 3)
    leaving.cancel()
    monkeypatch.setattr(engine, "_model", Interrupting(engine._model))
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    done = [event.request for event in batch if event.done]
    assert done == [leaving, going]


def test_a_batch_whose_logits_were_lost_computes_them_again(engine: Engine) -> None:
    expected = engine.generate(PROMPTS[1], 6).tokens
    batch = engine.batch(1)
    request = batch.submit(PROMPTS[1], 6)
    for _ in range(3):
        batch.step()
    assert request._state is not None
    request._state.extend(np.array(request.answer.tokens[-1:], np.int64))
    while batch.busy:
        batch.step()
    assert request.answer.tokens == expected


# --- sequences in one call ---------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["w8a8-sparse", "w4a16-g32"])
def test_every_sequence_gets_the_bits_that_it_gets_alone(
    quantized: Callable[..., Path], name: str, cache: Any, threads: int
) -> None:
    """Prompts whole and in parts, beside decoding; sequences join and leave at every step."""
    engine = Engine.load(
        export(quantized(name, max_position_embeddings=400)), threads=threads, cache=cache
    )
    expected = [engine.logits(prompt) for prompt in PROMPTS]
    chance = random.Random(threads)
    states = [engine.state() for _ in PROMPTS]
    out = np.empty((len(PROMPTS), VOCABULARY), np.float32)
    waiting = set(range(len(PROMPTS)))
    while waiting:
        there = chance.sample(sorted(waiting), chance.randint(1, len(waiting)))
        parts = []
        for i in there:
            done = states[i].length
            count = min(chance.choice([1, 1, 2, 5, 60, 150]), len(PROMPTS[i]) - done)
            parts.append((states[i], PROMPTS[i][done : done + count], chance.random() < 0.7))
        advance(parts, out)
        rows = iter(out)
        for i, (state, _, wanted) in zip(there, parts, strict=True):
            if wanted:
                assert np.array_equal(next(rows), expected[i][state.length - 1]), LENGTHS[i]
        waiting = {i for i in waiting if states[i].length < len(PROMPTS[i])}


@pytest.mark.parametrize("row", _core.rows())
def test_every_kernel_row_gives_the_same_bits_to_a_batch(
    quantized: Callable[..., Path], row: str
) -> None:
    folder = export(quantized("w8a8-sparse", max_position_embeddings=400))
    expected = Engine.load(folder, threads=1, kernels="reference", cache="int8")
    engine = Engine.load(folder, threads=2, kernels=row, cache="int8")
    out = np.empty((len(PROMPTS), VOCABULARY), np.float32)
    advance([(engine.state(), prompt, True) for prompt in PROMPTS], out)
    for prompt, logits in zip(PROMPTS, out, strict=True):
        assert np.array_equal(logits, expected.logits(prompt)[-1])


def test_all_logits_of_several_sequences(engine: Engine) -> None:
    """The core gives them in the parts' order, over the chunks of 128 tokens."""
    model = engine.model
    wanted: list[Any] = ["all", "none", "last", "all", "last", "none", "all"]
    rows = sum({"all": len(p), "last": 1, "none": 0}[w] for p, w in zip(PROMPTS, wanted))  # noqa: B905
    out = np.full((rows, VOCABULARY), np.nan, np.float32)
    parts = [(model.sequence(), p, w) for p, w in zip(PROMPTS, wanted, strict=True)]
    model.forward(parts, out)
    row = 0
    for prompt, want in zip(PROMPTS, wanted, strict=True):
        expected = engine.logits(prompt)
        expected = {"all": expected, "last": expected[-1:], "none": expected[:0]}[want]
        assert np.array_equal(out[row : row + len(expected)], expected)
        row += len(expected)


def test_a_batch_that_is_refused_changes_nothing(engine: Engine) -> None:
    good, full = engine.state(), engine.state()
    good.extend(PROMPTS[3])
    full.extend(np.zeros(399, np.int64))
    out = np.full((4, VOCABULARY), 7, np.float32)
    one = np.zeros(1, np.int64)
    other = Engine(engine.graph, threads=1)
    for parts, message in (
        ([(good, one, True), (full, np.zeros(2, np.int64), True)], "sequence 1 .*401 tokens"),
        ([(full, np.zeros(2, np.int64), True), (good, one, True)], "sequence 0 .*401 tokens"),
        ([(good, one, True), (full, one, True), (good, one, True)], "twice"),
        ([(good, one, True), (full, one[:0], True)], "sequence 1 .*no tokens"),
        ([(good, one, True), (full, one - 1, True)], "sequence 1 .*token 0 is -1"),
        ([(good, one, True), (full, one + VOCABULARY, True)], "outside the vocabulary"),
        ([(good, one, True), (other.state(), one, True)], "another model"),
    ):
        with pytest.raises(GraphError, match=message):
            advance(parts, out)
        assert (good.length, full.length) == (100, 399)
    assert (out == 7).all()
    advance([(good, one, True), (full, one, True)], out)
    assert np.array_equal(out[0], engine.logits([*PROMPTS[3], 0])[-1])


def test_more_sequences_than_a_pass_has_rows(engine: Engine) -> None:
    states = [engine.state() for _ in range(150)]
    tokens = RANDOM.integers(0, VOCABULARY, (2, 150, 1))
    out = np.empty((150, VOCABULARY), np.float32)
    for step in tokens:
        advance([(s, t, True) for s, t in zip(states, step, strict=True)], out)
    for i in (0, 127, 128, 149):
        assert np.array_equal(out[i], engine.logits(tokens[:, i, 0])[-1])


def test_rope_and_attention_work_by_the_place_in_each_sequence() -> None:
    """Without a linear in between that could hide it."""
    b = Builder(32, 40)
    inverse = b.vector("inv_freq", 0.3 ** np.arange(4))
    rope: dict[str, Any] = {"head_dim": 8, "inv_freq": inverse, "style": "half", "scale": 1.0}
    b.add(Rope(input="x", out="r", heads=4, **rope))
    heads: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_dim": 8, "scale": 0.5}
    b.add(Attention(q="r", k="r", v="x", out="y", cache=0, **heads))
    b.caches = 1
    engine = Engine(b.show("y", 32, context=300), threads=2)
    prompts = [b.random.integers(0, 40, n) for n in (5, 260, 131)]
    states = [engine.state() for _ in prompts]
    out = np.empty((3, 40), np.float32)
    advance([(s, p[:-1], False) for s, p in zip(states, prompts, strict=True)], out)
    advance([(s, p[-1:], True) for s, p in zip(states, prompts, strict=True)], out)
    for prompt, found in zip(prompts, out, strict=True):
        assert np.array_equal(found, engine.logits(prompt)[-1])


# --- sequences that share their beginning ------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128, 200])
def test_forks_share_pages_and_never_disturb_each_other(
    llama: Callable[..., Path], cache: Any, length: int
) -> None:
    engine = Engine.load(export(llama(max_position_embeddings=400)), threads=1, cache=cache)
    first = engine.state()
    first.extend(PROMPTS[5])
    forks = [first.fork(length), first.fork(length)]
    tails = [RANDOM.integers(0, VOCABULARY, 70) for _ in range(3)]
    out = np.empty((3, VOCABULARY), np.float32)
    for t in range(70):  # in turns, so that each writes where the others have just been
        parts = zip([*forks, first], (tail[t : t + 1] for tail in tails), strict=True)
        advance([(state, token, True) for state, token in parts], out)
    for state, tail, logits in zip(forks, tails, out, strict=False):
        whole = np.concatenate([PROMPTS[5][:length], tail])
        assert np.array_equal(logits, engine.logits(whole)[-1])
        assert state.length == length + 70
    whole = np.concatenate([PROMPTS[5], tails[2]])
    assert np.array_equal(out[2], engine.logits(whole)[-1])


def test_a_rewound_sequence_does_not_write_into_a_fork(engine: Engine) -> None:
    first = engine.state()
    first.extend(PROMPTS[5])
    fork = first.fork(200)
    first.rewind(np.append(PROMPTS[5][:10], 1))
    first.extend(PROMPTS[6][:250])  # over all the pages that the fork has
    fork.append(5)
    assert np.array_equal(fork.logits, engine.logits([*PROMPTS[5], 5])[-1])
    del first
    fork.append(6)
    assert np.array_equal(fork.logits, engine.logits([*PROMPTS[5], 5, 6])[-1])


# --- requests ----------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"max_tokens": 30},
    {"max_tokens": 1},
    {"max_tokens": 40, "temperature": 1.0, "seed": 3},
    {"max_tokens": 25, "temperature": 0.7, "top_k": 20, "seed": 4},
    {"max_tokens": 60, "temperature": 1.3, "top_p": 0.9, "seed": 5},
    {"max_tokens": 300, "temperature": 1.0, "seed": 6},  # fills the context
    {"max_tokens": 50, "temperature": 1.0, "seed": 7, "stop": ["a", "b", "c"]},
]


@pytest.mark.parametrize("max_sequences", [1, 3, 8])
def test_answers_are_those_of_generate(quantized: Callable[..., Path], max_sequences: int) -> None:
    engine = Engine.load(
        export(quantized("w8a8-sparse", max_position_embeddings=400)), threads=2, cache="int8"
    )
    engine.end_tokens = frozenset()
    free = [engine.generate(PROMPTS[i].tolist(), **SETTINGS[i]).tokens for i in (4, 5)]
    engine.end_tokens = frozenset([next(token for token in free[0] if token not in free[1])])
    expected = [
        engine.generate(p.tolist(), **how) for p, how in zip(PROMPTS, SETTINGS, strict=True)
    ]
    batch = engine.batch(max_sequences)
    requests = [batch.submit(p.tolist(), **how) for p, how in zip(PROMPTS, SETTINGS, strict=True)]
    texts = dict.fromkeys(requests, "")
    ended: list[Request] = []
    most = 0
    for event in batch:
        texts[event.request] += event.text
        assert event.request not in ended
        if event.done:
            assert event.request.done
            ended.append(event.request)
        most = max(most, len(batch._running))
    assert most <= max_sequences
    assert set(ended) == set(requests)
    for request, wanted in zip(requests, expected, strict=True):
        found = request.completion
        assert (found.tokens, found.text) == (wanted.tokens, wanted.text)
        assert (found.finish_reason, texts[request]) == (wanted.finish_reason, wanted.text)
        assert found.timings.tokens == len(wanted.tokens)
    assert {answer.finish_reason for answer in expected} == {"stop", "length", "context"}
    assert not batch.busy
    assert batch.step() == []


def test_requests_join_while_others_run(engine: Engine) -> None:
    batch = engine.batch(max_sequences=3)
    first = batch.submit(PROMPTS[3].tolist(), max_tokens=20)
    for _ in range(5):
        batch.step()
    assert 0 < len(first.answer.tokens) < 20
    second = batch.submit(PROMPTS[6].tolist(), max_tokens=3)  # 300 tokens: three steps to read
    before = len(first.answer.tokens)
    batch.step()
    assert len(first.answer.tokens) == before + 1  # the long prompt holds nobody up
    assert second.answer.tokens == []
    list(batch)
    for request, prompt in ((first, PROMPTS[3]), (second, PROMPTS[6])):
        count = len(request.completion.tokens)
        assert request.completion.tokens == engine.generate(prompt.tolist(), count).tokens


def test_what_another_sequence_has_computed_is_not_computed_again(engine: Engine) -> None:
    batch = engine.batch(max_sequences=2)
    first = batch.submit(PROMPTS[4].tolist(), max_tokens=10)
    list(batch)
    follow = [*PROMPTS[4].tolist(), *first.completion.tokens, 9, 9]
    second = batch.submit(follow, max_tokens=10)
    batch.step()
    # Beside the one that runs: it shares what that one has of the prompt so far.
    third = batch.submit([*follow[:100], 3], max_tokens=10)
    list(batch)
    assert second.reused == 129 + 9  # the last token of an answer is never computed
    assert second.completion.timings.prompt_tokens == 3
    assert third.reused == 100
    assert second.completion.tokens == engine.generate(follow, 10).tokens
    assert third.completion.tokens == engine.generate([*follow[:100], 3], 10).tokens
    again = batch.submit(follow, max_tokens=10)
    list(batch)
    assert again.reused == len(follow) - 1  # the last is computed again, for its logits
    assert again.completion.tokens == second.completion.tokens


def cached(batch: Batch) -> int:
    """Tokens that the pages in use have room for; those of two sequences counted twice."""
    states = [*batch._kept, *(r._state for r in batch._running)]
    page = batch._engine.model.info()["page_bytes"]
    return sum(s._sequence.bytes for s in states if s is not None) // page * 64


def test_memory_is_bounded_and_requests_wait_for_it(engine: Engine) -> None:
    batch = engine.batch(max_sequences=8, max_cached_tokens=450)
    requests = [batch.submit(p.tolist(), max_tokens=20) for p in PROMPTS]
    ran = []
    while batch.busy:
        batch.step()
        ran.append(len(batch._running))
        assert cached(batch) <= 450
    assert max(ran) == 4  # pages of 64, 64, 128 and 128 tokens
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.completion.tokens == engine.generate(prompt.tolist(), 20).tokens
    with pytest.raises(GraphError, match="320 tokens of cache.* max_cached_tokens is 310"):
        engine.batch(max_cached_tokens=310).submit(PROMPTS[6].tolist(), max_tokens=1)


def test_sequences_that_ran_are_kept_as_long_as_there_is_room(engine: Engine) -> None:
    batch = engine.batch(max_sequences=2)
    for prompt in PROMPTS:
        batch.submit(prompt.tolist(), max_tokens=2)
        list(batch)
    assert [state.length for state in batch._kept] == [201, 301]
    again = batch.submit(PROMPTS[5].tolist(), max_tokens=2)
    list(batch)
    assert again.reused == 199
    assert len(batch._kept) == 2


def test_a_cancelled_request_leaves_and_the_others_go_on(engine: Engine) -> None:
    batch = engine.batch(max_sequences=2)
    requests = [batch.submit(p.tolist(), max_tokens=20) for p in PROMPTS[:4]]
    batch.step()
    requests[0].cancel()  # runs
    requests[3].cancel()  # waits
    events = list(batch)
    for request in (requests[0], requests[3]):
        assert request.done
        with pytest.raises(GraphError, match="cancelled"):
            _ = request.completion
        assert [e.done for e in events if e.request is request].count(True) == 1
    for request, prompt in zip(requests[1:3], PROMPTS[1:3], strict=True):
        assert request.completion.tokens == engine.generate(prompt.tolist(), 20).tokens
    requests[1].cancel()
    assert batch.step() == []
    assert requests[1].completion.finish_reason == "length"


def test_logits_that_are_no_numbers_end_one_answer_only() -> None:
    b = Builder(8, 16)
    b.arrays["embedding/values"][3] = 3e38
    head = np.zeros((16, 8), np.float32)
    head[:, 0], head[:, 1] = 3, -3
    b.matrix("head", head + b.normal(16, 8) / 100)
    engine = Engine(b.graph("x", head="head"), threads=1)
    batch = engine.batch()
    good, bad = batch.submit([1, 2], max_tokens=1), batch.submit([3], max_tokens=5)
    list(batch)
    assert good.completion.tokens == engine.generate([1, 2], 1).tokens
    with pytest.raises(GraphError, match="not finite"):
        _ = bad.completion
    assert bad.done


def test_an_engine_that_fails_leaves_the_requests_as_they_were(engine: Engine) -> None:
    batch = engine.batch()
    running = batch.submit([1, 2, 3], max_tokens=5)
    batch.step()
    waiting = batch.submit([4], max_tokens=5)
    model, engine._model = engine._model, None
    for _ in range(2):
        with pytest.raises(GraphError, match="closed"):
            batch.step()
    engine._model = model
    list(batch)
    assert running.completion.tokens == engine.generate([1, 2, 3], 5).tokens
    assert waiting.completion.tokens == engine.generate([4], 5).tokens


def test_requests_that_mean_nothing_are_refused(engine: Engine) -> None:
    batch = engine.batch()
    for how in ({"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"stop": [""]}):
        with pytest.raises(ParingError, match=next(iter(how))):
            batch.submit([1], **how)  # type: ignore[arg-type]
    for prompt in ([], [VOCABULARY], [0] * 401):
        with pytest.raises(GraphError):
            batch.submit(prompt)
    assert not batch.busy
    with pytest.raises(ParingError, match="max_sequences is 0"):
        engine.batch(max_sequences=0)
    request = batch.submit([1])
    with pytest.raises(GraphError, match="not finished"):
        _ = request.completion


def test_threads_submit_while_one_steps(engine: Engine) -> None:
    """As a server does: one thread steps, others submit, and read what is theirs."""
    batch = engine.batch(max_sequences=4)
    expected = [engine.generate(p.tolist(), 12) for p in PROMPTS]
    wrong: list[int] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if batch.wait(timeout=0.01):
                batch.step()

    def ask(first: int) -> None:
        for i in (first, (first + 3) % len(PROMPTS)):
            request = batch.submit(PROMPTS[i].tolist(), max_tokens=12)
            while not request.done:
                stop.wait(0.001)
            got = request.completion
            if (got.tokens, got.text) != (expected[i].tokens, expected[i].text):
                wrong.append(i)

    server = threading.Thread(target=serve)
    askers = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in (server, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    server.join()
    assert wrong == []
    assert not batch.wait(timeout=0)


def test_state_of_tokens_matches_the_cache_after_an_error(engine: Engine) -> None:
    """What a prompt has in common is told by tokens that were computed, and by no others."""
    state: State = engine.state()
    state.extend(PROMPTS[3])
    with pytest.raises(GraphError, match="outside the vocabulary"):
        state.append(VOCABULARY)
    assert state.common(np.array([*PROMPTS[3], VOCABULARY, 1])) == 100

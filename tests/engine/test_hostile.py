"""Hundreds of seeded mutations of graph files: each is refused with a GraphError, and nothing else ever happens.

Two authors: an accident, which leaves checksums stale, and an adversary, who makes them right again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from graph_documents import Folder
from pico_checkpoints import quantize, write_llama

from paring.engine import Engine
from paring.engine.export import export
from paring.engine.graph import Graph
from paring.engine.graph_file import read_graph
from paring.errors import GraphError

SEEDS = range(400)
FILES = ("graph.json", "graph.safetensors", "tokenizer.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """One sparse int8 graph, small enough that mutations hit every part; each test restores it."""
    checkpoint = write_llama(
        tmp_path_factory.mktemp("hostile") / "m",
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=256,
    )
    return Folder(export(quantize(checkpoint, bits=8, sparsity=0.5)))


def load(path: Path) -> Graph:
    """The graph as the engine holds it; what loads must also compute."""
    with Engine.load(path, threads=1) as engine:
        try:
            logits = engine.logits([1, 2, 3])
        except GraphError:
            pass  # a context of 2 is no fault
        else:
            assert logits.shape == (3, engine.vocabulary)
        return engine.graph


READERS = pytest.mark.parametrize("read", [read_graph, load], ids=["read", "engine"])
Read: TypeAlias = Callable[[Path], Graph]


def _truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 8))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_early(data: bytes, chance: random.Random) -> bytes:
    """Header bytes are few beside the data; here they get their share."""
    changed = bytearray(data)
    changed[chance.randrange(min(len(data), 6000))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _swap(data: bytes, chance: random.Random) -> bytes:
    a, b = sorted(chance.sample(range(len(data)), 2))
    size = min(chance.randrange(1, 200), b - a, len(data) - b)
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def _grow(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.randbytes(chance.randrange(1, 64)) + data[place:]


def _cut_out(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + data[place + chance.randrange(1, 64) :]


def _zero(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    size = min(chance.randrange(1, 4096), len(data) - place)
    return data[:place] + bytes(size) + data[place + size :]


ACCIDENTS = (_truncate, _flip, _flip_early, _swap, _grow, _cut_out, _zero)


def same_document(a: bytes, b: bytes) -> bool:
    """Whether two texts are the same JSON: 1e-05 and 1E-05 are, and then nothing was damaged."""
    try:
        return bool(json.loads(a) == json.loads(b))
    except (ValueError, RecursionError):
        return False


@READERS
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda accident: accident.__name__)
def test_accidents_are_refused(
    folder: Folder, name: str, accident: Callable[[bytes, random.Random], bytes], read: Read
) -> None:
    path = folder.path / name
    original, refused = path.read_bytes(), 0
    try:
        for seed in range(40):
            mutated = accident(original, random.Random(f"{name}{accident.__name__}{seed}"))
            if mutated == original or (name == "graph.json" and same_document(mutated, original)):
                continue
            path.write_bytes(mutated)
            with pytest.raises(GraphError):
                read(folder.path)
            refused += 1
    finally:
        path.write_bytes(original)
    assert refused > 30
    read_graph(folder.path)


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((node, key))
        if isinstance(value, (dict, list)):
            found += _places(value)
    return found


VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 64, 2**31, 2**53, 2**64, 10**40, 0.5, -1.5, 1e300, True, False, None),
    *(
        "",
        "h0",
        "logits",
        "f32",
        "bitmask",
        "matrix",
        "\ud800",
        "../x",
        [],
        {},
        [1],
        [[]],
        {"a": 1},
    ),
)


def mutate_document(document: dict[str, Any], chance: random.Random) -> None:
    """One to three changes at random places, among them values taken from elsewhere in the document."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = _places(document)
        container, key = chance.choice(places)
        other, other_key = chance.choice(places)
        match chance.randrange(5):
            case 0:
                container[key] = chance.choice(VALUES)
            case 1 if isinstance(container[key], (int, float)):
                container[key] = container[key] * chance.choice((-1, 2, 1.5)) + chance.choice(
                    (0, 1)
                )
            case 1 | 2:
                container[key] = json.loads(json.dumps(other[other_key]))
            case 3:
                container[key], other[other_key] = other[other_key], container[key]
                json.dumps(document)  # a swap with what it contains makes a circle: ValueError
            case _:
                del container[key]


def mutate_subtly(document: dict[str, Any], chance: random.Random) -> None:
    """One or two values exchanged for others that the same key has elsewhere, or numbers moved a little.

    Types stay right, so that only the checks of meaning stand between this and the engine.
    """
    for _ in range(chance.choice((1, 1, 2))):
        plain = [(c, k) for c, k in _places(document) if not isinstance(c[k], (dict, list))]
        container, key = chance.choice([(c, k) for c, k in plain if k not in ("sha256", "bytes")])
        value = container[key]
        others = [
            c[k] for c, k in plain if k == key and type(c[k]) is type(value) and c[k] != value
        ]
        if type(value) is int and (not others or chance.random() < 0.5):
            container[key] = value + chance.choice((-1, 1, value, 2**20))
        elif others:
            container[key] = chance.choice(others)


def hostile_documents(folder: Folder) -> list[dict[str, Any]]:
    """Documents to write with right checksums; those that came out unchanged or circular are left out."""
    found = []
    for seed in SEEDS:
        document = folder.document()
        try:
            mutate = mutate_document if seed % 2 else mutate_subtly
            mutate(document, random.Random(seed))
        except (ValueError, RecursionError):
            continue
        if document != folder.document():
            found.append(document)
    assert len(found) > 300
    return found


@READERS
def test_adversarial_documents_are_refused_or_sound(folder: Folder, read: Read) -> None:
    refused, sound = 0, []
    try:
        for document in hostile_documents(folder):
            folder.write(document)
            try:
                graph = read(folder.path)
            except GraphError:
                refused += 1
            else:
                sound.append((document, graph))
    finally:
        folder.restore()
    assert refused > 200
    assert sound  # another eps is another model, not a fault
    original = folder.document()
    for document, graph in sound:
        # What was accepted says nothing false about the data: sizes and hashes are those of the file.
        assert document["files"] == original["files"]
        for name, tensor in graph.tensors.items():
            for part, (_, shape) in tensor.layout().items():
                stored = graph.arrays[f"{name}/{part}"].shape
                assert len(stored) == len(shape)
                assert all(a in (-1, b) for a, b in zip(shape, stored, strict=True))


@READERS
def test_adversarial_data_are_refused_or_sound(folder: Folder, read: Read) -> None:
    """Arrays resized, retyped, exchanged or filled with noise, with right hashes and sizes."""
    refused = 0
    try:
        for seed in SEEDS[:200]:
            chance = random.Random(seed)
            arrays = folder.arrays()
            name, other = chance.sample(sorted(arrays), 2)
            array = arrays[name].copy()
            match chance.randrange(5):
                case 0:
                    arrays[name] = np.resize(array, array.size + chance.choice((-1, 1, 7)))
                case 1:
                    arrays[name] = array.view(np.uint8)
                case 2:
                    arrays[name], arrays[other] = arrays[other], arrays[name]
                case 3:
                    flat = array.reshape(-1).view(np.uint8)
                    flat[:] = np.frombuffer(chance.randbytes(flat.size), np.uint8)
                    arrays[name] = array
                case _:
                    del arrays[name]
            folder.write(folder.document(), arrays)
            try:
                graph = read(folder.path)
            except GraphError:
                refused += 1
            else:
                for tensor in graph.tensors:
                    assert graph.parts(tensor)
    finally:
        folder.restore()
    assert refused > 100

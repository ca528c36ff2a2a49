from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_documents import Folder

from paring.engine import graph_writer
from paring.engine.export import export
from paring.engine.graph_file import read_graph
from paring.engine.graph_writer import GraphWriter
from paring.errors import GraphError

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def folder(quantized: Callable[..., Path]) -> Folder:
    """A sparse int8 graph that reads without error."""
    folder = Folder(export(quantized("w8a8-sparse")))
    read_graph(folder.path)
    return folder


def test_rewriting_without_a_change_reads(folder: Folder) -> None:
    """What the tests below change is the only reason why they fail."""
    before = read_graph(folder.path)
    folder.write(folder.document(), folder.arrays())
    after = read_graph(folder.path)
    assert (after.ops, after.model, after.tensors) == (before.ops, before.model, before.tensors)


def test_checkpoint_folder_stands_for_its_graph(folder: Folder) -> None:
    assert read_graph(folder.path.parent).folder == folder.path


DOCUMENT_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda d: d.update(format="other"),
    "version": lambda d: d.update(version=2),
    "version as text": lambda d: d.update(version="1"),
    "version true": lambda d: d.update(version=True),
    "unknown key": lambda d: d.update(extra=1),
    "missing key": lambda d: d.pop("ops"),
    "no ops": lambda d: d.update(ops=[]),
    "ops no list": lambda d: d.update(ops={"0": {}}),
    "hidden size": lambda d: d["model"].update(hidden_size=65),
    "vocabulary": lambda d: d["model"].update(vocab_size=10**9),
    "context 0": lambda d: d["model"].update(context=0),
    "context huge": lambda d: d["model"].update(context=2**40),
    "one cache more": lambda d: d["model"].update(caches=3),
    "caches negative": lambda d: d["model"].update(caches=-1),
    "bytes": lambda d: d["files"]["graph.safetensors"].update(bytes=17),
    "another file": lambda d: d["files"].update({"other": {"bytes": 1}}),
    "tokenizer elsewhere": lambda d: d["tokenizer"].update(file="../config.json"),
    "tokenizer absent": lambda d: d["tokenizer"].update(file="nothing.json"),
    "tokenizer a folder": lambda d: d["tokenizer"].update(file="."),
    "tokenizer with a zero byte": lambda d: d["tokenizer"].update(file="a\0b"),
    "tokenizer changed": lambda d: d["tokenizer"].update(sha256="0" * 64),
    "eos out of range": lambda d: d["tokenizer"].update(eos=[10**6]),
    "shape": lambda d: d["tensors"][Q].update(shape=[64, 65]),
    "shape negative": lambda d: d["tensors"][Q].update(shape=[-64, -64]),
    "shape 0": lambda d: d["tensors"][Q].update(shape=[0, 64]),
    "shape huge": lambda d: d["tensors"][Q].update(shape=[2**52, 2**52]),
    "shape of floats": lambda d: d["tensors"][Q].update(shape=[64.0, 64.0]),
    "shape of three": lambda d: d["tensors"][Q].update(shape=[64, 8, 8]),
    "dtype": lambda d: d["tensors"][Q].update(dtype="i4"),
    "dtype f32": lambda d: d["tensors"][Q].update(dtype="f32"),
    "dtype unknown": lambda d: d["tensors"][Q].update(dtype="i2"),
    "storage": lambda d: d["tensors"][Q].update(storage="dense"),
    "group": lambda d: d["tensors"][Q].update(group=32),
    "group negative": lambda d: d["tensors"][Q].update(group=-1),
    "group wide": lambda d: d["tensors"][Q].update(group=128),
    "nonzeros": lambda d: d["tensors"][Q].update(nonzeros=d["tensors"][Q]["nonzeros"] + 1),
    "nonzeros huge": lambda d: d["tensors"][Q].update(nonzeros=2**50),
    "activation gone": lambda d: d["tensors"][Q].update(activation=None),
    "activation static": lambda d: d["tensors"][Q].update(activation={"bits": 8, "dynamic": False}),
    "activation 8 bits of what": lambda d: d["tensors"][Q].update(activation={"bits": 8}),
    "activation 7 bits": lambda d: d["tensors"][Q]["activation"].update(bits=7),
    "kind": lambda d: d["tensors"][Q].update(kind="vector"),
    "kind unknown": lambda d: d["tensors"][Q].update(kind=["matrix"]),
    "part missing": lambda d: d["tensors"][Q]["parts"].pop("scales"),
    "part unknown": lambda d: d["tensors"][Q]["parts"].update(more={"sha256": ""}),
    "hash": lambda d: d["tensors"][NORM]["parts"]["values"].update(sha256="0" * 64),
    "tensor missing": lambda d: d["tensors"].pop(Q),
    "tensor unused": lambda d: d["tensors"].update(spare=d["tensors"][NORM]),
    "op unknown": lambda d: d["ops"][1].update(op="conv"),
    "op renamed": lambda d: d["ops"][1].update(op="linear"),
    "norm kind": lambda d: d["ops"][1].update(kind="batch"),
    "eps negative": lambda d: d["ops"][1].update(eps=-1e-5),
    "eps text": lambda d: d["ops"][1].update(eps="1e-5"),
    "eps infinite": lambda d: d["ops"][1].update(eps=float("inf")),
    "norm of another width": lambda d: d["ops"][1].update(weight="rope.inv_freq"),
    "norm of a matrix": lambda d: d["ops"][1].update(weight=Q),
    "norm bias": lambda d: d["ops"][1].update(bias="nothing"),
    "weight is a vector": lambda d: d["ops"][2].update(weight=NORM),
    "input unknown": lambda d: d["ops"][2].update({"in": "nowhere"}),
    "input later": lambda d: d["ops"][2].update({"in": "logits"}),
    "written twice": lambda d: d["ops"][2].update(out="h0"),
    "widths differ": lambda d: d["ops"][9].update(a="0.k"),
    "rope heads": lambda d: d["ops"][5].update(heads=3),
    "rope heads 0": lambda d: d["ops"][5].update(heads=0, head_dim=0),
    "rope heads negative": lambda d: d["ops"][5].update(heads=-4, head_dim=-16),
    "rope too long": lambda d: d["ops"][5].update(heads=32, head_dim=2),
    "rope style": lambda d: d["ops"][5].update(style="spiral"),
    "rope frequencies": lambda d: d["ops"][5].update(inv_freq=NORM),
    "kv heads": lambda d: d["ops"][7].update(kv_heads=3),
    "kv heads 0": lambda d: d["ops"][7].update(kv_heads=0),
    "heads swapped": lambda d: d["ops"][7].update(heads=2, kv_heads=4),
    "cache taken": lambda d: d["ops"][7].update(cache=1),
    "cache negative": lambda d: d["ops"][7].update(cache=-1),
    "cache out of range": lambda d: d["ops"][7].update(cache=2),
    "scale missing": lambda d: d["ops"][7].pop("scale"),
    "gate kind": lambda d: d["ops"][13].update(kind="swiglu"),
    "embedding of integers": lambda d: d["ops"][0].update(weight=Q),
    "head first": lambda d: d["ops"].insert(0, d["ops"].pop()),
    "head missing": lambda d: d["ops"].pop(),
    "two heads": lambda d: d["ops"].append({**d["ops"][-1], "out": "again"}),
    "head of another size": lambda d: d["ops"][-1].update(weight=Q),
    "order": lambda d: d["ops"].reverse(),
}


@pytest.mark.parametrize("change", DOCUMENT_CHANGES)
def test_wrong_document_with_right_checksum_is_refused(folder: Folder, change: str) -> None:
    document = folder.document()
    DOCUMENT_CHANGES[change](document)
    folder.write(document)
    with pytest.raises(GraphError):
        read_graph(folder.path)


def _set(name: str, index: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


ARRAY_CHANGES: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "a mask bit": lambda a: _set(f"{Q}/mask", (0, 0), a[f"{Q}/mask"][0, 0] ^ 1)(a),
    "an infinite scale": _set(f"{Q}/scales", 3, np.inf),
    "a scale that is no number": _set(f"{Q}/scales", 3, np.nan),
    "an infinite norm": _set(f"{NORM}/values", 3, np.inf),
    "a value too many": lambda a: a.update({f"{Q}/values": np.append(a[f"{Q}/values"], 1)}),
    "a value too few": lambda a: a.update({f"{Q}/values": a[f"{Q}/values"][1:]}),
    "scales of float64": lambda a: a.update({f"{Q}/scales": a[f"{Q}/scales"].astype(float)}),
    "scales transposed": lambda a: a.update({f"{Q}/scales": a[f"{Q}/scales"].T}),
    "unsigned values": lambda a: a.update({f"{Q}/values": a[f"{Q}/values"].view(np.uint8)}),
    "a tensor more": lambda a: a.update({"more/values": np.ones(3, np.float32)}),
    "a part missing": lambda a: a.pop(f"{Q}/mask"),
}


@pytest.mark.parametrize("change", ARRAY_CHANGES)
def test_wrong_data_with_right_hashes_are_refused(folder: Folder, change: str) -> None:
    arrays = folder.arrays()
    ARRAY_CHANGES[change](arrays)
    folder.write(folder.document(), arrays)
    with pytest.raises(GraphError):
        read_graph(folder.path)


@pytest.mark.parametrize(
    ("scheme", "part", "value"),
    [
        ("w8a8-static", "input_scale", np.array([-1.0], np.float32)),
        ("w8a8-static", "input_scale", np.array([np.nan], np.float32)),
        ("w8a8-static", "input_zero_point", np.array([300], np.int32)),
    ],
)
def test_wrong_static_inputs_are_refused(
    quantized: Callable[..., Path], scheme: str, part: str, value: np.ndarray
) -> None:
    folder = Folder(export(quantized(scheme)))
    folder.write(folder.document(), {**folder.arrays(), f"{Q}/{part}": value})
    with pytest.raises(GraphError):
        read_graph(folder.path)


def test_int4_values_must_be_as_long_as_their_mask_says(quantized: Callable[..., Path]) -> None:
    folder = Folder(export(quantized("w4a16-g32-sparse")))
    arrays = folder.arrays()
    arrays[f"{Q}/values"] = np.append(arrays[f"{Q}/values"], np.uint8(0))
    folder.write(folder.document(), arrays)
    with pytest.raises(GraphError, match="do not fit the mask"):
        read_graph(folder.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a Paring graph"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"format": "paring.graph", "format": "paring.graph"}', "twice"),
        (b'{"format": "paring.graph", "version": NaN}', "NaN"),
        (rb'{"format": "\ud800"}', "surrogates not allowed"),
        (rb'{"\udfff": 1}', "surrogates not allowed"),
        (b'{"format": "paring.graph", "version": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_json(folder: Folder, text: bytes, message: str) -> None:
    folder.write_bytes(graph=text)
    with pytest.raises(GraphError, match=message):
        read_graph(folder.path)


def test_messages_say_where_and_what_to_do(folder: Folder) -> None:
    document = folder.document()
    document["ops"][7]["heads"] = "four"
    folder.write(document)
    with pytest.raises(GraphError) as caught:
        read_graph(folder.path)
    for part in ("graph.json", "ops[7].heads", "'four'", "export"):
        assert part in str(caught.value)


def test_a_failed_write_leaves_the_old_graph(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, before = folder.path.parent, sorted(os.listdir(folder.path.parent))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("_write_synced", "_publish"):
        monkeypatch.setattr(graph_writer, broken, full)
        with pytest.raises(GraphError, match="No space left"):
            export(parent, head="f16")
        monkeypatch.undo()
        assert sorted(os.listdir(parent)) == before
        read_graph(parent)

    with pytest.raises(KeyboardInterrupt), GraphWriter(folder.path) as writer:
        writer.vector("v", np.ones(3))
        raise KeyboardInterrupt
    assert sorted(os.listdir(parent)) == before
    read_graph(parent)

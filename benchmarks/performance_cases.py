"""What `performance.py` measures: models, systems, and the ratios that each case of Paring is judged by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

OURS = "paring"  # a peer by this name is Paring itself


@dataclass(frozen=True)
class Shape:
    """A model: generated with random weights, or the folder given by `--model` if there are no `sizes`."""

    name: str
    prompt: int = 128
    tokens: int = 128
    prefill: tuple[int, ...] = (128, 512)
    layers: int = 0
    sizes: dict[str, int] = field(default_factory=dict, hash=False)
    note: str = ""

    @property
    def folder(self) -> str:
        """Its name in the work folder."""
        return self.name.lower().replace(" ", "-").replace(",", "")


SMALL = Shape("SmolLM2-135M-Instruct", note="Real weights; 128 tokens after a prompt of 128.")
LARGE = Shape(
    "1.1B",
    tokens=64,
    prefill=(128,),
    layers=22,
    sizes={"hidden_size": 2048},
    note="TinyLlama's shapes, random weights; 64 tokens after a prompt of 128.",
)
LAYERS = Shape(
    "7B, two layers",
    prompt=16,
    tokens=64,
    prefill=(128,),
    layers=2,
    sizes={
        "vocab_size": 1024,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_key_value_heads": 32,
    },
    note="Two decoder layers of Llama 7B's shapes and a vocabulary of 1,024, so that nearly all time goes into "
    "matrices of 4096 x 4096 and 4096 x 11008; random weights; 64 tokens after a prompt of 16.",
)


@dataclass(frozen=True)
class Case:
    """One system on one model. `goals`: peers it is compared with, and the ratio wanted (None: none is)."""

    part: str
    shape: Shape
    name: str
    peer: str
    variant: str
    goals: tuple[tuple[str, float | None], ...] = ()
    prompt: int | None = None

    @property
    def script(self) -> str:
        """In `benchmarks/peers/`."""
        return f"{self.peer}_decode.py"

    def key(self, threads: int, turn: int) -> tuple[Any, ...]:
        """What a line of the results is known by."""
        return (self.part, self.shape.name, self.name, self.length, threads, turn)

    @property
    def length(self) -> int:
        return self.shape.prompt if self.prompt is None else self.prompt


PEERS = {
    "torch FP32": ("torch", "fp32"),
    "torch BF16": ("torch", "bf16"),
    "llama.cpp F32": ("llamacpp", "F32"),
    "llama.cpp Q8_0": ("llamacpp", "Q8_0"),
    "llama.cpp Q4_0": ("llamacpp", "Q4_0"),
    "llama.cpp Q4_K_M": ("llamacpp", "Q4_K_M"),
    "CTranslate2 int8": ("ctranslate2", "int8"),
    "OpenVINO FP32": ("openvino", "fp32"),
    "OpenVINO int8": ("openvino", "int8"),
    "OpenVINO int4": ("openvino", "int4"),
    "ONNX Runtime dynamic int8": ("onnxruntime", "dynamic-int8"),
    "ONNX Runtime int4": ("onnxruntime", "int4"),
    "DeepSparse FP32": ("deepsparse", "fp32"),
    "DeepSparse int8": ("deepsparse", "int8"),
    **{f"DeepSparse int8, {s} % sparse": ("deepsparse", f"int8-{s}") for s in (70, 80, 90)},
}
Q8, Q4 = "llama.cpp Q8_0", "llama.cpp Q4_0"


def sparse(percent: int) -> str:
    return f"DeepSparse int8, {percent} % sparse"


# Name, variant of peers/paring_decode.py, and goals on the small model.
PARING: dict[str, tuple[str, tuple[tuple[str, float | None], ...]]] = {
    "dense fp32": ("fp32", (("torch FP32", None), ("llama.cpp F32", None))),
    "dense int8": ("unstructured@0/int8", ((Q8, 1.9), ("DeepSparse int8", None))),
    "dense int4": ("unstructured@0/int4", ((Q4, 2.2),)),
    "60 % int8": ("unstructured@0.6/int8", ((Q8, 2.6), (sparse(70), 2.2))),
    "70 % int8": ("unstructured@0.7/int8", ((Q8, None), (sparse(70), None))),
    "80 % int8": ("unstructured@0.8/int8", ((Q8, None), (sparse(80), None))),
    "90 % int8": ("unstructured@0.9/int8", ((Q8, None), (sparse(90), None))),
    "2:4 int8": ("2:4@0.5/int8", ((Q8, None),)),
    "8:16 int8": ("8:16@0.5/int8", ((Q8, 2.7),)),
    "2:4 int4": ("2:4@0.5/int4", ((Q4, 2.8),)),
    "8:16 int4": ("8:16@0.5/int4", ((Q4, 2.7),)),
    "4:16 int4": ("4:16@0.75/int4", ((Q4, 3.3),)),
    "1x4 70 % int4": ("1x4@0.7/int4", ((Q4, 3.6),)),
}
HEAD = ", int4 head"  # after the name of an int4 system; else the logits matrix is int8
PARING |= {
    name + HEAD: (variant + "/int4", goals)
    for name, (variant, goals) in PARING.items()
    if variant.endswith("/int4")
}
CACHE = ", int8 cache"  # after the name of any; else keys and values are kept in float16
PARING |= {
    name + CACHE: (PARING[name][0] + "+int8", PARING[name][1])
    for name in (
        "dense int8",
        "60 % int8",
        "8:16 int8",
        *(f"{pattern} int4{HEAD}" for pattern in ("2:4", "8:16", "4:16", "1x4 70 %")),
    )
}


def systems(
    shape: Shape,
    ours: Iterable[str],
    peers: Iterable[str],
    goals: dict[str, tuple[tuple[str, float | None], ...]] | None = None,
) -> Iterator[Case]:
    for name in ours:
        variant, usual = PARING[name]
        wanted = usual if goals is None else goals.get(name, ())
        yield Case("systems", shape, "Paring " + name, OURS, variant, wanted)
    for name in peers:
        yield Case("systems", shape, name, *PEERS[name])


SYSTEMS = [
    *systems(
        SMALL,
        [name for name in PARING if not name.startswith(("80", "90"))],
        [name for name in PEERS if name not in (sparse(80), sparse(90))],
    ),
    *systems(
        LARGE,
        [
            *("dense fp32", "dense int8", "dense int4", "70 % int8", "4:16 int4", "1x4 70 % int4"),
            *("4:16 int4" + HEAD, "1x4 70 % int4" + HEAD),
        ],
        ["torch FP32", Q8, Q4, "DeepSparse int8", sparse(70)],
        {
            "dense fp32": (("torch FP32", None),),
            "dense int8": ((Q8, None), ("DeepSparse int8", None)),
            "dense int4": ((Q4, None),),
            **dict.fromkeys(("4:16 int4", "4:16 int4" + HEAD), ((Q4, 2.7),)),
            "70 % int8": ((sparse(70), 1.15),),
            **dict.fromkeys(("1x4 70 % int4", "1x4 70 % int4" + HEAD), ((Q4, None),)),
        },
    ),
    *systems(
        LAYERS,
        [
            name
            for name in PARING
            if name not in ("dense fp32", "60 % int8") and HEAD not in name and CACHE not in name
        ],
        [Q8, Q4, "DeepSparse int8", sparse(70), sparse(80), sparse(90)],
        {
            "dense int8": ((Q8, None), ("DeepSparse int8", None)),
            "dense int4": ((Q4, None),),
            **{f"{s} % int8": ((sparse(s), 1.1),) for s in (70, 80, 90)},
            **dict.fromkeys(("2:4 int8", "8:16 int8"), ((Q8, None),)),
            **dict.fromkeys(("2:4 int4", "8:16 int4", "4:16 int4", "1x4 70 % int4"), ((Q4, None),)),
        },
    ),
]

# How cost grows.
SPARSITIES = (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
GROWING = (("unstructured", "int8"), ("unstructured", "int4"), ("1x4", "int8"), ("1x4", "int4"))
SHORT = Shape(SMALL.name, prompt=16, tokens=64, prefill=())
SPARSITY = [
    *(
        Case("sparsity", SHORT, f"{pattern}@{s:g}/{dtype}", OURS, f"{pattern}@{s:g}/{dtype}")
        for pattern, dtype in GROWING
        for s in SPARSITIES
    ),
    *(Case("sparsity", SHORT, name, *PEERS[name]) for name in (Q8, Q4)),
]
# Those of the largest leave room for the tokens in a context of 8192.
CONTEXTS = (1, 512, 2048, 8120)
CONTEXT = [
    Case("context", SHORT, name, peer, variant, prompt=length)
    for name, peer, variant in (
        *(
            (f"Paring {name}{title}", OURS, PARING[name][0] + cache)
            for name in ("dense int8", "8:16 int8", "4:16 int4")
            for title, cache in (("", ""), (CACHE, "+int8"))
        ),
        *((name, *PEERS[name]) for name in (Q8, Q4)),
    )
    for length in CONTEXTS
]
SEQUENCES = (1, 2, 4, 8, 16, 32)
BATCHED = ("dense int8", "8:16 int8", "4:16 int4", "dense fp32")
BATCH = [
    Case("batch", SHORT, f"Paring {name} *{n}", OURS, f"{PARING[name][0]}*{n}")
    for name in BATCHED
    for n in SEQUENCES
]
PARTS = {"systems": SYSTEMS, "sparsity": SPARSITY, "context": CONTEXT, "batch": BATCH}

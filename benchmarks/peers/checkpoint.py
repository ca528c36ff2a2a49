"""A Hugging Face folder of a Llama, read with numpy only: the peers' interpreters have little in common."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Llama:
    """Sizes of the model and where its tensors are."""

    folder: Path
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    theta: float
    epsilon: float
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> Llama:
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_parameters") or config
        return cls(
            folder=folder,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            vocabulary=config["vocab_size"],
            context=config["max_position_embeddings"],
            theta=rope.get("rope_theta", 10000.0),
            epsilon=config["rms_norm_eps"],
            tied=config["tie_word_embeddings"],
        )

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def head_name(self) -> str:
        """Of the matrix that gives the logits."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor by name: float32, or bfloat16 as uint16, mapped from the files."""
        found = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            data = np.memmap(file, np.uint8, "r", offset=8 + size)
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    dtype = {"F32": np.float32, "BF16": np.uint16}[entry["dtype"]]
                    found[name] = data[begin:end].view(dtype).reshape(entry["shape"])
        return found

    def angles(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the rotary embedding, float32 [count, head_size / 2]."""
        inverse = self.theta ** (-np.arange(0, self.head_size, 2) / self.head_size)
        angle = np.arange(first, first + count)[:, None] * inverse
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def float32(tensor: np.ndarray) -> np.ndarray:
    """A tensor of `Llama.tensors` as float32."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return np.array(tensor)


def keep_largest(weight: np.ndarray, sparsity: float) -> np.ndarray:
    """`weight` with its smallest magnitudes set to 0."""
    if sparsity == 0:
        return weight
    size = np.abs(weight)
    limit = np.quantile(size.ravel()[:: max(size.size // 100_000, 1)], sparsity)
    return np.where(size < limit, np.float32(0), weight)


def quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 [n, k] and the scale of each row, float32 [n]."""
    scales = np.maximum(np.abs(weight).max(axis=1), 1e-8) / 127
    return np.rint(weight / scales[:, None]).astype(np.int8), scales.astype(np.float32)

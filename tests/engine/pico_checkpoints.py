"""Pico checkpoints made on the spot: each function writes a Hugging Face folder and returns it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 320
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_llama(folder: Path, seed: int = 0, tokenizer: bool = True, **changes: Any) -> Path:
    """A float32 Llama of 2 layers; weights are wide enough that attention and gates are not flat."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if tokenizer:
        letters = {chr(i): i for i in range(256)}
        written = Tokenizer(models.BPE(vocab=letters, merges=[]))
        written.pre_tokenizer = pre_tokenizers.ByteLevel()
        written.save(str(folder / "tokenizer.json"))
    return folder


def quantize(
    folder: Path, bits: int, group: int = 0, inputs: str | None = "token", sparsity: float = 0.0
) -> Path:
    """Rewrite a float folder as compressed-tensors by hand: all projections, symmetric.

    inputs: "token" (dynamic int8), "tensor" (static int8 with a zero point) or None (weight-only, packed).
    With `sparsity`, random weights are dropped first and their mask is saved.
    """
    tensors, masks = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(bits)
    for name in [
        name for name in tensors if name.split(".")[-2] in PROJECTIONS and name.endswith("weight")
    ]:
        weight = tensors.pop(name)
        mask = torch.rand(weight.shape, generator=generator) >= sparsity
        grouped = (weight * mask).unflatten(1, (-1, group or weight.shape[1]))
        scale = grouped.abs().amax(-1).clamp(min=1e-8) / (2**bits - 1) * 2
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        values = (grouped / scale[..., None]).round().clamp(low, high).to(torch.int8).flatten(1)
        tensors[f"{name}_scale"] = scale
        if sparsity:
            masks[name] = np.packbits(mask.numpy(), axis=1, bitorder="little")
        if inputs is None:
            tensors[f"{name}_packed"] = pack_to_int32(values, bits).contiguous()
            tensors[f"{name}_shape"] = torch.tensor(values.shape)
        else:
            tensors[name] = values
        if inputs == "tensor":
            module = name.removesuffix(".weight")
            tensors[f"{module}.input_scale"] = torch.tensor([0.05])
            tensors[f"{module}.input_zero_point"] = torch.tensor([7], dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if masks:
        np.savez(folder / "pruning_masks.npz", **masks)
    packed = "pack-quantized" if inputs is None else "int-quantized"
    scheme = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if group else "channel",
            "group_size": group or None,
        },
        "input_activations": inputs
        and {
            "num_bits": 8,
            "type": "int",
            "symmetric": inputs == "token",
            "strategy": inputs,
            "dynamic": inputs == "token",
        },
        "format": packed,
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": packed,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {"bits": 8},
    "w8a8-sparse": {"bits": 8, "sparsity": 0.6},
    "w8a8-static": {"bits": 8, "inputs": "tensor"},
    "w8a16": {"bits": 8, "inputs": None},
    "w4a16-g32": {"bits": 4, "group": 32, "inputs": None},
    "w4a16-g32-sparse": {"bits": 4, "group": 32, "inputs": None, "sparsity": 0.6},
}

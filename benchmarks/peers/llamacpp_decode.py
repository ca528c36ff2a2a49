"""llama.cpp through llama-cpp-python's own bindings; `protocol.py` says what is asked of this script.

The GGUF files are made from the float32 weights by llama.cpp's quantizer, without an importance matrix.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from checkpoint import Llama, float32
from protocol import Stepwise, made_once, main

FILE_TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_file(options: argparse.Namespace, variant: str) -> Path:
    return options.work / f"llamacpp-{variant}" / "model.gguf"


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of the Hugging Face folder."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in llama.cpp's order: rotated pairs side by side."""
    n, k = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def write_float(model: Llama, file: Path) -> None:
    """The model as an F32 GGUF without a tokenizer."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_rope_freq_base(model.theta)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_vocab_size(model.vocabulary)
    writer.add_file_type(FILE_TYPES["F32"])
    writer.add_tokenizer_model("none")
    for name, tensor in model.tensors().items():
        if name == "lm_head.weight" and model.tied:
            continue
        values = float32(tensor)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, model.heads if "q_proj" in name else model.kv_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(options: argparse.Namespace) -> None:
    source = gguf_file(options, "F32")
    with made_once(source.parent) as part:
        if part is not None:
            write_float(Llama.read(options.model), part / source.name)
    target = gguf_file(options, options.variant)
    with made_once(target.parent) as part:
        if part is not None:
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = FILE_TYPES[options.variant]
            to = str(part / target.name).encode()
            if llama_cpp.llama_model_quantize(str(source).encode(), to, settings):
                raise RuntimeError(f"llama.cpp could not quantize {source} to {options.variant}")


class LlamaCpp(Stepwise):
    def __init__(self, options: argparse.Namespace) -> None:
        file = gguf_file(options, options.variant)
        model = Llama.read(options.model)
        self.version = llama_cpp.__version__
        self.vocabulary = model.vocabulary
        spared = () if model.tied else ("token_embd.weight",)
        tensors = gguf.GGUFReader(file).tensors
        self.bytes_per_token = sum(int(t.n_bytes) for t in tensors if t.name not in spared)
        longest = max(options.prompt + options.tokens, *options.prefill, 0)
        self.llama = llama_cpp.Llama(
            str(file),
            n_ctx=-(-(longest + 8) // 256) * 256,
            n_batch=512,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
        )
        self.context = self.llama.ctx

    def start(self, prompt: list[int]) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        for begin in range(0, len(prompt), 512):
            self._decode(prompt[begin : begin + 512])
        return self._likeliest()

    def step(self, token: int) -> int:
        self._decode([token])
        return self._likeliest()

    def _decode(self, tokens: list[int]) -> None:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(
            self.context, llama_cpp.llama_batch_get_one(ids, len(tokens))
        )
        if status:
            raise RuntimeError(f"llama_decode answered {status}")

    def _likeliest(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


if __name__ == "__main__":
    main(tuple(FILE_TYPES), prepare, LlamaCpp)

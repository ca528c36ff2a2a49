"""Everything a model can be named by."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from paring.errors import ModelError, ZooError
from paring.pipeline.models import load_model, model_fingerprint, resolve_model

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(file: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model as llama.cpp stores it: q and k rows of each head interleaved for its rotary style."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    merges = tokenizer.backend_tokenizer.to_str()
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        values = tensor.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for part, count in heads.items():
            if f".{part}." in name:
                rows, columns = values.shape
                halves = values.reshape(count, 2, rows // count // 2, columns)
                values = halves.swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(name, values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_folder_once(
    pico: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PARING_CACHE", str(tmp_path / "cache"))
    bars = logging.is_progress_bar_enabled(), vars(tqdm)["__init__"]
    expected, _ = load_model(pico)
    write_gguf(tmp_path / "pico.gguf", expected, tokenizer)
    capfd.readouterr()
    model, words = load_model(tmp_path / "pico.gguf")
    assert capfd.readouterr() == ("", "")  # no bars of the libraries: progress is ours to tell
    assert bars == (logging.is_progress_bar_enabled(), vars(tqdm)["__init__"])
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
    assert words("the old oak")["input_ids"][-3:] == tokenizer("the old oak")["input_ids"][-3:]
    folder = resolve_model(tmp_path)  # a folder with one GGUF file in it
    assert isinstance(folder, Path)
    assert folder.is_relative_to(tmp_path / "cache")
    made = (folder / "config.json").stat().st_mtime_ns
    assert resolve_model(tmp_path / "pico.gguf") == folder
    assert (folder / "config.json").stat().st_mtime_ns == made


def test_a_folder_is_loaded_in_float32(pico: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(pico)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    again, _ = load_model(str(tmp_path / "half"))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert not again.training


def test_the_fingerprint_sees_weights_and_configuration(pico: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(pico)
    for name in ("same", "other"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        model.get_parameter("model.norm.weight").data[3] += 0.5
    prints = [model_fingerprint(place) for place in (pico, tmp_path / "same", tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


def test_what_names_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.gguf").touch()
    (tmp_path / "two" / "b.gguf").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "model.bin").touch()
    for place, message in (
        ("absent", "no such folder"),
        ("empty", "neither config.json nor a .gguf file"),
        ("two", "holds several GGUF files \\(a.gguf, b.gguf\\)"),
        ("broken", "can't load it"),
        ("model.bin", "not a folder and not a .gguf file"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / place)
    with pytest.raises(ZooError):
        load_model("zoo:smollm2-13b")

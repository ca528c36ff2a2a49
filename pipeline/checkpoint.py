"""The checkpoint on disk: a Hugging Face folder in compressed-tensors format, and the exact pruning masks.

`config.json` is what makes a folder a model, for `transformers` and for us; it is written last and removed first, so
that an unfinished folder is never taken for a whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import nn

from ..errors import ModelError
from .durable import remove, sync, sync_tree
from .tensor_stream import Planned, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..modifiers import Masks
    from ..modifiers.quantization.cache import CacheQuantization
    from ..modifiers.quantization.layer import LayerQuantization

WEIGHTS = "model.safetensors"
MASKS = "pruning_masks.npz"
CONFIG = "config.json"
CHECKED = 64  # tokens that a checkpoint is verified on


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quantization: Mapping[str, LayerQuantization],
    masks: Masks,
    caches: Mapping[str, CacheQuantization] | None = None,
) -> None:
    """Write model, tokenizer, quantization and masks into the existing, empty `folder`, `config.json` last.

    caches: of keys and values, by attention. The model's weights hold the dequantized values of every layer in
    `quantization`; stored are the integers.
    """
    tensors, first_names = _tensors(model, quantization)
    for name, cache in (caches or {}).items():
        tensors[f"{name}.k_scale"] = Planned.of(cache.key_scale.reshape(-1, 1, 1))
        tensors[f"{name}.v_scale"] = Planned.of(cache.value_scale.reshape(-1, 1, 1))
    write_tensors(folder / WEIGHTS, tensors)
    if len(masks):
        packed = {
            first_names.get(name, name): np.packbits(
                mask.to(torch.bool).cpu().numpy(), axis=1, bitorder="little"
            )
            for name, mask in masks.items()
        }
        np.savez(folder / MASKS, **packed)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    config = config_values(model)
    config["tie_word_embeddings"] = bool(first_names)
    if quantization or caches:
        config["quantization_config"] = quantization_config(model, quantization, bool(caches))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_values(model: PreTrainedModel) -> dict[str, Any]:
    """A model's config.json, defaults written out, so that readers without `transformers` need not know them."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(key, None)
    return config | {"architectures": [type(model).__name__], "dtype": "float32"}


def quantization_config(
    model: nn.Module, quantization: Mapping[str, LayerQuantization], cache: bool
) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per distinct scheme, every float Linear ignored.

    cache: whether keys and values are int8, with a scale per head.
    """
    groups: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    for name, layer in quantization.items():
        scheme = _scheme(layer)
        groups.setdefault(scheme.model_dump_json(), (scheme, []))[1].append(name)
    for scheme, names in groups.values():
        scheme.targets = ["Linear"] if len(groups) == 1 else names
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    formats = {scheme.format for scheme, _ in groups.values()}
    single = formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision
    config = QuantizationConfig(
        config_groups={f"group_{i}": scheme for i, (scheme, _) in enumerate(groups.values())},
        format=CompressionFormat(single).value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name in linear if name not in quantization],
        kv_cache_scheme=QuantizationArgs(num_bits=8, strategy="attn_head") if cache else None,
    )
    dump: dict[str, Any] = config.model_dump(mode="json")
    return dump


def read_masks(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks stored in a checkpoint `folder`, by parameter name, in the shapes of `model`'s parameters.

    Empty if there are none. Raises ModelError when they do not fit the model.
    """
    if not (folder / MASKS).is_file():
        return {}
    found = {}
    with np.load(folder / MASKS, allow_pickle=False) as stored:
        for name, packed in stored.items():
            shape = _shape(model, name)
            if shape is None or packed.shape != (shape[0], (shape[1] + 7) // 8):
                raise ModelError(
                    f"{folder / MASKS}: the mask of {name} does not fit the model; "
                    "the file belongs to another checkpoint"
                )
            bits = np.unpackbits(packed, axis=1, count=shape[1], bitorder="little")
            found[name] = torch.from_numpy(bits).to(torch.bool)
    return found


def _shape(model: nn.Module, name: str) -> tuple[int, int] | None:
    parameter = dict(model.named_parameters()).get(name)
    return (
        None
        if parameter is None or parameter.ndim != 2
        else (parameter.shape[0], parameter.shape[1])
    )


def verify_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    aside: AbstractContextManager[None] = nullcontext(),  # noqa: B008 - holds nothing
) -> float:
    """Load `folder` with `transformers` and compare logits with the model in memory on a few tokens.

    aside: entered once the model in memory has answered, so that the other may take its place there. Returns the
    largest absolute difference; raises ModelError when it exceeds 1e-3 of the largest logit.
    """
    from .models import load_model

    tokens = torch.arange(CHECKED)[None] % model.config.vocab_size
    with torch.inference_mode():
        expected = model.eval()(tokens.to(model.device)).logits.cpu()
    with aside:
        stored, _ = load_model(folder)
        with torch.inference_mode():
            difference = float((stored(tokens).logits - expected).abs().max())
        del stored
    if not difference <= 1e-3 * float(expected.abs().max()):
        raise ModelError(
            f"{folder}: the stored model's logits differ from those in memory by {difference:.3g}; "
            "the checkpoint is wrong, please report it with the recipe"
        )
    return difference


def publish(staged: Path, output: Path, previous: Iterable[str]) -> None:
    """Move the whole checkpoint in `staged` (same file system) into `output`; `config.json` goes first and comes last.

    `previous` names what an earlier run published there and is now removed. Whenever the machine stops, `output` has
    no `config.json` or is complete.
    """
    sync_tree(staged)
    names = sorted((path.name for path in staged.iterdir()), key=lambda name: name == CONFIG)
    for name in sorted({*previous, *names}, key=lambda name: name != CONFIG):
        remove(output / name)
    sync(output)
    for name in names:
        if name == CONFIG:
            sync(output)
        os.replace(staged / name, output / name)
    sync(output)
    staged.rmdir()


def _tensors(
    model: nn.Module, quantization: Mapping[str, LayerQuantization]
) -> tuple[dict[str, Planned], dict[str, str]]:
    """Everything that goes into the weight file, and the first names of what has another: of a head that is tied.

    A tied matrix is stored once, under its first name, unless the head alone is quantized.
    """
    names: dict[int, str] = {}
    found: dict[str, Planned] = {}
    first_names: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = name.removesuffix(".weight")
        if owner in quantization and name.endswith(".weight"):
            found.update(_compressed(owner, quantization[owner]))
        elif names.setdefault(id(tensor), name) == name:
            found[name] = Planned.of(tensor)
        else:
            first_names[name] = names[id(tensor)]
    return found, first_names


def _compressed(name: str, layer: LayerQuantization) -> dict[str, Planned]:
    found = {f"{name}.weight_scale": Planned.of(layer.scale.float())}
    rows, columns = layer.module.weight.shape
    if _format(layer) == CompressionFormat.pack_quantized:
        words = -(-columns * layer.weight_bits // 32)
        found[f"{name}.weight_packed"] = Planned(
            torch.int32,
            (rows, words),
            lambda: pack_to_int32(layer.quantized_weight.cpu(), layer.weight_bits),
        )
        found[f"{name}.weight_shape"] = Planned.of(torch.tensor([rows, columns]))
    else:
        found[f"{name}.weight"] = Planned(
            torch.int8, (rows, columns), lambda: layer.quantized_weight
        )
    if layer.input_scale is not None:
        found[f"{name}.input_scale"] = Planned.of(layer.input_scale.float().reshape(1))
    if layer.input_zero_point is not None:
        found[f"{name}.input_zero_point"] = Planned.of(
            layer.input_zero_point.to(torch.int8).reshape(1)
        )
    return found


def _format(layer: LayerQuantization) -> CompressionFormat:
    """Packed for int4 and for weight-only int8: what vLLM has kernels for; plain int8 when activations are int8 too."""
    if layer.weight_bits < 8 or layer.input_bits is None:
        return CompressionFormat.pack_quantized
    return CompressionFormat.int_quantized


def _scheme(layer: LayerQuantization) -> QuantizationScheme:
    grouped = layer.group_size > 0
    weights = QuantizationArgs(
        num_bits=layer.weight_bits,
        symmetric=True,
        strategy="group" if grouped else "channel",
        group_size=layer.group_size if grouped else None,
    )
    inputs = None
    if layer.input_bits is not None:
        inputs = QuantizationArgs(
            num_bits=layer.input_bits,
            symmetric=layer.input_dynamic or layer.input_zero_point is None,
            strategy="token" if layer.input_dynamic else "tensor",
            dynamic=layer.input_dynamic,
        )
    return QuantizationScheme(
        targets=[], weights=weights, input_activations=inputs, format=_format(layer)
    )

"""ONNX Runtime with its fused attention over a cache in place; `protocol.py` says what is asked of this script.

`dynamic-int8` is `quantize_dynamic` with a scale per column of a matrix; `int4` is MatMulNBits in blocks of 64 with
int8 inputs (accuracy level 4). The head is quantized like the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from checkpoint import Llama, float32
from onnx import TensorProto, helper
from onnx_llama import Builder
from protocol import Stepwise, made_once, main

VARIANTS = ("fp32", "dynamic-int8", "int4")


class Decoder:
    """Builds a graph that computes any number of tokens at the end of a cache."""

    def __init__(self, model: Llama) -> None:
        self.model, self.tensors, self.g = model, model.tensors(), Builder()
        self.inputs = [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, "n"]),
            helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total", TensorProto.INT32, [1]),
        ]
        self.outputs = [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, model.vocabulary])
        ]

    def build(self) -> onnx.ModelProto:
        g = self.g
        self.cos, self.sin = (
            g.constant(name, part)
            for name, part in zip(
                ("cos", "sin"), self.model.angles(0, self.model.context), strict=True
            )
        )
        table = g.constant("embedding", float32(self.tensors["model.embed_tokens.weight"]))
        x = g.op("Gather", table, "tokens")
        for layer in range(self.model.layers):
            prefix = f"model.layers.{layer}."
            h = self.norm(x, prefix + "input_layernorm.weight")
            x = g.op("Add", x, self.attention(h, layer, prefix + "self_attn."))
            h = self.norm(x, prefix + "post_attention_layernorm.weight")
            gate, up = (self.linear(h, f"{prefix}mlp.{part}_proj") for part in ("gate", "up"))
            gate = g.op("Mul", gate, g.op("Sigmoid", gate))
            x = g.op("Add", x, self.linear(g.op("Mul", gate, up), prefix + "mlp.down_proj"))
        x = g.op("Slice", x, g.ints(-1), g.ints(2**40), g.ints(1))
        head = g.constant("head", float32(self.tensors[self.model.head_name]).T)
        g.nodes.append(
            helper.make_node("MatMul", [self.norm(x, "model.norm.weight"), head], ["logits"])
        )
        graph = helper.make_graph(
            g.nodes, "llama", self.inputs, self.outputs, list(g.constants.values())
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def norm(self, x: str, name: str) -> str:
        weight = self.g.constant(name, float32(self.tensors[name]))
        return self.g.op(
            "SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=self.model.epsilon
        )

    def linear(self, x: str, name: str) -> str:
        weight = float32(self.tensors[name + ".weight"])
        return self.g.op("MatMul", x, self.g.constant(name, weight.T))

    def attention(self, x: str, layer: int, prefix: str) -> str:
        m, g = self.model, self.g
        q, k, v = (self.linear(x, f"{prefix}{part}_proj") for part in "qkv")
        shape = [1, m.kv_heads, "context", m.head_size]
        for kind in "kv":
            for side, values in (("past", self.inputs), ("present", self.outputs)):
                name = f"{side}_{kind}{layer}"
                values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        past = [f"past_{kind}{layer}" for kind in "kv"]
        mixed = f"mixed{layer}"
        g.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *past, "last", "total", self.cos, self.sin],
                [mixed, *(name.replace("past", "present") for name in past)],
                domain="com.microsoft",
                num_heads=m.heads,
                kv_num_heads=m.kv_heads,
                do_rotary=1,
            )
        )
        return self.linear(mixed, prefix + "o_proj")


def onnx_file(options: argparse.Namespace) -> Path:
    return options.work / f"onnxruntime-{options.variant}" / "model.onnx"


def prepare(options: argparse.Namespace) -> None:
    file = onnx_file(options)
    with made_once(file.parent) as part:
        if part is None:
            return
        model = Decoder(Llama.read(options.model)).build()
        if options.variant == "dynamic-int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                model,
                part / file.name,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul"],
                extra_options={"DefaultTensorType": TensorProto.FLOAT},
            )
            return
        if options.variant == "int4":
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            quantizer = MatMulNBitsQuantizer(
                model, block_size=64, is_symmetric=True, accuracy_level=4
            )
            quantizer.process()
            model = quantizer.model.model
        onnx.save(model, part / file.name)


class OnnxRuntime(Stepwise):
    def __init__(self, options: argparse.Namespace) -> None:
        file = onnx_file(options)
        self.model = Llama.read(options.model)
        self.version = onnxruntime.__version__
        self.vocabulary = self.model.vocabulary
        embedding = self.vocabulary * self.model.hidden * 4  # its own copy, of which rows are read
        self.bytes_per_token = file.stat().st_size - embedding
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = options.threads, 1
        self.session = onnxruntime.InferenceSession(
            str(file), settings, providers=["CPUExecutionProvider"]
        )
        longest = max(options.prompt + options.tokens, *options.prefill, 0) + 8
        shape = (1, self.model.kv_heads, longest, self.model.head_size)
        self.binding = self.session.io_binding()
        for layer in range(self.model.layers):
            for kind in "kv":
                # Past and present are one buffer, written in place.
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self.binding.bind_ortvalue_input(f"past_{kind}{layer}", cache)
                self.binding.bind_ortvalue_output(f"present_{kind}{layer}", cache)
        self.logits = np.empty((1, 1, self.vocabulary), np.float32)
        found = onnxruntime.OrtValue.ortvalue_from_numpy(self.logits)
        self.binding.bind_ortvalue_output("logits", found)
        self.found = found

    def start(self, prompt: list[int]) -> int:
        self.length = 0
        return self._forward(prompt)

    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, ids: list[int]) -> int:
        self.length += len(ids)
        self.binding.bind_cpu_input("tokens", np.array([ids], np.int64))
        self.binding.bind_cpu_input("last", np.array([self.length - 1], np.int32))
        self.binding.bind_cpu_input("total", np.array([self.length], np.int32))
        self.session.run_with_iobinding(self.binding)
        return int(self.found.numpy().argmax())


if __name__ == "__main__":
    main(VARIANTS, prepare, OnnxRuntime)

"""A Llama as an ONNX graph that computes one token beside a cache which the caller keeps.

Plain operators of opset 13, all shapes fixed, for engines that know no fused attention. Keys are cached after their
rotation, so the order of the cache's places means nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from checkpoint import LINEARS, Llama, float32, keep_largest, quantize_rows
from onnx import TensorProto, helper, numpy_helper

# Of the inputs of int8 matrices. Made up: the graph is for its speed alone.
INPUT_SCALE = 0.05


class Builder:
    """Nodes and constants of a graph, named as they come."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attributes) -> str:
        names = [f"{name or kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def float(self, value: float) -> str:
        return self.constant(f"float_{value}", np.float32(value))

    def linear(self, x: str, name: str, weight: np.ndarray, int8: bool) -> str:
        """x [1, 1, k] times weight [n, k] transposed; int8 with static inputs, a scale per row."""
        if not int8:
            return self.op("MatMul", x, self.constant(name, weight.T))
        q, scales = quantize_rows(weight)
        zero = self.constant("zero_u8", np.uint8(128))
        x = self.op("QuantizeLinear", x, self.float(INPUT_SCALE), zero)
        weights, none = self.constant(name, q.T), self.constant("zero_i8", np.int8(0))
        product = self.op("MatMulInteger", x, weights, zero, none)
        product = self.op("Cast", product, to=TensorProto.FLOAT)
        return self.op("Mul", product, self.constant(name + ".scales", scales * INPUT_SCALE))


class Decoder:
    """Builds the graph of a model."""

    def __init__(self, model: Llama, int8: bool, sparsity: float, past: int) -> None:
        self.model, self.int8, self.sparsity, self.past = model, int8, sparsity, past
        self.tensors = model.tensors()
        self.g = Builder()
        self.inputs = [helper.make_tensor_value_info("token", TensorProto.INT64, [1, 1])]
        for name in ("cos", "sin"):
            shape = [1, 1, 1, model.head_size // 2]
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.outputs: list[onnx.ValueInfoProto] = []

    def build(self) -> onnx.ModelProto:
        embedding = self.g.constant("embedding", float32(self.tensors["model.embed_tokens.weight"]))
        x = self.g.op("Gather", embedding, "token")
        for layer in range(self.model.layers):
            prefix = f"model.layers.{layer}."
            h = self.norm(x, prefix + "input_layernorm.weight")
            x = self.g.op("Add", x, self.attention(h, layer, prefix))
            h = self.norm(x, prefix + "post_attention_layernorm.weight")
            x = self.g.op("Add", x, self.mlp(h, prefix))
        x = self.norm(x, "model.norm.weight")
        head = float32(self.tensors[self.model.head_name])
        logits = self.g.linear(x, "head", head, self.int8)
        self.output(logits, "logits", [1, 1, self.model.vocabulary])
        graph = helper.make_graph(
            self.g.nodes, "llama", self.inputs, self.outputs, list(self.g.constants.values())
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)

    def output(self, value: str, name: str, shape: list[int]) -> None:
        self.g.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def norm(self, x: str, name: str) -> str:
        g = self.g
        mean = g.op("ReduceMean", g.op("Mul", x, x), axes=[-1], keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, g.float(self.model.epsilon)))
        return g.op("Mul", g.op("Div", x, root), g.constant(name, float32(self.tensors[name])))

    def linear(self, x: str, name: str) -> str:
        weight = keep_largest(float32(self.tensors[name + ".weight"]), self.sparsity)
        return self.g.linear(x, name, weight, self.int8)

    def heads(self, x: str, count: int) -> str:
        """[1, 1, count * size] -> [1, count, 1, size]."""
        return self.g.op("Reshape", x, self.g.ints(1, count, 1, self.model.head_size))

    def rotated(self, x: str) -> str:
        """Rotary embedding of [1, heads, 1, size]."""
        g, half = self.g, self.model.head_size // 2
        low = g.op("Slice", x, g.ints(0), g.ints(half), g.ints(3))
        high = g.op("Slice", x, g.ints(half), g.ints(2 * half), g.ints(3))
        first = g.op("Sub", g.op("Mul", low, "cos"), g.op("Mul", high, "sin"))
        second = g.op("Add", g.op("Mul", high, "cos"), g.op("Mul", low, "sin"))
        return g.op("Concat", first, second, axis=3)

    def attention(self, x: str, layer: int, prefix: str) -> str:
        g, m = self.g, self.model
        share, q_proj, k_proj, v_proj, o_proj = m.heads // m.kv_heads, *LINEARS[:4]
        q = self.rotated(self.heads(self.linear(x, prefix + q_proj), m.heads))
        k = self.rotated(self.heads(self.linear(x, prefix + k_proj), m.kv_heads))
        v = self.heads(self.linear(x, prefix + v_proj), m.kv_heads)
        k, v = (self.cached(new, f"{kind}{layer}") for new, kind in ((k, "k"), (v, "v")))
        # The queries that share a key are the rows of one small product.
        q = g.op("Reshape", q, g.ints(1, m.kv_heads, share, m.head_size))
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = g.op("Mul", scores, g.float(m.head_size**-0.5))
        mixed = g.op("MatMul", g.op("Softmax", scores, axis=3), v)
        mixed = g.op("Reshape", mixed, g.ints(1, 1, m.hidden))
        return self.linear(mixed, prefix + o_proj)

    def cached(self, new: str, name: str) -> str:
        """Beside what the caller kept; the new one is an output."""
        m = self.model
        shape = [1, m.kv_heads, self.past, m.head_size]
        self.inputs.append(helper.make_tensor_value_info("past_" + name, TensorProto.FLOAT, shape))
        self.output(new, "new_" + name, [1, m.kv_heads, 1, m.head_size])
        return self.g.op("Concat", "past_" + name, new, axis=2)

    def mlp(self, x: str, prefix: str) -> str:
        gate_proj, up_proj, down_proj = LINEARS[4:]
        gate, up = self.linear(x, prefix + gate_proj), self.linear(x, prefix + up_proj)
        gate = self.g.op("Mul", gate, self.g.op("Sigmoid", gate))
        return self.linear(self.g.op("Mul", gate, up), prefix + down_proj)


def write_decoder(model: Llama, int8: bool, sparsity: float, past: int, file: Path) -> None:
    """A model whose decoder Linears were pruned by magnitude; above 2 GB the weights lie beside it."""
    built = Decoder(model, int8, sparsity, past).build()
    large = sum(tensor.ByteSize() for tensor in built.graph.initializer) > 1.5e9
    onnx.save(built, str(file), save_as_external_data=large, location=file.name + ".data")

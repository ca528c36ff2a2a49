from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from paring.modifiers import Session
from paring.modifiers.pruning.admm import ADMMPruning
from paring.modifiers.pruning.sparsegpt import SparseGPT
from paring.modifiers.quantization.gptq import GPTQ
from paring.modifiers.quantization.layer import dequantize_weight
from paring.modifiers.quantization.quantization import Quantization

UP = "model.layers.0.mlp.up_proj"
SCHEMES = [("W8A8", True), ("W8A8", False), ("W8A16", True), ("W4A16", True), ("W4A8", True)]


def inputs_of(model, name, calibration):
    """What the Linear reads, [tokens, in]."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(calibration)
    handle.remove()
    return torch.cat(seen).flatten(0, 1)


@pytest.mark.parametrize(("scheme", "dynamic"), SCHEMES)
def test_the_first_linears_lose_less_of_their_output_than_by_rounding(
    pico, calibration, scheme, dynamic
):
    name = "model.layers.0.self_attn.q_proj"  # nothing before it has changed
    x = inputs_of(pico(), name, calibration)
    wanted = x @ pico().get_submodule(name).weight.T
    errors = {}
    for kind in (GPTQ, Quantization):
        model = pico()
        session = Session(model, [kind(scheme=scheme, dynamic=dynamic, group_size=16)])
        session.run_oneshot(calibration)
        layer = session.quantization[name]
        assert (layer.scheme, layer.group_size) == (scheme, 16)
        q = layer.quantized_weight
        assert torch.equal(dequantize_weight(q, layer.scale), layer.module.weight)
        with torch.no_grad():  # the hook rounds the input
            errors[kind] = float((model.get_submodule(name)(x) - wanted).square().sum())
    assert errors[GPTQ] < (0.75 if scheme == "W4A16" else 0.99) * errors[Quantization]


@pytest.mark.parametrize("pruner", [SparseGPT, ADMMPruning])
@pytest.mark.parametrize(("scheme", "dynamic"), SCHEMES)
def test_in_the_same_pass_every_pruned_weight_stays_zero(
    pico, calibration, pruner, scheme, dynamic
):
    model = pico()
    modifiers = [
        pruner(sparsity=0.5, ignore=["lm_head"]),
        GPTQ(scheme=scheme, dynamic=dynamic, group_size=16, ignore=["lm_head"]),
    ]
    session = Session(model, modifiers)
    labels = []
    session.run_oneshot(calibration, lambda label, *_: labels.append(label))
    assert set(labels) == {f"{pruner.key()} + GPTQ"}
    assert len(session.masks) == len(session.quantization) == 14
    for name, mask in session.masks.items():
        layer = session.quantization[name.removesuffix(".weight")]
        assert float((~mask).float().mean()) == pytest.approx(0.5, abs=1e-3)
        assert (layer.module.weight[~mask] == 0).all()
        assert (layer.quantized_weight[~mask] == 0).all()
        assert (layer.quantized_weight[mask] != 0).any()
    assert session.report["GPTQ"]["layers"] == {scheme: 14}
    assert set(session.report["GPTQ"]["errors"]) == set(session.quantization)


def test_a_huge_token_counts_as_one_of_median_length(pico, calibration, monkeypatch):
    grams = []
    original = GPTQ._problem
    monkeypatch.setattr(
        GPTQ, "_problem", lambda self, gram: grams.append(gram) or original(self, gram)
    )
    model = pico()
    huge = int(calibration[0, 0])
    for name in ("gate_proj", "up_proj"):  # a direction that only this token has much of
        weight = model.get_submodule(f"model.layers.0.mlp.{name}").weight
        weight.data[5] += 30 * model.model.embed_tokens.weight.detach()[huge]
    x = inputs_of(model, "model.layers.0.mlp.down_proj", calibration)
    lengths = x.norm(dim=1)
    Session(model, [GPTQ(scheme="W8A16")]).run_oneshot(calibration)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for part in torch.split(torch.arange(len(x)), 4 * 16):  # the batches of a pass
        median = lengths[part].median()
        for token in part:
            row = (x[token] * min(1.0, float(median / lengths[token]))).double()
            expected += torch.outer(row, row)
    assert float(lengths.max() / lengths.median()) > 5
    found = grams[3].matrix  # qkv, o, gate and up, down
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_activation_order_is_by_falling_diagonal_and_groups_stay(pico, calibration, monkeypatch):
    orders = []
    original = GPTQ._problem

    def watch(self, gram):
        problem = original(self, gram)
        orders.append((problem.order, gram.matrix.diagonal()))
        return problem

    monkeypatch.setattr(GPTQ, "_problem", watch)
    Session(pico(), [GPTQ(actorder=None)]).run_oneshot(calibration)
    assert all(order is None for order, _ in orders)
    orders.clear()
    Session(pico(), [GPTQ(actorder="static")]).run_oneshot(calibration)
    assert all((diagonal[order].diff() <= 0).all() for order, diagonal in orders)


def test_layers_of_different_schemes_may_share_an_input(pico, calibration):
    groups = {
        "low": {
            "targets": ["re:.*q_proj"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 16},
        },
        "high": {"targets": ["Linear"], "weights": {}, "input_activations": {}},
    }
    session = Session(pico(), [GPTQ(config_groups=groups)])
    session.run_oneshot(calibration)
    assert session.report["GPTQ"]["layers"] == {"W4A16": 2, "W8A8": 12}


def test_skip_leaves_layers_in_floating_point(pico, calibration):
    model = pico()
    session = Session(model, [GPTQ(skip={"by": "input_range", "top": 3})])
    session.run_oneshot(calibration)
    skipped = session.report["GPTQ"]["skipped"]
    assert len(skipped) == 3
    assert len(session.quantization) == 11
    assert not set(skipped) & set(session.quantization)


def test_groups_in_activation_order_are_refused():
    with pytest.raises(ValidationError, match="the engine does not run"):
        GPTQ(actorder="group")


@pytest.mark.parametrize("scheme", [{"scheme": "W8A8"}, {"scheme": "W4A8", "group_size": 32}])
def test_a_linear_whose_inputs_are_all_zero_stays_finite(pico, calibration, scheme):
    model = pico()
    model.get_parameter(f"{UP}.weight").data.zero_()
    Session(model, [GPTQ(**scheme, ignore=["lm_head"])]).run_oneshot(calibration)
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert weight.isfinite().all()
    assert weight.any()

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from paring.errors import DataError, ModelError
from paring.modifiers import Session
from paring.modifiers.quantization import head_gptq
from paring.modifiers.quantization.head_gptq import HeadGPTQ
from paring.modifiers.quantization.layer import dequantize_weight
from paring.modifiers.quantization.quantization import Quantization


def rounded(weight: torch.Tensor, size: int) -> torch.Tensor:
    groups = weight.reshape(len(weight), -1, size)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7.5
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def test_the_logits_err_less_than_by_rounding_and_the_embedding_stays(pico, calibration):
    model = pico()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        x = model.model(calibration).last_hidden_state.flatten(0, 1)
    session = Session(model, [HeadGPTQ(group_size=16)])
    session.run_oneshot(calibration)
    layer = session.quantization["lm_head"]
    assert (layer.scheme, layer.weight_bits, layer.group_size) == ("W4A16", 4, 16)
    assert torch.equal(model.model.embed_tokens.weight, weight)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(
        dequantize_weight(layer.quantized_weight.float(), layer.scale), model.lm_head.weight
    )
    lost = (x @ (model.lm_head.weight.detach() - weight).T).square().sum()
    assert lost < 0.8 * (x @ (rounded(weight, 16) - weight).T).square().sum()
    told = session.report["HeadGPTQ"]["errors"]["lm_head"]
    assert told == pytest.approx(float(lost / (x @ weight.T).square().sum()), rel=1e-3)


def test_it_is_calibrated_on_the_blocks_as_the_modifiers_before_left_them(pico, calibration):
    heads = []
    for before in ([], [Quantization(scheme="W4A8", group_size=16, ignore=["lm_head"])]):
        session = Session(pico(), [*before, HeadGPTQ(group_size=16)])
        session.run_oneshot(calibration)
        heads.append(session.quantization["lm_head"].quantized_weight)
    assert not torch.equal(*heads)


def test_a_large_matrix_is_solved_in_parts_with_the_same_result(pico, calibration, monkeypatch):
    def solve() -> torch.Tensor:
        session = Session(pico(), [HeadGPTQ(group_size=16)])
        session.run_oneshot(calibration)
        return session.quantization["lm_head"].quantized_weight

    whole = solve()
    monkeypatch.setattr(head_gptq, "ROWS", 50)
    assert torch.equal(solve(), whole)


def test_what_it_cannot_do_is_refused(pico, calibration):
    with pytest.raises(ValidationError, match="logits matrix alone; leave `targets` out"):
        HeadGPTQ(targets=["q_proj"])
    with pytest.raises(DataError, match="HeadGPTQ needs calibration data"):
        Session(pico(), [HeadGPTQ()]).run_oneshot()
    with pytest.raises(ModelError, match="group_size 64; .*32 fits"):
        Session(pico(), [HeadGPTQ()]).run_oneshot(calibration)
    twice = Session(pico(), [HeadGPTQ(group_size=16), HeadGPTQ(group_size=16)])
    with pytest.raises(ModelError, match="lm_head is quantized already"):
        twice.run_oneshot(calibration)

from __future__ import annotations

import pytest
import torch
from torch import nn

from paring.errors import ModelError
from paring.modifiers import Session
from paring.modifiers.quantization.cache import cache_argument, calibrate
from paring.modifiers.quantization.gptq import GPTQ
from paring.modifiers.quantization.quantization import Quantization


def stored(model, tokens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [batch, kv_heads, length, head_dim], as the model keeps them."""
    with torch.no_grad():
        output = model(tokens, use_cache=True)
        cache = output[cache_argument(model)]
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("kind", [Quantization, GPTQ])
def test_scales_are_the_largest_of_each_head_and_what_is_kept_is_on_the_grid(
    pico, calibration, kind
):
    model = pico()
    session = Session(model, [kind(kv_cache="int8")])
    session.run_oneshot(calibration)
    assert list(session.caches) == [f"model.layers.{i}.self_attn" for i in range(2)]
    for keys_and_values, cache in zip(
        stored(model, calibration), session.caches.values(), strict=True
    ):
        scales = (cache.key_scale, cache.value_scale)
        for x, scale in zip(keys_and_values, scales, strict=True):
            assert scale.shape == (2,)
            q = x / scale.reshape(1, 2, 1, 1)
            assert torch.allclose(q, q.round(), atol=1e-3)
            assert q.abs().amax() in (127, 128)
    for cache in session.caches.values():
        cache.detach()
    keys, values = stored(model, calibration)[0]
    first = session.caches["model.layers.0.self_attn"]
    assert torch.allclose(first.key_scale, keys.abs().amax(dim=(0, 2, 3)) / 127.5)
    assert torch.allclose(first.value_scale, values.abs().amax(dim=(0, 2, 3)) / 127.5)


def test_decoding_with_a_cache_computes_what_one_pass_does(pico, calibration):
    model = pico()
    session = Session(model, [Quantization(scheme="W8A16", kv_cache="int8")])
    session.run_oneshot(calibration)
    tokens = calibration[:1]
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        name, cache, steps = cache_argument(model), None, []
        for t in range(tokens.shape[1]):
            output = model(tokens[:, t : t + 1], **{name: cache}, use_cache=True)
            cache = output[name]
            steps.append(output.logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-4)


def test_a_killed_run_goes_on_with_its_caches(pico, calibration, tmp_path):
    whole = Session(pico(layers=3), [Quantization(kv_cache="int8")])
    whole.run_oneshot(calibration)

    def kill(label: str, done: int, total: int, note: str = "") -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Session(pico(layers=3), [Quantization(kv_cache="int8")]).run_oneshot(
            calibration, kill, tmp_path
        )
    resumed = Session(pico(layers=3), [Quantization(kv_cache="int8")])
    resumed.run_oneshot(calibration, None, tmp_path)
    assert resumed.caches.keys() == whole.caches.keys()
    for name, cache in whole.caches.items():
        assert torch.equal(resumed.caches[name].key_scale, cache.key_scale)
        assert torch.equal(resumed.caches[name].value_scale, cache.value_scale)
    with torch.no_grad():
        assert torch.equal(resumed.model(calibration).logits, whole.model(calibration).logits)


def test_the_next_stage_rounds_too(pico, calibration):
    model = pico()
    first = Session(model, [Quantization(kv_cache="int8")])
    first.run_oneshot(calibration)
    with torch.no_grad():
        expected = model(calibration).logits
        for cache in first.caches.values():
            cache.detach()
        assert not torch.equal(model(calibration).logits, expected)
        Session(model, [], quantization=first.quantization, caches=first.caches)
        assert torch.equal(model(calibration).logits, expected)


def test_gradients_pass_through_the_cache(pico, calibration):
    model = pico()
    session = Session(model, [Quantization(kv_cache="int8")])
    session.run_oneshot(calibration)
    model(calibration[:2]).logits.sum().backward()
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0


def test_where_there_is_no_cache_it_is_an_error(pico):
    class Block:
        name, module = "block", nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(ModelError, match="no attention"):
        calibrate(Block())
    with pytest.raises(ModelError, match="one-shot stage"):
        Session(pico(), [Quantization(kv_cache="int8")]).begin(1, 1)

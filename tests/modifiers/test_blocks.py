from __future__ import annotations

import pytest
import torch
from pydantic import PrivateAttr
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from paring.errors import DataError, LawError, ModelError, TargetError
from paring.modifiers import Modifier, Session, spill
from paring.modifiers.blocks import Block, Stream, capture, find_blocks


def qwen() -> nn.Module:
    """Every other block with a sliding window, so that blocks get different masks."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=128,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    )
    return Qwen3ForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=128)).eval()


@pytest.mark.parametrize("make", [None, qwen, gpt2])
def test_replaying_all_blocks_is_the_model(pico, calibration, make):
    model = pico() if make is None else make()
    stream = Stream(model, calibration)
    for index in range(len(stream.blocks)):
        inputs = stream.block(index).outputs()
    norm = model.transformer.ln_f if make is gpt2 else model.model.norm
    with torch.no_grad():
        logits = model.lm_head(norm(torch.cat(inputs)))
        expected = model(calibration).logits
    assert torch.allclose(logits, expected, atol=1e-5)


def test_capture_leaves_the_model_as_it_was(pico, calibration):
    model = pico()
    before = model(calibration).logits
    capture(model, calibration)
    assert torch.equal(model(calibration).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_are_not_taken_for_blocks():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(9))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

    assert [name for name, _ in find_blocks(Model())] == ["layers.0", "layers.1", "layers.2"]


def test_no_blocks_and_no_data_are_errors(pico):
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(DataError, match="token ids"):
        capture(pico(), torch.zeros(0, 4, dtype=torch.long))


def test_linears_that_share_an_input(pico, calibration):
    model = pico()
    block = Stream(model, calibration).block(0)
    groups = block.shared_inputs(block.linears(["Linear"]))
    assert [[n.rpartition(".")[2] for n in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_each_block_sees_the_compressed_blocks_before_it(pico, calibration):
    seen = []

    class _Halve(Modifier):
        def on_block(self, session: Session, block: Block) -> None:
            seen.append(torch.cat(block.inputs))
            for _, linear in block.linears(["down_proj"]).items():
                linear.weight.mul_(0.5)

    model = pico()
    Session(model, [_Halve()]).run_oneshot(calibration)
    with torch.no_grad():  # the model is compressed now: its hidden states are what the blocks got
        states = model(calibration, output_hidden_states=True).hidden_states
    assert torch.allclose(seen[1], states[1], atol=1e-6)


def test_modifiers_of_one_pass_see_each_other(pico, calibration):
    order = []

    class _First(Modifier):
        def on_block(self, session: Session, block: Block) -> None:
            order.append(("first", block.index))

    class _Second(Modifier):
        def on_block(self, session: Session, block: Block) -> None:
            order.append(("second", block.index))

    class _Ranking(Modifier):
        @property
        def needs_pass(self) -> bool:
            return True

        def on_observe(self, session: Session, block: Block) -> None:
            order.append(("observe", block.index))

        def on_block(self, session: Session, block: Block) -> None:
            order.append(("rank", block.index))

    class _Whole(Modifier):
        def on_update(self, session: Session) -> None:
            order.append(("whole", -1))

    mods = [_First(), _Second(), _Ranking(), _First(), _Whole()]
    Session(pico(), mods).run_oneshot(calibration)
    passes = [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    passes += [("observe", 0), ("observe", 1)]
    passes += [("rank", 0), ("first", 0), ("rank", 1), ("first", 1), ("whole", -1)]
    assert order == passes


def test_block_modifiers_need_data_and_layers_in_blocks(pico, calibration):
    class _Look(Modifier):
        def on_block(self, session: Session, block: Block) -> None:
            assert block.inputs

    with pytest.raises(DataError, match="_Look needs calibration data; give the stage `data:`"):
        Session(pico(), [_Look()]).run_oneshot()
    session = Session(pico(), [_Look()])
    session.run_oneshot(calibration)
    assert session.report["_Look"]["left_alone_outside_blocks"] == ["lm_head"]
    with pytest.raises(TargetError, match="only lm_head"):
        Session(pico(), [_Look(targets=["lm_head"])]).run_oneshot(calibration)


def test_a_replay_shows_inputs_and_ends_with_the_last_observer(pico, calibration):
    model = pico()
    block = Stream(model, calibration).block(0)
    name, module = block.name, block.module
    assert block.inputs  # the stream is there: what follows are replays
    seen, late = [], []
    handle = module.mlp.down_proj.register_forward_hook(lambda *_: late.append(1))
    block.run({f"{name}.mlp.gate_proj": seen.append, f"{name}.self_attn.q_proj": lambda x: None})
    assert late == []
    assert sum(len(x) for x in seen) == 12
    block.outputs()
    handle.remove()
    assert len(late) == len(block.inputs)
    wanted = []
    handle = module.mlp.register_forward_pre_hook(lambda _, args: wanted.append(args[0]))
    block.outputs()
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert not module.mlp.gate_proj._forward_pre_hooks


def test_nothing_is_replayed_when_nobody_looks(pico, calibration):
    class _Zero(Modifier):
        def on_block(self, session: Session, block: Block) -> None:
            for linear in block.linears(self.targets, self.ignore).values():
                linear.weight.zero_()

    model, forwards = pico(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    Session(model, [_Zero()]).run_oneshot()
    Session(model, [_Zero()]).run_oneshot(calibration)
    assert forwards == []
    assert not model.model.layers[1].mlp.up_proj.weight.any()


def test_blocks_are_asked_for_in_order(pico, calibration):
    stream = Stream(pico(), calibration)
    assert stream.block(1).inputs
    with pytest.raises(IndexError, match="at block 1 already"):
        _ = stream.block(0).inputs


class _Referring(Modifier):
    """Keeps the reference outputs it sees, then changes the block."""

    needs_reference = True

    _seen: list[torch.Tensor] = PrivateAttr(default_factory=list)

    def on_block(self, session: Session, block: Block) -> None:
        self._seen.append(torch.cat(block.reference_outputs()))
        for _, linear in block.linears(["up_proj"]).items():
            linear.weight.mul_(0.5)


def test_the_reference_stream_is_the_model_as_the_walk_found_it(pico, calibration):
    class _Before(Modifier):
        def on_block(self, session: Session, block: Block) -> None:
            for _, linear in block.linears(["down_proj"]).items():
                linear.weight.zero_()

    model = pico(layers=3)
    states = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *call: states.append(call[-1]))
    with torch.no_grad():
        model(calibration)
    expected, first, second = list(states), _Referring(), _Referring()
    Session(model, [_Before(), first, second]).run_oneshot(calibration)
    for modifier in (first, second):
        for seen, state in zip(modifier._seen, expected, strict=True):
            assert torch.allclose(seen, state, atol=1e-6)


def test_a_new_walk_has_a_new_reference(pico, calibration):
    class _Ranking(_Referring):
        @property
        def needs_pass(self) -> bool:
            return True

        def on_observe(self, session: Session, block: Block) -> None:
            assert len(block.inputs) == 3

    first, second = _Referring(), _Ranking()
    model = pico()
    Session(model, [first]).run_oneshot(calibration)
    with torch.no_grad():
        expected = model(calibration, output_hidden_states=True).hidden_states[1]
    model = pico()
    Session(model, [first, second]).run_oneshot(calibration)
    assert torch.allclose(second._seen[0], expected, atol=1e-6)
    assert not torch.allclose(second._seen[0], first._seen[0], atol=1e-4)


def test_a_reference_has_to_be_asked_for_and_needs_data(pico, calibration):
    class _Silent(_Referring):
        needs_reference = False

    with pytest.raises(LawError, match=r"_Silent\.on_block: .*without `needs_reference`"):
        Session(pico(), [_Silent()]).run_oneshot(calibration)
    with pytest.raises(DataError, match="_Referring needs calibration data"):
        Session(pico(), [_Referring()]).run_oneshot()


@pytest.mark.parametrize("make", [None, qwen, gpt2])
def test_a_block_computes_any_rows_of_a_batch(pico, calibration, make):
    model = pico() if make is None else make()
    block = Stream(model, calibration).block(1)
    whole = block.outputs()[0]
    hidden = block.inputs[0]
    with torch.no_grad():
        rows = block.compute(hidden[1:3], 0, slice(1, 3))
    assert torch.allclose(rows, whole[1:3], atol=1e-6)
    hidden = hidden.clone().requires_grad_()
    block.compute(hidden, 0).sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_hidden_states_over_the_threshold_live_in_a_file(pico, calibration, tmp_path, monkeypatch):
    results = []
    for threshold in spill.THRESHOLD, 2 * 12 * 16 * 32 * 4 - 1:
        monkeypatch.setattr(spill, "THRESHOLD", threshold)
        stream = Stream(pico(layers=3), calibration, reference=True, folder=tmp_path)
        seen = []
        for index in range(3):
            block = stream.block(index)
            stream.advance_reference(index)
            seen.append(torch.cat(block.reference_outputs()))
            block.module.mlp.down_proj.weight.data.zero_()
            seen.append(torch.cat(block.inputs))
        results.append(seen)
        assert [room.size for room in stream._spills] == ([] if len(results) == 1 else [24576] * 2)
        assert not list(tmp_path.iterdir())  # it has no name
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][1], results[0][3])

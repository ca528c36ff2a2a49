from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from paring.errors import DataError, ModelError
from paring.modifiers import Session
from paring.modifiers.distillation.attention import AttentionTransfer
from paring.modifiers.distillation.attention import divergence as attention_divergence
from paring.modifiers.distillation.cache import Distributions
from paring.modifiers.distillation.distillation import Distillation, divergence
from paring.modifiers.distillation.layers import layer_map
from paring.modifiers.distillation.squarehead import SquareHead, square_head
from paring.modifiers.training.task_loss import TaskLoss


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (2, 10), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_kl_is_the_formula_token_by_token():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, -100, 4, 5]])
    total, count = 0.0, 0
    for row in range(2):
        for position in range(4):
            if labels[row, position + 1] == -100:
                continue
            p = torch.softmax(teacher[row, position] / 2.0, dim=0)
            q = torch.softmax(student[row, position] / 2.0, dim=0)
            total += float((p * (p / q).log()).sum()) * 4.0
            count += 1
    assert float(divergence(student, teacher, labels, 2.0)) == pytest.approx(
        total / count, rel=1e-5
    )


def test_kl_on_some_parts_of_a_mixture_asks_the_teacher_about_those_rows_alone(pico):
    model, teacher = pico(0), pico(1)
    rows = []
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    data = batch() | {"parts": torch.tensor([0, 2])}
    with torch.no_grad():
        student, wanted = (
            net(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[1:]
            for net in (model, teacher)
        )
    rows.clear()
    expected = float(divergence(student, wanted, data["labels"][1:], 1.0))
    kinds = [Distillation(teacher="x", parts=[1, 2]), Distillation(teacher="x")]
    logs = first_loss(model, kinds, teacher, data)
    assert logs["loss/kl"] == pytest.approx(expected, rel=1e-4)
    assert logs["loss/kl#2"] != pytest.approx(expected, rel=1e-3)  # of both rows
    assert sorted(rows) == [1, 2]
    assert first_loss(model, [Distillation(teacher="x", parts=[1])], teacher, data)["loss/kl"] == 0
    assert sorted(rows) == [1, 2]
    with pytest.raises(ModelError, match="give `data` a mixture"):
        first_loss(model, kinds, teacher, batch())


def test_squarehead_is_the_formula_token_by_token():
    torch.manual_seed(0)
    student = tuple(torch.randn(2, 4, 3) for _ in range(3))
    teacher = tuple(torch.randn(2, 4, 3) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        error = norm = count = 0.0
        for row, position in mask.nonzero().tolist():
            error += float((s[row, position] - t[row, position]).square().sum())
            norm += float(t[row, position].square().sum())
            count += 3
        expected += (error / count) / (norm / count + 0.0078125)
    pairs = list(zip(student, teacher, strict=True))
    assert float(square_head(pairs, mask, 2.0**-7)) == pytest.approx(expected, rel=1e-5)


def test_squarehead_by_token_gives_a_huge_token_no_more_weight_than_the_others(pico):
    torch.manual_seed(0)
    s, t = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    places = mask.nonzero().tolist()
    t[0, 0] *= 1000
    expected = 0.0
    for row, position in places:
        error = float((s[row, position] - t[row, position]).square().mean())
        expected += error / (float(t[row, position].square().mean()) + 2.0**-7) / len(places)
    found = square_head([(s, t)], mask, 2.0**-7, "token")
    assert float(found) == pytest.approx(expected, rel=1e-5)
    s.requires_grad_()
    share = {}
    for normalize in ("layer", "token"):
        gradient = torch.autograd.grad(square_head([(s, t)], mask, 2.0**-7, normalize), s)[0]
        share[normalize] = float(gradient[0, 1].norm() / (s[0, 1] - t[0, 1]).detach().norm())
    assert share["token"] > 1e4 * share["layer"]
    logged = []
    for normalize in ("layer", "token"):
        session = run(pico, [SquareHead(teacher="dense", normalize=normalize)])[2]
        logged.append(session.take_logs()["loss/squarehead"])
    assert logged[0] != logged[1]


def run(pico, modifiers, forwards=None):
    model, teacher = pico(0), pico(1)
    if forwards is not None:
        teacher.register_forward_pre_hook(lambda *_: forwards.append(1))
    session = Session(model, modifiers, load_teacher=lambda reference: teacher)
    session.begin(1, 2)
    session.before_step()
    data = batch()
    outputs = model(**data)
    return model, teacher, session, data, outputs, session.loss(outputs.loss, data, outputs)


def test_losses_add_up_are_logged_and_share_one_teacher_forward(pico):
    forwards: list[int] = []
    modifiers = [Distillation(teacher="dense", weight=0.5), SquareHead(teacher="dense", weight=2.0)]
    model, teacher, session, data, outputs, loss = run(pico, modifiers, forwards)
    assert len(forwards) == 1
    logs = session.take_logs()
    total = logs["loss/task"] + 0.5 * logs["loss/kl"] + 2.0 * logs["loss/squarehead"]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    assert logs["loss/total"] == pytest.approx(total, rel=1e-5)
    assert session.take_logs() == {}
    with torch.no_grad():
        wanted = teacher(
            data["input_ids"], attention_mask=data["attention_mask"], output_hidden_states=True
        )
    assert len(outputs.hidden_states) == 3
    pairs = list(zip(outputs.hidden_states[1:], wanted.hidden_states[1:], strict=True))
    square = square_head(pairs, data["attention_mask"], 2.0**-7)
    assert logs["loss/squarehead"] == pytest.approx(float(square.detach()), rel=1e-5)
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_equal_to_the_student_costs_nothing(pico):
    model = pico()
    session = Session(
        model, [SquareHead(teacher="x"), Distillation(teacher="x")], load_teacher=lambda _: pico()
    )
    session.begin(1, 1)
    session.before_step()
    data = batch()
    outputs = model(**data)
    loss = session.loss(outputs.loss, data, outputs)
    assert float(loss.detach()) == pytest.approx(float(outputs.loss.detach()), abs=1e-5)


def test_hidden_states_are_asked_for_only_while_active(pico):
    model = pico()
    session = Session(
        model, [SquareHead(teacher="x", start=1.0, end=2.0)], load_teacher=lambda _: pico(1)
    )
    session.begin(1, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    for _ in range(3):
        session.before_step()
        outputs = model(**batch())
        seen.append(outputs.hidden_states is not None)
        session.before_optimizer()
        session.after_step(optimizer)
    session.finish()
    assert seen == [False, True, False]
    assert not model._forward_pre_hooks
    assert session.teachers == {}


def test_missing_and_unfit_teachers_are_errors(pico):
    with pytest.raises(ModelError, match="load_teacher"):
        Session(pico(), [Distillation(teacher="x")]).begin(1, 1)
    wide = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=3,
            vocab_size=128,
        )
    )
    for kind in (SquareHead, AttentionTransfer):
        with pytest.raises(ModelError, match="in number, not in width or heads"):
            first_loss(pico(), [kind(teacher="x")], wide)
    missing = SquareHead(teacher="x", layers={0: 2})
    with pytest.raises(ModelError, match="layer 2 of the teacher, which has 2, numbered from 0"):
        first_loss(pico(), [missing], pico(1))


def first_loss(model, modifiers, teacher, data=None):
    """The parts of the loss at the first step."""
    session = Session(model, modifiers, load_teacher=lambda _: teacher)
    session.begin(1, 1)
    session.before_step()
    data = data or batch()
    outputs = model(**{name: value for name, value in data.items() if name != "parts"})
    session.loss(outputs.loss, data, outputs).backward()
    session.finish()
    return session.take_logs()


def test_the_task_loss_on_some_parts_of_a_mixture_is_of_those_rows_alone(pico):
    model, data = pico(0), batch() | {"parts": torch.tensor([0, 2])}

    def gradient(data, *modifiers):
        model.zero_grad()
        first_loss(model, modifiers, pico(1), data)
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    row = {name: value[:1] for name, value in data.items() if name != "parts"}
    wanted = gradient(row, TaskLoss(weight=0.5))
    expected = first_loss(model, [TaskLoss(weight=0.5)], pico(1), row)["loss/task"]
    logs = first_loss(model, [TaskLoss(weight=0.5, parts=[0])], pico(1), data)
    assert logs["loss/task_parts"] == pytest.approx(expected, rel=1e-5)
    assert logs["loss/total"] == pytest.approx(expected / 2, rel=1e-5)
    found = gradient(data, TaskLoss(weight=0.5, parts=[0, 1]))
    for name, expected in wanted.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    alone = [TaskLoss(parts=[1]), Distillation(teacher="x", parts=[0])]  # no row for the task
    assert any(grad.any() for grad in gradient(data, *alone).values())
    assert not any(grad.any() for grad in gradient(data, TaskLoss(parts=[1])).values())
    with pytest.raises(ModelError, match="give `data` a mixture"):
        gradient(batch(), TaskLoss(parts=[0]))
    with pytest.raises(ValidationError, match="give weight"):
        TaskLoss()


@pytest.mark.parametrize(
    ("layers", "students", "teachers", "pairs"),
    [
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 2, 6, [(0, 2), (1, 5)]),
        ("uniform", 4, 6, [(0, 1), (1, 2), (2, 4), (3, 5)]),
        ("uniform", 3, 2, [(0, 0), (1, 1), (2, 1)]),
        ("last", 3, 8, [(2, 7)]),
        ({1: 0, 0: 4}, 2, 5, [(0, 4), (1, 0)]),
    ],
)
def test_layers_are_mapped(layers, students, teachers, pairs):
    assert layer_map(layers, students, teachers, "SquareHead") == pairs


def test_a_student_learns_from_a_teacher_of_other_depth(pico):
    model, teacher = pico(0), pico(1, layers=4)
    data = batch()
    with torch.no_grad():
        t = teacher(**data, output_hidden_states=True).hidden_states
        s = model(**data, output_hidden_states=True).hidden_states
    by_hand = {"uniform": [(s[1], t[2]), (s[2], t[4])], "last": [(s[2], t[4])]}
    for layers, pairs in by_hand.items():
        logs = first_loss(model, [SquareHead(teacher="x", layers=layers)], teacher)
        expected = float(square_head(pairs, data["attention_mask"], 2.0**-7))
        assert logs["loss/squarehead"] == pytest.approx(expected, rel=1e-5)
    answer = SquareHead(teacher="x", layers={1: 0}, tokens="answer")
    predicting = torch.zeros_like(data["labels"], dtype=torch.bool)
    for row, place in (data["labels"] != -100).nonzero().tolist():
        if place > 0:
            predicting[row, place - 1] = True
    expected = float(square_head([(s[2], t[1])], predicting, 2.0**-7))
    assert first_loss(model, [answer], teacher)["loss/squarehead"] == pytest.approx(expected)


def test_attention_transfer_is_the_formula_query_by_query():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 4).softmax(-1) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    total = 0.0
    for row, query in mask.nonzero().tolist():
        for head in range(3):
            p, q = teacher[row, head, query], student[row, head, query]
            total += float((p * (p / q).log()).sum()) / 3
    found = float(attention_divergence(student, teacher, mask))
    assert found == pytest.approx(total / int(mask.sum()), rel=1e-5)


def test_two_attention_transfers_leave_the_models_own_attention(pico):
    model = pico(0)
    usual = model.config._attn_implementation
    windows = [{"start": 0.0, "end": 2.0}, {"start": 1.0, "end": 3.0}]
    modifiers = [AttentionTransfer(teacher="x", unit="steps", **window) for window in windows]
    session = Session(model, modifiers, load_teacher=lambda _: pico(1))
    session.begin(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kinds = []
    for _ in range(4):
        session.before_step()
        data = batch()
        outputs = model(**data)
        kinds.append(model.config._attn_implementation)
        session.loss(outputs.loss, data, outputs).backward()
        session.before_optimizer(optimizer)
        session.after_step(optimizer)
    session.finish()
    assert kinds == ["eager", "eager", "eager", usual]


def test_attention_transfer_uses_plain_attention_in_its_window_only(pico):
    model, teacher = pico(0), pico(1)
    usual = model.config._attn_implementation
    assert usual != "eager"
    modifiers = [
        Distillation(teacher="x"),
        AttentionTransfer(teacher="x", start=1.0, end=2.0, layers="uniform", update_frequency=1.0),
    ]
    session = Session(model, modifiers, load_teacher=lambda _: teacher)
    session.begin(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen, losses = [], []
    for step in range(6):
        if step == 3:  # what a resume does
            state = session.state_dict()
            model.set_attn_implementation(usual)
            session.begin(2, 6)
            session.load_state_dict(state)
        session.before_step()
        data = batch()
        outputs = model(**data)
        seen.append(outputs.attentions is not None)
        session.loss(outputs.loss, data, outputs).backward()
        losses.append(session.take_logs().get("loss/attention", 0.0))
        session.before_optimizer(optimizer)
        optimizer.step()
        session.after_step(optimizer)
    session.finish()
    assert seen == [False, False, True, True, False, False]
    assert losses[2] > 0
    assert [loss > 0 for loss in losses] == seen
    assert model.config._attn_implementation == teacher.config._attn_implementation == usual


def test_the_tasks_loss_can_weigh_less_or_nothing(pico):
    def gradient(*modifiers):
        model = pico(0)
        logs = first_loss(model, list(modifiers), pico(1))
        return logs, model.get_parameter("model.layers.0.mlp.up_proj.weight").grad

    logs, alone = gradient(TaskLoss(weight=0.0), Distillation(teacher="x"))
    assert logs["loss/total"] == pytest.approx(logs["loss/kl"], rel=1e-6)
    assert logs["loss/task"] > 0
    _, both = gradient(Distillation(teacher="x"))
    _, task = gradient(TaskLoss(weight=1.0))
    torch.testing.assert_close(alone + task, both, rtol=1e-4, atol=1e-7)
    with pytest.raises(ModelError, match="stands after Distillation.*put it first"):
        gradient(Distillation(teacher="x"), TaskLoss(weight=0.5))


def test_two_of_a_kind_are_logged_one_by_one(pico):
    pair = [SquareHead(teacher="x", layers={0: 0}), SquareHead(teacher="x", layers={1: 1})]
    logs = first_loss(pico(0), pair, pico(1))
    both = first_loss(pico(0), [SquareHead(teacher="x")], pico(1))["loss/squarehead"]
    assert logs["loss/squarehead"] + logs["loss/squarehead#2"] == pytest.approx(both, rel=1e-5)


class Teacher:
    """A load_teacher that counts what is asked of it."""

    def __init__(self, model, fingerprint="a"):
        self.model, self.loads, self.forwards, self._name = model, 0, 0, fingerprint
        model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.forwards += 1

    def __call__(self, reference):
        self.loads += 1
        return self.model

    def fingerprint(self, reference):
        return self._name


def cached_loss(model, teacher, data, **fields):
    modifier = Distillation(teacher="x", **fields)
    session = Session(model, [modifier], load_teacher=teacher)
    session.begin(1, 1)
    session.before_step()
    outputs = model(**data)
    model.zero_grad()
    session.loss(outputs.loss, data, outputs).backward()
    session.finish()
    gradient = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad.clone()
    return session.take_logs()["loss/kl"], gradient


def test_cached_logits_give_the_loss_of_a_live_teacher(pico, tmp_path):
    model, teacher = pico(0), Teacher(pico(1))
    live, gradient = cached_loss(model, teacher, batch())
    assert (teacher.loads, teacher.forwards) == (1, 1)
    first, one = cached_loss(model, teacher, batch(), cache=str(tmp_path))
    assert (teacher.loads, teacher.forwards) == (2, 3)  # each of two sequences by itself
    second, two = cached_loss(model, teacher, batch(), cache=str(tmp_path))
    assert (teacher.loads, teacher.forwards) == (2, 3)  # not even loaded
    assert first == second
    assert torch.equal(one, two)
    assert first == pytest.approx(live, rel=2e-3)
    torch.testing.assert_close(one, gradient, rtol=0.02, atol=1e-5)
    # a sequence is found again whatever the batch it stands in, and recomputed after a loss
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    data = {name: value[1:, :6] for name, value in batch().items()}
    cached_loss(model, teacher, data, cache=str(tmp_path))
    assert teacher.loads == 2
    stored = files[0].read_bytes()
    files[0].unlink()
    assert cached_loss(model, teacher, batch(), cache=str(tmp_path))[0] == first
    assert files[0].read_bytes() == stored
    assert (teacher.loads, teacher.forwards) == (3, 4)
    other = Teacher(pico(2), "b")
    assert cached_loss(model, other, batch(), cache=str(tmp_path))[0] != first
    assert other.loads == 1


def test_the_likeliest_tokens_alone_come_close_and_never_above(pico, tmp_path):
    model, teacher = pico(0), Teacher(pico(1))
    for temperature in (1.0, 2.0):
        live, _ = cached_loss(model, teacher, batch(), temperature=temperature)
        settings = {"temperature": temperature, "cache": str(tmp_path)}
        found = [
            cached_loss(model, teacher, batch(), top_k=k, **settings)[0] for k in (4, 32, 96, 500)
        ]
        assert found == sorted(found)  # what counts as one can only hide a difference
        assert found[1] < live * 1.002
        assert found[-1] == pytest.approx(live, rel=2e-3)


def test_top_k_is_the_formula():
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(4, 9), 3 * torch.randn(4, 9)
    stored = Distributions.of(teacher, 3, 2.0)
    expected = 0.0
    for t, s in zip((teacher / 2).softmax(-1), (student / 2).softmax(-1), strict=True):
        top = t.topk(3).indices
        p, q = (
            torch.cat([t[top], 1 - t[top].sum()[None]]),
            torch.cat([s[top], 1 - s[top].sum()[None]]),
        )
        expected += float((p * (p / q).log()).sum())
    assert float(stored.divergence(student, 2.0)) == pytest.approx(expected, rel=2e-3)


def test_a_cache_needs_the_teachers_name_and_whole_files(pico, tmp_path):
    with pytest.raises(ModelError, match="fingerprint"):
        cached_loss(pico(0), lambda _: pico(1), batch(), cache=str(tmp_path))
    with pytest.raises(ValidationError, match="add cache: true"):
        Distillation(teacher="x", top_k=4)
    cached_loss(pico(0), Teacher(pico(1)), batch(), cache=str(tmp_path))
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged.*delete it"):
        cached_loss(pico(0), Teacher(pico(1)), batch(), cache=str(tmp_path))


def test_layers_are_the_same_with_recomputed_activations(pico):
    found = []
    for recompute in (False, True):
        model = pico(0).train()
        if recompute:
            old = "gradient_checkpointing_enable"  # its name before transformers 5
            getattr(model, "activation_checkpointing_enable", getattr(model, old, None))()
        logs = first_loss(model, [SquareHead(teacher="x"), AttentionTransfer(teacher="x")], pico(1))
        found.append((logs, model.get_parameter("model.layers.0.mlp.up_proj.weight").grad))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])

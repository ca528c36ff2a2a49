from __future__ import annotations

import pytest
import torch

from paring.errors import ModelError
from paring.modifiers import Session
from paring.modifiers.distillation.distillation import Distillation, divergence
from paring.modifiers.distillation.squarehead import SquareHead, square_head


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
    assert float(square_head(student, teacher, mask, 2.0**-7)) == pytest.approx(expected, rel=1e-5)


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
    square = square_head(
        outputs.hidden_states[1:], wanted.hidden_states[1:], data["attention_mask"], 2.0**-7
    )
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
    session = Session(pico(), [SquareHead(teacher="x")], load_teacher=lambda _: pico(1, layers=3))
    session.begin(1, 1)
    session.before_step()
    outputs = session.model(**batch())
    with pytest.raises(ModelError, match="has 3 layers of width 32, the student 2"):
        session.loss(outputs.loss, batch(), outputs)

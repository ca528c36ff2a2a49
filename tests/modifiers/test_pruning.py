"""Wanda, ADMM, magnitude and constant pruning."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from paring.errors import ModelError
from paring.modifiers import Session
from paring.modifiers.hessian import Gram
from paring.modifiers.pruning.admm import ADMMPruning
from paring.modifiers.pruning.constant import ConstantPruning
from paring.modifiers.pruning.magnitude import MagnitudePruning
from paring.modifiers.pruning.sparsegpt import SparseGPT
from paring.modifiers.pruning.wanda import Wanda
from paring.modifiers.quantization.quantization import Quantization


def prune(algorithm, gram, weights, kept):
    """What the algorithm makes of some weights that share an input."""
    tasks = [algorithm.layer("", *pair) for pair in zip(weights, kept, strict=True)]
    return algorithm.prune(gram, tasks, {})


def layer() -> tuple[torch.Tensor, torch.Tensor, Gram]:
    torch.manual_seed(0)
    x = torch.randn(100, 16) @ torch.randn(16, 16)
    gram = Gram()
    gram.add(x)
    return torch.randn(6, 16), x, gram


def test_wanda_removes_the_lowest_of_each_row():
    weight, x, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(Wanda(sparsity=0.5), gram, [weight], [kept])
    for row in range(6):
        scores = [abs(float(weight[row, j])) * float(x[:, j].norm()) for j in range(16)]
        lowest = sorted(range(16), key=lambda j: scores[j])[:8]
        assert sorted((~mask[row]).nonzero().flatten().tolist()) == sorted(lowest)
    assert torch.equal(after[mask], weight[mask])


@pytest.mark.parametrize(("structure", "height", "width"), [("1x4", 1, 4), ("4x1", 4, 1)])
def test_wanda_removes_the_lowest_blocks_of_each_row_of_blocks(structure, height, width):
    _, x, gram = layer()
    weight = torch.randn(8, 16)
    kept = torch.ones_like(weight, dtype=torch.bool)
    algorithm = Wanda(sparsity=0.5, mask_structure=structure)
    ((after, mask),) = prune(algorithm, gram, [weight], [kept])
    for top in range(0, 8, height):
        rows = range(top, top + height)
        scores = {}
        for left in range(0, 16, width):
            block = [(i, j) for i in rows for j in range(left, left + width)]
            scores[left] = sum(float(weight[i, j] * x[:, j].norm()) ** 2 for i, j in block)
        lowest = sorted(scores, key=lambda left: scores[left])[: len(scores) // 2]
        for left in scores:
            assert (mask[top : top + height, left : left + width] == (left not in lowest)).all()
    assert torch.equal(after[mask], weight[mask])


@pytest.mark.parametrize("structure", ["2:4", "3:8"])
def test_wanda_keeps_the_highest_of_every_group(structure):
    weight, x, gram = layer()
    n, m = map(int, structure.split(":"))
    kept = torch.ones_like(weight, dtype=torch.bool)
    ((_, mask),) = prune(Wanda(mask_structure=structure), gram, [weight], [kept])
    for row in range(6):
        for left in range(0, 16, m):
            score = {
                j: abs(float(weight[row, j])) * float(x[:, j].norm()) for j in range(left, left + m)
            }
            highest = sorted(score, key=lambda j: score[j])[m - n :]
            assert mask[row, left : left + m].nonzero().flatten().tolist() == sorted(
                j - left for j in highest
            )


def damped(gram: Gram, fraction: float) -> torch.Tensor:
    """The Gram matrix that ADMM's errors are measured by: of inputs as they are, in fp64."""
    matrix = gram.matrix.double()
    return matrix + fraction * torch.diag(matrix.diagonal())


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "1x4"])
def test_admm_reaches_the_masked_least_squares_optimum(structure):
    weight, _, gram = layer()
    kept = torch.rand(weight.shape) > 0.1
    weight *= kept
    settings = {} if ":" in structure else {"sparsity": 0.5}
    algorithm = ADMMPruning(mask_structure=structure, conjugate_gradient_steps=100, **settings)
    ((after, mask),) = prune(algorithm, gram, [weight], [kept])
    assert not (mask & ~kept).any()
    assert (after[~mask] == 0).all()
    a = damped(gram, algorithm.dampening_frac)
    for row in range(6):  # argmin over the support of (w - w0) A (w - w0)'
        support = mask[row]
        right = (a @ weight[row].double())[support]
        best = torch.linalg.solve(a[support][:, support], right)
        assert torch.allclose(after[row, support].double(), best, rtol=1e-3, atol=1e-4)


def plain_admm(weight, gram, sparsity, *, ramp, rho, dampening_frac):
    """As the papers write it, in fp64 and with explicit inverses, up to the first stable mask."""
    a = damped(gram, dampening_frac)
    scale = torch.linalg.inv(a).diagonal().rsqrt()
    a = a / torch.outer(scale, scale)
    w0 = weight.double() * scale
    rho = rho * float(a.diagonal().mean())
    w, u, t, settled = w0, torch.zeros_like(w0), 0, None
    while True:
        t += 1
        share = sparsity * (1 - (1 - min(1.0, t / ramp)) ** 3)
        removed = round(share * w.numel())
        mask = torch.ones(w.numel(), dtype=torch.bool)
        mask[(w + u).abs().flatten().argsort()[:removed]] = False
        mask = mask.reshape(w.shape)
        z = (w + u) * mask
        u = w + u - z
        if t == ramp:
            settled = mask
        elif t > ramp and (t - ramp) % 3 == 0:
            changed = float((mask != settled).sum() / mask.sum())
            if changed == 0:
                return mask, t
            settled = mask
            growth = 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1
            rho, u = rho * growth, u / growth
        w = torch.linalg.solve(a + rho * torch.eye(len(a)), (w0 @ a + rho * (z - u)).T).T


@pytest.mark.parametrize("ramp", [1, 8])
def test_admm_finds_the_mask_of_the_plain_algorithm(ramp):
    weight, _, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    notes: dict[str, int] = {}
    algorithm = ADMMPruning(sparsity=0.6, ramp_iterations=ramp)
    ((_, mask),) = algorithm.prune(gram, [algorithm.layer("", weight, kept)], notes)
    expected, iterations = plain_admm(weight, gram, 0.6, ramp=ramp, rho=0.1, dampening_frac=0.02)
    assert torch.equal(mask, expected)
    assert notes["iterations"] == iterations


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "1x4"])
def test_admm_beats_sparsegpt_and_wanda(structure):
    weight, _, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    settings = {"mask_structure": structure}
    if ":" not in structure:
        settings["sparsity"] = 0.5
    errors = []
    for algorithm in (ADMMPruning(**settings), SparseGPT(**settings), Wanda(**settings)):
        ((after, mask),) = prune(algorithm, gram, [weight], [kept])
        errors.append(gram.relative_error(weight, after * mask))
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.5 * errors[2]


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"mask_structure": "4:16"}])
@pytest.mark.parametrize("iterations", [1, 4])
def test_admm_has_its_sparsity_after_few_iterations_too(settings, iterations):
    weight, _, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    ((_, mask),) = prune(ADMMPruning(iterations=iterations, **settings), gram, [weight], [kept])
    wanted = settings.get("sparsity", 0.75)
    assert 1 - float(mask.float().mean()) == pytest.approx(wanted, abs=1e-3)


def test_pruning_after_quantization_is_refused(pico, calibration):
    steps = [Quantization(ignore=["lm_head"]), Wanda(sparsity=0.5, ignore=["lm_head"])]
    with pytest.raises(ModelError, match="q_proj is quantized already.*put pruning before"):
        Session(pico(), steps).run_oneshot(calibration)


@pytest.mark.parametrize("kind", [Wanda, ADMMPruning])
def test_a_model_that_is_not_finite_is_refused(pico, calibration, kind):
    model = pico()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinity"):
        Session(model, [kind(sparsity=0.5, ignore=["lm_head"])]).run_oneshot(calibration)


def test_a_linear_without_gradient_is_pruned_like_the_others(pico, calibration):
    model = pico()
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data.zero_()
    session = Session(model, [ADMMPruning(sparsity=0.5, ignore=["lm_head"])])
    session.run_oneshot(calibration)
    assert session.masks.sparsity("model.layers.0.mlp.up_proj.weight") == pytest.approx(0.5)


def test_a_linear_that_is_never_called_is_named(pico, calibration):
    model = pico()
    model.model.layers[1].spare = torch.nn.Linear(32, 32)
    with pytest.raises(ModelError, match=r"layers\.1\.spare is never called.*ignore"):
        Session(model, [Wanda(sparsity=0.5, ignore=["lm_head"])]).run_oneshot(calibration)


def test_admm_removes_dead_inputs_first():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    x[:, 3] = 0
    gram = Gram()
    gram.add(x)
    weight = torch.randn(4, 16)
    kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(ADMMPruning(sparsity=0.25), gram, [weight], [kept])
    assert not mask[:, 3].any()
    assert (after[:, 3] == 0).all()
    assert after.isfinite().all()
    assert (~mask).float().mean() == 0.25


def test_admm_refuses_inputs_that_are_not_finite():
    gram = Gram()
    gram.add(torch.full((2, 16), torch.inf))
    kept = torch.ones(4, 16, dtype=torch.bool)
    with pytest.raises(ModelError, match="NaN or infinity"):
        prune(ADMMPruning(sparsity=0.25), gram, [torch.randn(4, 16)], [kept])


def loop(session: Session, steps: int) -> None:
    """A training loop without training: the clock alone."""
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.0)
    for _ in range(steps):
        session.before_step()
        session.before_optimizer()
        session.after_step(optimizer)


@pytest.mark.parametrize("scheduler", ["cubic", "linear"])
def test_gradual_magnitude_follows_its_ramp_at_every_step(pico, scheduler):
    model = pico()
    pruning = MagnitudePruning(
        init_sparsity=0.1,
        final_sparsity=0.6,
        start=0.5,
        end=2.0,
        update_scheduler=scheduler,
        ignore=["lm_head"],
    )
    session = Session(model, [pruning])
    session.begin(steps_per_epoch=10, total_steps=30)
    name = "model.layers.0.mlp.up_proj.weight"
    size = model.get_parameter(name).numel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(30):
        session.before_step()
        p = min(max((step - 5) / 15, 0.0), 1.0)
        eased = p if scheduler == "linear" else (p - 1) ** 3 + 1
        wanted = 0.0 if step < 5 else round((0.1 + 0.5 * eased) * size) / size
        zeros = int((model.get_parameter(name) == 0).sum()) / size
        assert zeros == wanted, step
        session.before_optimizer()
        session.after_step(optimizer)
    session.finish()
    assert all(
        mask.sum() == mask.numel() - round(0.6 * mask.numel()) for _, mask in session.masks.items()
    )


def test_update_frequency_is_kept(pico):
    model = pico()
    pruning = MagnitudePruning(init_sparsity=0.0, final_sparsity=0.8, end=1.0, update_frequency=0.3)
    session = Session(model, [pruning])
    session.begin(steps_per_epoch=10, total_steps=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    changed, last = [], -1
    for step in range(12):
        session.before_step()
        zeros = sum(int((~mask).sum()) for _, mask in session.masks.items())
        if zeros != last:
            changed.append(step)
            last = zeros
        session.before_optimizer()
        session.after_step(optimizer)
    assert changed == [0, 3, 6, 9, 10]


def test_a_window_to_the_end_reaches_the_final_value_in_finish(pico):
    model = pico()
    session = Session(model, [MagnitudePruning(init_sparsity=0.1, final_sparsity=0.5)])
    session.begin(5, 5)
    loop(session, 5)
    assert session.masks.sparsity("model.layers.0.mlp.up_proj.weight") < 0.5
    session.finish()
    assert session.masks.sparsity("model.layers.0.mlp.up_proj.weight") == 0.5


def test_global_sparsity_is_one_threshold(pico):
    model = pico()
    model.model.layers[0].mlp.up_proj.weight.data *= 0.1
    before = {n: w.clone() for n, w in Session(model).weights(["Linear"], ["lm_head"])}
    session = Session(
        model, [MagnitudePruning(sparsity=0.5, global_sparsity=True, ignore=["lm_head"])]
    )
    session.run_oneshot()
    kept = min(float(before[n][m].abs().min()) for n, m in session.masks.items() if m.any())
    removed = max(float(before[n][~m].abs().max()) for n, m in session.masks.items() if not m.all())
    assert kept >= removed
    total = sum(m.numel() for _, m in session.masks.items())
    assert sum(int((~m).sum()) for _, m in session.masks.items()) == round(0.5 * total)
    assert session.masks.sparsity("model.layers.0.mlp.up_proj.weight") > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either sparsity or final_sparsity"),
        ({"sparsity": 0.5, "final_sparsity": 0.6}, "give either"),
        ({"init_sparsity": 0.7, "final_sparsity": 0.6}, "is above final_sparsity"),
        ({"sparsity": 0.6, "mask_structure": "2:4"}, "2:4 is 0.5 sparse"),
        (
            {"sparsity": 0.5, "mask_structure": "2:4", "global_sparsity": True},
            "only with mask_structure",
        ),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MagnitudePruning(**settings)


def test_constant_holds_what_is_zero_and_keeps_masks_there_are(pico):
    model = pico()
    up = model.model.layers[0].mlp.up_proj.weight
    up.data[::2] = 0
    session = Session(model, [ConstantPruning(targets=["up_proj", "down_proj"])])
    down = torch.ones(32, 64, dtype=torch.bool)
    session.masks.hold("model.layers.0.mlp.down_proj.weight", down)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 0  # by chance: kept
    session.run_oneshot()
    assert torch.equal(session.masks["model.layers.0.mlp.up_proj.weight"], up != 0)
    assert session.masks["model.layers.0.mlp.down_proj.weight"].all()

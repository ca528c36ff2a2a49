"""Sparsity spread over layers: the solvers by brute force, the profiles by their formulas, auto by the engine."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from paring.engine import _core
from paring.errors import DataError, ModelError
from paring.modifiers import Session
from paring.modifiers.hessian import Gram
from paring.modifiers.mask_structure import MaskStructure
from paring.modifiers.pruning.admm import ADMMPruning
from paring.modifiers.pruning.allocation.auto import Budget
from paring.modifiers.pruning.allocation.budget import Option, choose, hull, level, spread
from paring.modifiers.pruning.allocation.importance import importance
from paring.modifiers.pruning.allocation.trial import Trial, curve
from paring.modifiers.pruning.sparsegpt import SparseGPT
from paring.modifiers.pruning.wanda import Wanda

PRUNERS = [SparseGPT, Wanda, ADMMPruning]
PROFILES = ["owl", "atp", "sensitivity"]

amounts = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 100)).map(lambda pair: Option(*map(float, pair))),
    min_size=1,
    max_size=5,
)
layers = st.dictionaries(st.sampled_from("abc"), amounts, min_size=1)


def line_below(options: list[Option], saved: float) -> float:
    """The least loss of a mixture of two options that saves `saved` (or of one that saves more)."""
    best = min((o.lost for o in options if o.saved >= saved), default=math.inf)
    for a, b in itertools.combinations(options, 2):
        if min(a.saved, b.saved) <= saved <= max(a.saved, b.saved) and a.saved != b.saved:
            part = (saved - a.saved) / (b.saved - a.saved)
            best = min(best, a.lost + part * (b.lost - a.lost))
    return best


@given(layers, st.floats(0, 1))
def test_spread_meets_the_budget_and_no_shift_between_layers_is_better(options, fraction):
    needed = fraction * sum(max(o.saved for o in given) for given in options.values())
    saved = spread(options, needed)
    free = {name: given[hull(given)[0]].saved for name, given in options.items()}
    assert sum(saved.values()) == pytest.approx(max(needed, sum(free.values())))
    for a, b in itertools.permutations(options, 2):
        loss = line_below(options[a], saved[a]) + line_below(options[b], saved[b])
        for moved in (0.1, 1.0, 3.0):
            if saved[a] >= moved and saved[b] + moved <= max(o.saved for o in options[b]):
                other = line_below(options[a], saved[a] - moved)
                other += line_below(options[b], saved[b] + moved)
                assert other >= loss - 1e-6


@given(layers, st.floats(0, 1))
def test_choose_meets_the_budget_and_is_near_the_best_choice(options, fraction):
    needed = fraction * sum(max(o.saved for o in given) for given in options.values())
    taken = choose(options, needed)
    got = [options[name][index] for name, index in taken.items()]
    assert sum(o.saved for o in got) >= needed - 1e-6
    losses = [
        sum(o.lost for o in combination)
        for combination in itertools.product(*options.values())
        if sum(o.saved for o in combination) >= needed - 1e-9
    ]
    # The relaxed optimum is below the best; the choice is at most one step above that.
    widest = max(
        (
            abs(given[a].lost - given[b].lost)
            for given in options.values()
            for a, b in itertools.pairwise(hull(given))
        ),
        default=0.0,
    )
    assert sum(o.lost for o in got) <= min(losses) + widest + 1e-6


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(ModelError, match="no choice saves enough"):
        choose({"a": [Option(0, 0), Option(5, 1)]}, 6)
    with pytest.raises(ModelError, match="no choice saves enough"):
        spread({"a": [Option(0, 0), Option(5, 1)]}, 6)


@given(
    st.lists(st.tuples(st.floats(-1, 2), st.integers(1, 9)), min_size=1, max_size=6),
    st.floats(0, 0.995),
)
def test_level_has_the_mean_asked_for(pairs, mean):
    wanted = {str(i): value for i, (value, _) in enumerate(pairs)}
    sizes = {str(i): size for i, (_, size) in enumerate(pairs)}
    found = level(wanted, sizes, mean)
    total = sum(found[name] * sizes[name] for name in found)
    assert total / sum(sizes.values()) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= value <= 0.995 for value in found.values())
    for a, b in itertools.combinations(wanted, 2):
        assert (found[a] - found[b]) * (wanted[a] - wanted[b]) >= 0


def overall(session: Session) -> float:
    masks = [mask for _, mask in session.masks.items()]
    return sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("pruner", "structure"),
    [*((pruner, "unstructured") for pruner in PRUNERS), (SparseGPT, "1x4"), (ADMMPruning, "n:16")],
)
def test_every_profile_meets_the_sparsity_exactly(pico, calibration, pruner, profile, structure):
    modifier = pruner(
        sparsity=0.6, sparsity_profile=profile, mask_structure=structure, ignore=["lm_head"]
    )
    session = Session(pico(layers=3), [modifier])
    session.run_oneshot(calibration)
    rounding = {"unstructured": 0.5, "1x4": 2, "n:16": 32}[structure] * 21
    # SparseGPT rounds in each block of columns, Wanda in each row
    rounding += {SparseGPT: 21, Wanda: 21 * 64 * 2}.get(pruner, 0) * (structure != "n:16")
    size = sum(mask.numel() for _, mask in session.masks.items())
    assert abs(overall(session) - 0.6) * size <= rounding
    report = session.report[pruner.key()]
    assert report["sparsity_profile"] == profile
    assert len({round(layer["sparsity"], 2) for layer in report["layers"].values()}) > 1


def plan(model, modifier, calibration):
    session = Session(model, [modifier])
    session.run_oneshot(calibration)
    return {name: share[1] for name, share in modifier._plan.items()}


def test_atp_rises_by_the_same_step_from_block_to_block(pico, calibration):
    modifier = Wanda(sparsity=0.5, sparsity_profile="atp", atp_spread=0.2, ignore=["lm_head"])
    for name, sparsity in plan(pico(layers=5), modifier, calibration).items():
        assert sparsity == pytest.approx(0.4 + 0.05 * int(name.split(".")[2]))


def test_owl_is_its_formula(pico, calibration):
    model = pico(layers=3)
    model.model.layers[1].mlp.up_proj.weight.data[0] *= 50  # outliers
    seen: dict[str, torch.Tensor] = {}

    def watch(name):
        return lambda module, args: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))

    linears = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears.items()]
    with torch.no_grad():
        model(calibration)
    for handle in handles:
        handle.remove()
    outliers = []
    for block in range(3):
        scores = torch.cat(
            [
                (m.weight.abs() * seen[n].norm(dim=0)).flatten()
                for n, m in linears.items()
                if n.startswith(f"model.layers.{block}.")
            ]
        )
        outliers.append(100 * float((scores > 3 * scores.mean()).float().mean()))
    low, high = min(outliers), max(outliers)
    d = [(value - low) / (high - low) * 2 * 0.1 for value in outliers]
    expected = [0.5 - (value - sum(d) / 3) for value in d]
    modifier = Wanda(
        sparsity=0.5, sparsity_profile="owl", owl_m=3, owl_lmbda=0.1, ignore=["lm_head"]
    )
    for name, sparsity in plan(model, modifier, calibration).items():
        assert sparsity == pytest.approx(expected[int(name.split(".")[2])], abs=1e-3)


@pytest.mark.parametrize("seed", [5, None])
def test_importance_is_the_mean_square_of_each_tokens_gradient(pico, calibration, seed):
    model = pico()
    name = "model.layers.1.mlp.gate_proj"
    linear = model.get_submodule(name)
    assert all(parameter.requires_grad for parameter in model.parameters())
    found = importance(model, {name: linear}, calibration[:2], seed)[name]
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(64)
    for row in calibration[:2]:
        outputs: list[torch.Tensor] = []
        handle = linear.register_forward_hook(lambda module, args, y: outputs.append(y))  # noqa: B023
        logits = model(row[None]).logits[0]
        handle.remove()
        if seed is None:
            logits, labels = logits[:-1], row[1:, None]
        else:
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        loss = -logits.log_softmax(-1).gather(1, labels).sum()
        (gradient,) = torch.autograd.grad(loss, outputs)
        total += gradient[0].square().sum(dim=0)
    assert torch.allclose(found, total / 32, rtol=1e-4)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("text", ["unstructured", "2:4", "n:16"])
def test_a_trial_gives_the_error_of_what_it_pruned(text, weigh):
    torch.manual_seed(0)
    x = torch.randn(200, 32) @ torch.randn(32, 32)
    weight, kept = torch.randn(16, 32), torch.rand(16, 32) > 0.1
    weight.masked_fill_(~kept, 0)
    gram, minded = Gram(), torch.rand(16)
    gram.add(x)
    trial = Trial(gram, 7, weigh)
    structure = MaskStructure.parse(text)
    pruned, mask = trial._prune(weight, kept, structure, 0.5, minded)
    assert not (mask & ~kept).any()
    assert not pruned[~mask].any()
    outcome = trial.run(weight, kept, structure, 0.5, minded)
    explicit = ((x @ (pruned - weight).T).square().mean(dim=0) * minded).sum()
    assert outcome.error == pytest.approx(float(explicit), rel=1e-3)
    assert outcome.weights == float(mask.float().mean())
    assert outcome.blocks == float(mask.reshape(16, 8, 4).any(dim=2).float().mean())
    magnitude = weight * structure.mask((weight * x.norm(dim=0)).square(), 0.5)
    plain = ((x @ (magnitude - weight).T).square().mean(dim=0) * minded).sum()
    assert outcome.error < float(plain)
    assert trial.run(weight, kept, structure, 0.8, minded).error > outcome.error


def test_errors_between_sparsities_tried_are_geometric_means():
    found = curve([0.4, 0.6, 0.8], [1.0, 4.0, 8.0], [0.4, 0.5, 0.7, 0.9])
    assert found == pytest.approx([1.0, 2.0, math.sqrt(32), 8.0 * math.sqrt(2)])
    assert curve([0.5], [3.0], [0.5]) == pytest.approx([3.0])


def test_sensitivity_spares_what_the_loss_minds(pico, calibration):
    model = pico(layers=3)
    with torch.no_grad():  # the last block's MLP hardly reaches the output
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-3)
    modifier = ADMMPruning(
        sparsity=0.6, sparsity_profile="sensitivity", sensitivity_reach=0.2, ignore=["lm_head"]
    )
    found = plan(model, modifier, calibration)
    quiet = [found[f"model.layers.2.mlp.{name}_proj"] for name in ("gate", "up", "down")]
    others = [s for name, s in found.items() if "layers.2.mlp" not in name]
    assert min(quiet) > max(others) - 1e-9
    assert min(quiet) == pytest.approx(0.8)
    assert all(0.4 - 1e-9 <= s <= 0.8 + 1e-9 for s in found.values())


def memory(model, session: Session, group: int, dtype: str) -> tuple[float, dict[str, str]]:
    """Bytes per weight and layouts of the pruned Linears as the engine packs them; values don't matter."""
    size = bytes_ = 0
    layouts = {}
    for name, mask in session.masks.items():
        kept = mask.numpy()
        rows, columns = kept.shape
        scales = np.ones((rows, -(-columns // group) if group else 1), np.float32)
        counts = kept.sum(axis=1)
        count = int(kept.sum()) if dtype == "i8" else int(((counts + 1) // 2).sum())
        packed = _core.kernels.pack(
            rows,
            columns,
            dtype,
            np.zeros(count, np.uint8),
            np.packbits(kept, axis=1, bitorder="little"),
            scales,
            group=group,
            mode="int8_dynamic",
            row=Budget.model_fields["kernels"].default,  # whatever this CPU has
        )
        layouts[name] = packed.layout
        bytes_ += packed.bytes
        size += kept.size
    return bytes_ / size, layouts


@pytest.mark.parametrize(("bits", "group", "limit"), [(8, 0, 0.8), (8, 0, 0.6), (4, 32, 0.54)])
def test_auto_stays_within_its_bytes_as_the_engine_packs_them(calibration, bits, group, limit):
    budget = {"bytes_per_weight": limit, "weight_bits": bits, "group_size": group}
    modifier = ADMMPruning(mask_structure="auto", budget=budget, ignore=["lm_head"])
    torch.manual_seed(0)
    config = LlamaConfig(  # wide enough for panels not to be padding mostly
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config).eval()
    session = Session(model, [modifier])
    session.run_oneshot(calibration)
    used, layouts = memory(model, session, group, f"i{bits}")
    # panels are padded to 64 bytes; one step of one layer may stay unused
    assert limit - 0.02 <= used <= limit + 0.02
    assert any(
        kind in layout for layout in layouts.values() for kind in ("bitmask", "block4", "words")
    )
    layers = session.report["ADMMPruning"]["layers"]
    assert {layer["mask_structure"] for layer in layers.values()} <= {"unstructured", "1x4"}
    for name, layer in layers.items():
        mask = session.masks[f"{name}.weight"]
        if layer["mask_structure"] == "1x4":
            blocks = mask.reshape(mask.shape[0], -1, 4)
            assert (blocks.all(dim=2) | ~blocks.any(dim=2)).all()


def test_auto_takes_blocks_where_they_lose_no_more(pico, calibration):
    """Where 1x4 costs the layer no more than free masks, its smaller index decides."""
    model = pico()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("up_proj"):  # weights in blocks already
                generator = torch.Generator().manual_seed(0)
                alive = torch.rand(64, 8, generator=generator) > 0.5
                module.weight.mul_(alive.repeat_interleave(4, dim=1))
    modifier = ADMMPruning(
        mask_structure="auto", budget={"bytes_per_weight": 0.82}, targets=["up_proj"]
    )
    session = Session(model, [modifier])
    session.run_oneshot(calibration)
    for layer in session.report["ADMMPruning"]["layers"].values():
        assert layer["mask_structure"] == "1x4"
        assert layer["error"] < 1e-9


def test_auto_with_a_loose_budget_leaves_the_model_dense(pico, calibration):
    modifier = SparseGPT(mask_structure="auto", budget={"speed": 0.5}, ignore=["lm_head"])
    session = Session(pico(), [modifier])
    session.run_oneshot(calibration)
    assert overall(session) == 0.0


def test_auto_mixes_structures_in_one_column_loop(pico, calibration):
    """q, k and v share an input, so SparseGPT goes through them together, each with a pattern of its own."""
    modifier = SparseGPT(mask_structure="auto", budget={"speed": 1.5}, ignore=["lm_head"])
    block = "model.layers.0.self_attn"
    modifier._plan = {
        f"{block}.q_proj": ["n:16", 0.5],
        f"{block}.k_proj": ["2:4", 0.5],
        f"{block}.v_proj": ["unstructured", 0.25],
    }
    torch.manual_seed(0)
    gram = Gram()
    gram.add(torch.randn(100, 32) @ torch.randn(32, 32))
    weights = {"q_proj": torch.randn(32, 32), "k_proj": torch.randn(16, 32)}
    weights["v_proj"] = torch.randn(16, 32)
    tasks = [
        modifier.layer(f"{block}.{n}", w, torch.ones_like(w, dtype=torch.bool))
        for n, w in weights.items()
    ]
    together = modifier.prune(gram, tasks, {})
    for task, (weight, mask) in zip(tasks, together, strict=True):
        ((alone, mask_alone),) = modifier.prune(gram, [task], {})
        assert torch.equal(mask, mask_alone)
        assert torch.allclose(weight, alone, atol=1e-5)


def test_auto_out_of_reach_is_refused(pico, calibration):
    modifier = SparseGPT(mask_structure="auto", budget={"speed": 100}, ignore=["lm_head"])
    with pytest.raises(ModelError, match="no choice saves enough"):
        Session(pico(), [modifier]).run_oneshot(calibration)


@pytest.mark.parametrize("profile", ["owl", "sensitivity", "auto"])
def test_without_data_it_is_said_who_needs_it(pico, profile):
    settings = (
        {"mask_structure": "auto", "budget": {"speed": 1.5}}
        if profile == "auto"
        else {"sparsity": 0.5, "sparsity_profile": profile}
    )
    with pytest.raises(DataError, match="SparseGPT needs calibration data"):
        Session(pico(), [SparseGPT(**settings, ignore=["lm_head"])]).run_oneshot()


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.6, "sparsity_profile": "owl"},
        {"sparsity": 0.6, "sparsity_profile": "sensitivity"},
        {"mask_structure": "auto", "budget": {"bytes_per_weight": 0.6}},
    ],
)
def test_a_run_killed_in_either_pass_resumes(pico, calibration, tmp_path, settings, stop):
    make = lambda: Wanda(**settings, ignore=["lm_head"])  # noqa: E731
    whole = pico(layers=3)
    Session(whole, [make()]).run_oneshot(calibration)
    calls = []

    def kill(label: str, done: int, total: int, note: str = "") -> None:
        calls.append(done)
        if len(calls) == 2 * stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Session(pico(layers=3), [make()]).run_oneshot(calibration, kill, tmp_path)
    resumed = pico(layers=3)
    Session(resumed, [make()]).run_oneshot(calibration, None, tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_structure": "2:4", "sparsity_profile": "owl"}, "2:4 fixes it; use n:16"),
        ({"sparsity": 0.5, "sparsity_profile": "mine"}, "owl"),
        ({"mask_structure": "auto"}, "auto needs a budget"),
        ({"mask_structure": "auto", "budget": {}}, "give one of bytes_per_weight and speed"),
        (
            {"mask_structure": "auto", "budget": {"speed": 2, "bytes_per_weight": 0.5}},
            "give one of bytes_per_weight and speed",
        ),
        ({"mask_structure": "auto", "budget": {"speed": 2, "weight_bits": 3}}, "weight_bits"),
        ({"mask_structure": "auto", "budget": {"fast": 2}}, "Extra inputs"),
        ({"mask_structure": "auto", "budget": {"speed": 2}, "sparsity": 0.5}, "leave sparsity out"),
        (
            {"mask_structure": "auto", "budget": {"speed": 2}, "sparsity_profile": "owl"},
            "leave sparsity_profile out",
        ),
        (
            {"mask_structure": "auto", "budget": {"speed": 2}, "candidates": ["auto"]},
            "is not a mask structure",
        ),
        ({"mask_structure": "auto", "budget": {"speed": 2}, "candidates": []}, "at least 1"),
        ({"sparsity": 0.5, "budget": {"speed": 2}}, "budget goes with mask_structure: auto"),
        ({"sparsity": 0.5, "mask_structure": "3x3"}, "or auto, with a budget"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SparseGPT(**settings)


def test_a_modifier_used_again_looks_again(pico, calibration):
    modifier = Wanda(sparsity=0.5, sparsity_profile="owl", ignore=["lm_head"])
    first = plan(pico(0, layers=3), modifier, calibration)
    second = plan(pico(1, layers=3), modifier, calibration)
    assert first != second
    assert not modifier._found


@pytest.mark.parametrize("weigh", [False, True])
def test_a_trial_keeps_more_of_what_matters_only_where_the_pruner_does(weigh):
    torch.manual_seed(0)
    gram, weight = Gram(), torch.randn(16, 32)
    gram.add(torch.randn(200, 32))
    minded = torch.ones(16)
    minded[:8] = 100.0
    everything = torch.ones_like(weight, dtype=torch.bool)
    structure = MaskStructure.parse("unstructured")
    _, mask = Trial(gram, 7, weigh)._prune(weight, everything, structure, 0.5, minded)
    first, last = float(mask[:8].float().mean()), float(mask[8:].float().mean())
    assert (first > last + 0.4) if weigh else (abs(first - last) < 0.15)


def test_admm_weighs_outputs_and_says_so():
    assert ADMMPruning(sparsity=0.5).weighs_outputs
    assert not ADMMPruning(sparsity=0.5, output_importance=False).weighs_outputs
    assert not SparseGPT(sparsity=0.5).weighs_outputs

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from paring.errors import DataError, ModelError
from paring.modifiers import Masks, Session, registry
from paring.modifiers.pruning.structured.compensation import compensate
from paring.modifiers.pruning.structured.dependency import find_dependencies
from paring.modifiers.pruning.structured.importance import importance
from paring.modifiers.quantization.cache import cache_argument

R = registry()
KV = {"num_key_value_heads": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GATED = {**SIZES, "intermediate_size": 48}
HALF = {"sparsity": 0.5, "multiple_of": 8}


def llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**GATED, **KV, "tie_word_embeddings": True, **options}))


MODELS = {
    "llama": llama,
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-ungrouped": lambda: llama(num_key_value_heads=4),
    "llama-eager": lambda: llama(attn_implementation="eager"),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GATED, **KV)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED, **KV)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED, **KV, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GATED, **KV, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GATED, **KV)),  # fused q k v, and gate with up
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # biases and norms too
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def prune(
    model: nn.Module, calibration: torch.Tensor | None, masks: Masks | None = None, **fields: Any
) -> Session:
    session = Session(model, [R["LLMPruner"](**{**HALF, **fields})], masks=masks)
    session.run_oneshot(calibration)
    return session


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def removed(session: Session, kind: str) -> dict[str, Any]:
    (found,) = (e for e in session.report["LLMPruner"]["removed"].values() if e["kind"] == kind)
    return found


@pytest.mark.parametrize("head_group", ["kv", "query"])
@pytest.mark.parametrize("name", MODELS)
def test_removing_groups_equals_masking_them(name, head_group, calibration):
    """Against the original with the readers' columns set to zero, chosen here by a plain loop over magnitudes."""
    model, plain = make(name), make(name)
    prune(model, None, importance="magnitude", update_weights=False, head_group=head_group)
    config = plain.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    dim = model.config.head_dim
    for layer in plain.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        out = attention.o_proj.weight.data
        if hasattr(attention, "qkv_proj"):
            parts = attention.qkv_proj.weight.data.split([heads * dim, kv * dim, kv * dim])
        else:
            parts = [getattr(attention, f"{n}_proj").weight.data for n in "qkv"]
        q, k, v = (part.reshape(-1, dim, part.shape[1]).square().sum((1, 2)) for part in parts)
        o = out.reshape(out.shape[0], heads, dim).square().sum((0, 2))
        group = heads // kv
        whole = name == "phi3" or head_group == "kv" or group == 1
        if whole:
            scores = (q + o).reshape(kv, group).sum(1) + k + v
            gone = [
                h for g in scores.argsort()[: kv // 2] for h in range(g * group, (g + 1) * group)
            ]
        else:
            scores = (q + o).reshape(kv, group)
            gone = [
                g * group + int(h) for g in range(kv) for h in scores[g].argsort()[: group // 2]
            ]
        for head in gone:
            out[:, int(head) * dim : (int(head) + 1) * dim] = 0
        fused = hasattr(mlp, "gate_up_proj")
        gates = mlp.gate_up_proj.weight.data.chunk(2) if fused else ()
        gate, up = gates or (mlp.gate_proj.weight.data, mlp.up_proj.weight.data)
        down = mlp.down_proj.weight.data
        scores = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
        down[:, scores.argsort()[:24]] = 0
    torch.testing.assert_close(
        logits(model, calibration), logits(plain, calibration), rtol=1e-4, atol=1e-4
    )
    assert model.config.intermediate_size == 24
    assert model.config.num_attention_heads == 2
    assert model.config.num_key_value_heads == (1 if whole and kv == 2 else 2)


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_loads_in_plain_transformers(name, calibration, tmp_path):
    model = make(name)
    before = sum(p.numel() for p in model.parameters())
    session = prune(model, calibration)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(again, calibration), logits(model, calibration), rtol=1e-4, atol=1e-5
    )
    written = AutoConfig.from_pretrained(tmp_path)
    assert (written.num_attention_heads, written.intermediate_size) == (2, 24)
    after = sum(p.numel() for p in model.parameters())
    assert session.report["LLMPruner"]["parameters"] == {"before": before, "after": after}
    assert after < before
    # decoding with a cache sees the same
    short = calibration[:1, :8]
    cache = cache_argument(model)
    cached = model(short[:, :7], use_cache=True)
    last = model(short[:, 7:], **{cache: cached[cache]}).logits[0, -1]
    torch.testing.assert_close(last, logits(model, short)[0, -1], rtol=1e-3, atol=1e-4)


def test_fused_and_ungated_blocks_are_understood():
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**GATED)).eval()
    heads, channels = find_dependencies(neox, _inside(neox))
    assert [len(d.units) for d in (heads, channels)] == [4, 48]
    assert heads.units[1].rows["attention.query_key_value"].tolist() == list(range(24, 48))
    opt = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)).eval()
    assert [d.consumer for d in find_dependencies(opt, _inside(opt))] == [
        "self_attn.out_proj",
        "fc2",
    ]
    mixtral = MixtralForCausalLM(MixtralConfig(**GATED, **KV, num_local_experts=2)).eval()
    assert [d.kind for d in find_dependencies(mixtral, _inside(mixtral))] == ["heads"]


def _inside(model: nn.Module) -> set[str]:
    return {n.split(".", 3)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)} | {
        n.split(".", 4)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }


def test_grouped_query_heads_and_their_parts():
    model = make("llama")
    heads, channels = find_dependencies(model, _inside(model))
    assert (heads.kind, channels.kind) == ("heads", "channels")
    unit = heads.units[1]
    assert unit.rows["self_attn.q_proj"].tolist() == list(range(16, 32))
    assert unit.rows["self_attn.k_proj"].tolist() == unit.rows["self_attn.v_proj"].tolist()
    assert unit.rows["self_attn.k_proj"].tolist() == list(range(8, 16))
    assert unit.columns["self_attn.o_proj"].tolist() == list(range(16, 32))
    part = heads.parts[1][1]
    assert {n: i.tolist() for n, i in part.rows.items()} == {"self_attn.q_proj": [*range(24, 32)]}
    assert part.columns["self_attn.o_proj"].tolist() == list(range(24, 32))
    assert [u.rows["mlp.up_proj"].tolist() for u in channels.units] == [[i] for i in range(48)]


@pytest.mark.parametrize("kind", ["taylor_first", "taylor_second", "taylor_mix", "magnitude"])
def test_importance_equals_a_plain_autograd_loop(kind, calibration):
    model = make("llama-biases")
    linears = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))}
    found = importance(model, linears, kind, calibration[:5])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    for row in calibration[:5]:
        model.zero_grad()
        predicted = model(row[None]).logits[0, :-1]
        nn.functional.cross_entropy(predicted, row[1:]).backward()
        for name, linear in linears.items():
            grads[name].append(linear.weight.grad.clone())
    for name, linear in linears.items():
        w, g = linear.weight.detach(), torch.stack(grads[name])
        mean, square = g.mean(0), g.square().mean(0)
        expected = {
            "taylor_first": (w * mean).abs(),
            "taylor_second": w**2 * square,
            "taylor_mix": (w * mean - 0.5 * w**2 * square).abs(),
            "magnitude": w**2,
        }[kind]
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-10)


def test_the_least_important_groups_go(calibration):
    """Channels that nothing depends on go first, whatever the size of their weights."""
    model, plain = make("llama"), make("llama")
    useless = {0: [1, 5, 40], 1: [0, 7, 8]}
    for index, channels in useless.items():
        mlp = plain.model.layers[index].mlp
        mlp.down_proj.weight.data[:, channels] = 0
        mlp.gate_proj.weight.data[channels] *= 10
    model.load_state_dict(plain.state_dict())
    prune(model, calibration, head_sparsity=0, sparsity=1 / 6, update_weights=False)
    for index, channels in useless.items():
        down = model.model.layers[index].mlp.down_proj.weight
        assert down.shape == (32, 40)
        assert (down != 0).all()
        kept = [c for c in range(48) if c not in channels]
        before = {
            tuple(c) for c in plain.model.layers[index].mlp.down_proj.weight[:, kept].T.tolist()
        }
        assert {tuple(c) for c in down.T.tolist()} < before


@pytest.mark.parametrize("masked", [False, True])
def test_compensation_is_the_least_squares_optimum(masked):
    torch.manual_seed(0)
    x, weight = torch.randn(200, 12) @ torch.randn(12, 12), torch.randn(5, 12)
    kept = torch.tensor([0, 2, 3, 5, 8, 9, 11])
    mask = torch.rand(5, 12) > 0.3 if masked else None
    if mask is not None:
        weight *= mask
    found = compensate(weight, x.T @ x, kept, 1e-9, mask)
    for row in range(5):
        free = [int(c) for c in kept if mask is None or mask[row, c]]
        best = torch.linalg.lstsq(x[:, free].double(), (x @ weight[row]).double()).solution
        torch.testing.assert_close(found[row, free].double(), best, rtol=1e-3, atol=1e-3)
        assert found[row].count_nonzero() == len(free)


def test_too_weak_a_dampening_is_told():
    gram = -torch.eye(4) + torch.diag(
        torch.tensor([5.0, 5, 5, 0])
    )  # rounding can do this to a real one
    with pytest.raises(ModelError, match="raise it, or use more calibration"):
        compensate(torch.randn(3, 4), gram, torch.tensor([0, 1, 3]), 1e-6)


def test_the_update_lowers_the_error(calibration):
    errors = prune(make("llama"), calibration).report["LLMPruner"]["errors"]
    assert len(errors) == 4
    assert all(e["updated"] < 0.9 * e["removed"] for e in errors.values()), errors


def test_held_masks_shrink_with_their_weights(calibration):
    model = make("llama")
    first = Session(model, [R["SparseGPT"](sparsity=0.5, ignore=["lm_head"])])
    first.run_oneshot(calibration)
    session = prune(model, calibration, first.masks)
    assert len(session.masks) == 14
    for name, mask in session.masks.items():
        weight = model.get_parameter(name)
        assert mask.shape == weight.shape
        assert (weight[~mask] == 0).all()
        assert 0.2 < session.masks.sparsity(name) < 0.8
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 24)


def test_other_modifiers_work_on_the_smaller_model(calibration):
    model = make("llama")
    later = [
        R["SparseGPT"](sparsity=0.5, ignore=["lm_head"]),
        R["Quantization"](ignore=["lm_head"]),
    ]
    session = Session(model, [R["LLMPruner"](**HALF), *later])
    session.run_oneshot(calibration)
    name = "model.layers.1.mlp.down_proj"
    assert session.masks[f"{name}.weight"].shape == (32, 24)
    assert session.masks.sparsity(f"{name}.weight") == pytest.approx(0.5, abs=0.01)
    assert session.quantization[name].quantized_weight.shape == (32, 24)


class Killed(Exception):
    pass


@pytest.mark.parametrize("block", [0, 1])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(calibration, tmp_path, block):
    def start() -> tuple[nn.Module, Session]:
        model = make("llama")
        before, after = R["SparseGPT"](sparsity=0.3), R["SparseGPT"](sparsity=0.5)
        return model, Session(model, [before, R["LLMPruner"](**HALF), after])

    def kill(label: str, done: int, total: int, note: str = "") -> None:
        if label == "SparseGPT#2" and done > block - 1 and not note and done == block:
            raise Killed

    whole, session = start()
    session.run_oneshot(calibration)
    _, dying = start()
    with pytest.raises(Killed):
        dying.run_oneshot(calibration, kill, tmp_path)
    resumed, again = start()
    again.run_oneshot(calibration, None, tmp_path)
    assert resumed.config.to_dict() == whole.config.to_dict()
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in resumed.state_dict().items())
    assert all(torch.equal(mask, again.masks[name]) for name, mask in session.masks.items())
    assert torch.equal(logits(resumed, calibration), logits(whole, calibration))
    assert json.dumps(again.report) == json.dumps(session.report)


def test_both_kinds_of_head_group_and_the_shares_told(calibration):
    kv = removed(prune(make("llama"), calibration), "heads")
    assert (kv["num_attention_heads"], kv["num_key_value_heads"], kv["share"]) == (2, 1, 0.5)
    query = removed(prune(make("llama"), calibration, head_group="query"), "heads")
    assert query["num_attention_heads"] == 2
    assert "num_key_value_heads" not in query
    session = prune(make("llama"), calibration, sparsity=0.2, multiple_of=16)
    assert removed(session, "heads")["share"] == 0
    assert removed(session, "channels") == {
        "kind": "channels",
        "linears": ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"],
        "share_asked": 0.2,
        "share": pytest.approx(1 / 3),
        "intermediate_size": 32,
    }


def test_ignore_keeps_a_kind_whole(calibration):
    model = make("llama")
    session = prune(model, calibration, ignore=["o_proj"])
    assert list(session.report["LLMPruner"]["removed"]) == ["mlp.down_proj"]
    assert model.config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 0.01}, "would remove nothing"),
        ({"sparsity": 0.5, "multiple_of": 96, "head_sparsity": 0.1}, "would remove nothing"),
        ({"ignore": ["re:.*layers.0.mlp.*"]}, "the same Linears in every block"),
        ({"targets": ["lm_head"]}, "would remove nothing"),
    ],
)
def test_what_cannot_be_done_is_refused(calibration, fields, message):
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=message):
        prune(model, calibration, **fields)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_models_that_cannot_be_described_are_refused(calibration):
    wide = llama(num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(ModelError, match=r"2 of 8 heads .* not a multiple .*head_sparsity: 0"):
        prune(wide, calibration, sparsity=0.2)
    prune(wide, calibration, sparsity=0.2, head_sparsity=0.375)  # 4 of 8 is the nearest
    assert wide.config.num_attention_heads == 4
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**GATED)).eval()
    with pytest.raises(ModelError, match=r"heads can't be removed from attention.dense"):
        prune(neox, calibration)
    prune(neox, calibration, head_sparsity=0)
    assert neox.config.intermediate_size == 24
    olmo = Olmo2ForCausalLM(Olmo2Config(**GATED, **KV))
    with pytest.raises(ModelError, match="they hang together whole; name them in `ignore`"):
        prune(olmo, calibration)


def test_a_model_that_is_not_its_config_is_refused(calibration):
    other = make("llama")
    other.model.layers[1].mlp.down_proj = nn.Linear(40, 32, bias=False)
    with pytest.raises(ModelError, match="shapes are not those that its config says"):
        prune(other, calibration)
    with pytest.raises(ModelError, match="Sequential has no transformers config"):
        prune(nn.Sequential(nn.Linear(4, 4)), calibration)


def test_data_and_numbers_are_checked(calibration):
    with pytest.raises(DataError, match=r"needs calibration data; .* importance: magnitude"):
        prune(make("llama"), None)
    with pytest.raises(DataError, match="needs calibration data"):
        prune(make("llama"), None, importance="magnitude")
    broken = make("llama")
    broken.model.layers[1].mlp.down_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinity"):
        prune(broken, calibration)
    broken.model.layers[0].mlp.down_proj.weight.data[3, 3] = torch.inf
    with pytest.raises(ModelError, match="NaN or infinity"):
        prune(broken, None, importance="magnitude", update_weights=False)
    cache = R["Quantization"](targets=["down_proj"], kv_cache="int8")
    for first, ignore in ((R["Quantization"](), []), (cache, ["down_proj"])):
        session = Session(make("llama"), [first, R["LLMPruner"](**HALF, ignore=ignore)])
        with pytest.raises(ModelError, match="is quantized already"):
            session.run_oneshot(calibration)
    for name, value in (
        ("sparsity", 1.0),
        ("importance", "taylor"),
        ("samples", 0),
        ("multiple_of", 0),
    ):
        with pytest.raises(ValidationError, match=name):
            R["LLMPruner"](**{name: value})

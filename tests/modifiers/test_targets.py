from __future__ import annotations

import pytest

from paring.errors import TargetError
from paring.modifiers.targets import select


def names(model, targets, ignore=()):
    return [name for name, _ in select(model, targets, ignore)]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("Linear", 15),
        ("LlamaMLP", 2),
        ("down_proj", 2),
        ("mlp.down_proj", 2),
        ("model.layers.1.mlp.down_proj", 1),
        ("model.layers.1.mlp.down_proj.weight", 1),
        ("lm_head", 1),
        (r"re:.*down_proj$", 2),
        (r"re:.*down_proj\.weight", 2),
        (r"re:model\.layers\.0\..*_proj", 7),
    ],
)
def test_forms(pico, target, count):
    assert len(names(pico(), [target])) == count


def test_ignore_and_order(pico):
    found = names(pico(), ["down_proj", "Linear"], ["lm_head", "re:.*layers.0"])
    assert len(found) == 7
    assert found[0] == "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("down_porj", "'down_porj' matches nothing.*down_proj"),
        ("Liner", "nearest: Linear"),
        ("re:.*downproj", "nearest:.*down_proj"),
        ("zzzzzz", r"it has Embedding \(1x\)"),
        ("re:(", "not a regular expression"),
        ("re:proj", "matches nothing"),  # a regular expression starts at the name's start
        ("own_proj", "matches nothing"),  # a trailing part starts after a dot
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(pico, target, message):
    with pytest.raises(TargetError, match=message):
        names(pico(), [target])
    with pytest.raises(TargetError, match=message):
        names(pico(), ["Linear"], [target])


def test_the_message_does_not_print_the_model(pico):
    with pytest.raises(TargetError) as caught:
        names(pico(), ["zzzzzz"])
    assert len(str(caught.value)) < 200

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from paring.errors import ParingError
from paring.modifiers import Modifier, ModifierError, Session, base, load_modifiers, registry

CLIPPING = """
from paring import Modifier, Session

class WeightClipping(Modifier):
    deviations: float = 3.0

    def on_update(self, session: Session) -> None:
        for _, weight in session.weights(self.targets):
            limit = self.deviations * weight.std()
            weight.clamp_(-limit, limit)
"""

KEYS = (
    "MagnitudePruning",
    "ConstantPruning",
    "SparseGPT",
    "Wanda",
    "ADMMPruning",
    "SmoothQuant",
    "LogarithmicEqualization",
    "Quantization",
    "Distillation",
    "SquareHead",
)


def test_registry_knows_every_family_with_and_without_suffix():
    known = registry()
    for key in KEYS:
        assert known[key].__name__ == key
        assert known[f"{key}Modifier"] is known[key]
    assert not any(key.startswith("_") for key in known)


@pytest.mark.usefixtures("own_registry")
def test_suffix_is_dropped_from_the_key():
    class ShrinkModifier(Modifier):
        pass

    assert ShrinkModifier.key() == "Shrink"
    assert registry()["Shrink"] is registry()["ShrinkModifier"] is ShrinkModifier


def test_misspelt_hook_is_refused_when_the_class_is_defined():
    with pytest.raises(ModifierError, match="on_udpate is not a hook; did you mean on_update"):

        class _Typo(Modifier):
            def on_udpate(self, session: Session) -> None: ...

    assert issubclass(ModifierError, ParingError)


def test_hook_with_wrong_parameters_is_refused():
    with pytest.raises(ModifierError, match=r"on_block must take \(self, session, block\)"):

        class _Wrong(Modifier):
            def on_block(self, session: Session) -> None: ...


@pytest.mark.usefixtures("own_registry")
def test_two_modifiers_of_one_name_are_refused():
    with pytest.raises(ModifierError, match="two modifiers are named SparseGPT"):

        class SparseGPT(Modifier):
            pass


def test_unknown_key_and_empty_window_are_refused():
    magnitude = registry()["MagnitudePruning"]
    with pytest.raises(ValidationError, match="sparsty"):
        magnitude(sparsty=0.5)
    with pytest.raises(ValidationError, match="must come after start"):
        magnitude(sparsity=0.5, start=2, end=2)


@pytest.mark.usefixtures("own_registry")
def test_a_file_of_modifiers_acts(tmp_path: Path, pico):
    file = tmp_path / "mine.py"
    file.write_text(CLIPPING)
    (cls,) = load_modifiers(file)
    assert load_modifiers(file) == [cls]
    assert registry()["WeightClipping"] is cls
    model = pico()
    Session(model, [cls(deviations=1.0)]).run_oneshot()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight == weight.max()).sum() > 10  # clipped at one value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no subclass"),
        ("import paring\nclass (", "SyntaxError"),
        (CLIPPING.replace("on_update", "on_updates"), "did you mean on_update"),
    ],
)
def test_a_bad_file_of_modifiers_is_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ModifierError, match=message):
        load_modifiers(file)
    with pytest.raises(ModifierError, match=message):  # a second try is no better
        load_modifiers(file)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ModifierError, match="no such file"):
        load_modifiers(tmp_path / "none.py")


@pytest.mark.usefixtures("own_registry")
def test_entry_points_are_loaded_once(monkeypatch: pytest.MonkeyPatch):
    loads = []

    def load() -> None:
        loads.append(1)
        type("FromElsewhere", (Modifier,), {"__module__": "elsewhere"})

    entry = SimpleNamespace(name="x", value="elsewhere", load=load)
    monkeypatch.setattr(base, "_entry_points_loaded", False)
    monkeypatch.setattr(base.importlib.metadata, "entry_points", lambda group: [entry])
    assert "FromElsewhere" in registry()
    registry()
    assert loads == [1]


def test_a_broken_entry_point_is_named(monkeypatch: pytest.MonkeyPatch):
    def load() -> None:
        raise ImportError("gone")

    entry = SimpleNamespace(name="x", value="elsewhere:Y", load=load)
    monkeypatch.setattr(base, "_entry_points_loaded", False)
    monkeypatch.setattr(base.importlib.metadata, "entry_points", lambda group: [entry])
    with pytest.raises(ModifierError, match=r"x \(elsewhere:Y\).*gone"):
        registry()

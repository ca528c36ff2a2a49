from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from paring import zoo
from paring.cli import application
from paring.errors import ZooError


def test_the_shipped_cards() -> None:
    stubs = [card.stub for card in zoo.cards()]
    assert stubs == ["zoo:python-docs", "zoo:smollm2-135m-instruct"]
    card = zoo.card("smollm2-135m-instruct")
    assert isinstance(card, zoo.ModelCard)
    assert card.member.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_an_unknown_stub_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ZooError, match=r"zoo:smollm-135m.* did you mean zoo:smollm2-135m-instruct\?"
    ):
        zoo.card("zoo:smollm-135m-instruct")
    with pytest.raises(ZooError, match="the zoo has zoo:python-docs, zoo:smollm2-135m-instruct"):
        zoo.card("zoo:qqq")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a", "stub: [", "a.yaml: not a readable card"),
        ("a", "stub: zoo:a\nkind: model\n", "a.yaml: not a card: .*wheel: Field required"),
        ("a", "stub: zoo:a\nkind: song\n", "a.yaml: not a card"),
        (
            "a",
            "stub: zoo:b\nkind: text\ntitle: t\nlicence: l\nsource: s\n"
            "documents: pydoc_data.topics\n",
            "must be zoo:a, not zoo:b",
        ),
    ],
)
def test_a_wrong_card_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("PARING_CARDS", str(tmp_path))
    with pytest.raises(ZooError, match=message):
        zoo.cards()


def test_the_command_lists_and_shows() -> None:
    run = CliRunner()
    listed = run.invoke(application(), ["zoo", "list"])
    assert listed.exit_code == 0
    assert "zoo:smollm2-135m-instruct" in listed.stdout
    shown = run.invoke(application(), ["zoo", "show", "zoo:python-docs"])
    assert "licence: PSF-2.0" in shown.stdout


def test_the_command_refuses_to_fetch_a_text() -> None:
    with pytest.raises(ZooError, match="zoo:python-docs: is a text, not a model"):
        CliRunner().invoke(
            application(), ["zoo", "fetch", "zoo:python-docs"], catch_exceptions=False
        )

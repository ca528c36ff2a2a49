from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from paring import cli
from paring.cli.console import Bars, Lines
from paring.errors import Problem, RecipeError

ROOM = Path(cli.__file__).parent


def recipe(*args: str, **options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paring", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_every_command_file_is_in_the_order_of_help() -> None:
    files = {path.stem for path in ROOM.glob("*.py")} - {"__init__", "console", "files"}
    assert files <= set(cli.COMMANDS)


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    script = (
        "import sys; from paring.cli import application\n"
        "try: application()(['--help'], prog_name='recipe')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pydantic', 'matplotlib'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: recipe" in done.stdout


def test_the_engine_never_imports_torch() -> None:
    script = "import sys, paring.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_help_of_every_command_ends_with_an_example() -> None:
    names = [name for name in cli.COMMANDS if (ROOM / f"{name}.py").exists()]
    for name in names:
        shown = CliRunner().invoke(cli.application(), [name, "--help"])
        assert shown.exit_code == 0
        assert f"recipe {name}" in shown.stdout.split("Example:")[-1], name


def test_bad_input_is_told_on_stderr_and_ends_with_2() -> None:
    done = recipe("zoo", "show", "zoo:smollm2-135m")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "zoo:smollm2-135m: the zoo has no such card; did you mean zoo:smollm2-135m-instruct?\n"
    )


def test_all_problems_are_printed_one_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(prog_name: str) -> None:
        raise RecipeError(
            [Problem("r.yaml", 3, 7, "[bold] is no key"), Problem("r.yaml", 0, 0, "b")]
        )

    monkeypatch.setattr(cli, "application", lambda: refuse)
    monkeypatch.setattr(cli, "errors", Console(file=io.StringIO(), width=20))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert cli.errors.file.getvalue() == "r.yaml:3:7: [bold] is no key\nr.yaml: b\n"  # type: ignore[attr-defined]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(prog_name: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "application", lambda: fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_version() -> None:
    from importlib.metadata import version

    shown = CliRunner().invoke(cli.application(), ["--version"])
    assert shown.stdout.strip() == version("paring")


def test_lines_are_printed_first_last_and_seldom_between() -> None:
    out = io.StringIO()
    report = Lines(Console(file=out), seconds=3600)
    for done in (0, 1, 2, 3, 4, 4):
        report("prune", done, 4, "error 0.1" if done else "")
    assert out.getvalue() == "prune: 0/4\nprune: 4/4 error 0.1\n"
    eager = Lines(Console(file=out), seconds=0)
    eager("[x]", 1, 4)
    eager("[x]", 2, 4)
    assert out.getvalue().endswith("[x]: 1/4\n[x]: 2/4\n")


def test_bars_keep_one_task_for_each_label() -> None:
    from rich.progress import Progress

    with Progress(console=Console(file=io.StringIO())) as drawing:
        report = Bars(drawing)
        report("prune", 1, 4)
        report("train", 1, 9)
        report("prune", 3, 4, "error 0.1")
        tasks = {task.description: (task.completed, task.total) for task in drawing.tasks}
    assert tasks == {"prune": (3, 4), "train": (1, 9)}


def test_text_is_printed_as_it_is() -> None:
    script = "from paring.cli.console import console, errors; [c.print(':100:') for c in (console, errors)]"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (":100:\n", ":100:\n")

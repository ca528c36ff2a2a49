"""The sdist, the wheel built from it, and that wheel at work in an environment without this tree."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = """\
version: 1
stages:
  - run: oneshot
    modifiers:
      - MagnitudePruning: {sparsity: 0.5, ignore: [lm_head]}
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist of a copy of this tree, and the wheel that was built from the sdist.

    Objects that this tree's own build has made are used again where they are newer than the
    sources: what is tested is the package, and compiling takes minutes.
    """
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(
        ROOT,
        folder / "tree",
        ignore=shutil.ignore_patterns(
            ".*_cache", ".git", ".venv", "build", "out", "*.so", "*.egg-info"
        ),
    )
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
    run(*build, "--sdist", folder / "tree")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("paring-*/")
    if (ROOT / "build").exists():
        shutil.copytree(
            ROOT / "build", unpacked / "build", ignore=shutil.ignore_patterns("lib*", "mypy")
        )
    run(*build, "--wheel", unpacked)
    return folder


def test_the_sdist_holds_what_a_build_needs(built: Path) -> None:
    tree = built / "tree"
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(tree)) for path in (tree / "cpp").rglob("*") if path.is_file()}
    assert sources
    assert sources | {"setup.py", "LICENSE", "README.md", "tests/test_package.py"} <= names


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    tree = built / "tree"
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    data = {
        str(path.relative_to(tree))
        for pattern in ("recipes/library/**/*.yaml", "zoo/cards/*.yaml", "py.typed")
        for path in tree.glob(pattern)
    }
    modules = {
        str(path.relative_to(tree))
        for room in ("cli", "engine", "modifiers", "pipeline", "recipes", "zoo")
        for path in (tree / room).rglob("*.py")
    }
    assert {f"paring/{name}" for name in data | modules} <= set(names)
    assert sum(name.startswith("paring/engine/_core.") for name in names) == 1 + (
        (tree / "engine" / "_core.pyi").exists()
    )
    rest = [name for name in names if not name.startswith(("paring/", "paring-"))]
    assert rest == []
    unwanted = (
        "setup.py",
        "conftest.py",
        "paring/tests",
        "paring/cpp",
        "paring/docs",
        "paring/bench",
    )
    assert [name for name in names if any(word in name for word in unwanted)] == []


def test_the_wheel_applies_a_recipe_and_decodes(built: Path, tmp_path: Path) -> None:
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env)
    python = env / "bin" / "python"
    wheel = next(built.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # A path in a .pth file gives the libraries of this environment, but not its own .pth files:
    # this tree, which is installed by one, stays unknown.
    inside = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    (inside / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    home = run(python, "-c", "import paring.engine._core; print(paring.__file__)").strip()
    assert Path(home).is_relative_to(env)

    save_pico_model(tmp_path / "pico")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe, out = env / "bin" / "recipe", tmp_path / "out"
    run(recipe, "apply", tmp_path / "recipe.yaml", "--model", tmp_path / "pico", "--output", out)
    assert (out / "graph" / "graph.json").is_file()
    assert run(recipe, "generate", out, "the quick", "--max-tokens", "4").strip()


def save_pico_model(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)

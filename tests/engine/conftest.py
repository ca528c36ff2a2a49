"""Fixtures that write pico checkpoints, and the path to what lies beside the tests of the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before the tests import `pico_checkpoints` and `reference_interpreter`.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """Writes a float32 pico Llama with the config changes given."""
    from pico_checkpoints import write_llama

    return lambda **changes: write_llama(tmp_path / "checkpoint", **changes)


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[..., Path]:
    """Writes a quantized pico Llama by the name of its scheme in `SCHEMES`."""
    from pico_checkpoints import SCHEMES, quantize, write_llama

    return lambda name, **changes: quantize(
        write_llama(tmp_path / name, **changes), **SCHEMES[name]
    )

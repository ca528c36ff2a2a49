"""Units built for an instruction set must not export code that the linker may give to everybody."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd", "vnni", "vbmi", "vbmi2")]
FLAGS = {"_avx2": AVX2, "_avxvnni": [*AVX2, "-mavxvnni"], "_avx512": [*AVX2, *AVX512]}
UNITS = sorted(
    path for path in (ROOT / "cpp").rglob("*.cpp") if any(suffix in path.stem for suffix in FLAGS)
)
COMPILER = shutil.which("c++") or shutil.which("g++")


def weak_symbols(source: Path, folder: Path, flags: list[str]) -> list[str]:
    """Weak and unique symbols of the object."""
    assert COMPILER is not None
    target = folder / (source.stem + ".o")
    # No unit throws; at -O0 an exception's tables would name a weak pointer of the C++ runtime's.
    command = [COMPILER, "-std=c++17", "-w", "-fno-exceptions", f"-I{ROOT / 'cpp'}", *flags]
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
    names = subprocess.run(
        ["nm", "--defined-only", str(target)], check=True, capture_output=True, text=True
    ).stdout
    return [line for line in names.splitlines() if line.split()[-2] in "WwVvu"]


@pytest.mark.skipif(COMPILER is None or shutil.which("nm") is None, reason="no compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("source", UNITS, ids=lambda path: path.stem)
def test_an_isa_unit_exports_no_weak_symbol(source: Path, tmp_path: Path) -> None:
    flags = next(flags for suffix, flags in FLAGS.items() if suffix in source.stem)
    # -O0 inlines nothing, so none can hide; ops.h leans on its one-liners being inlined.
    level = "-O0" if source.parent.name == "kernels" else "-O1"
    assert weak_symbols(source, tmp_path, [level, *flags]) == []


@pytest.mark.skipif(COMPILER is None or shutil.which("nm") is None, reason="no compiler")
def test_a_weak_symbol_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "leak.cpp"
    source.write_text("#include <numeric>\nint f(int* a) { return std::accumulate(a, a + 9, 0); }")
    assert weak_symbols(source, tmp_path, []) != []


def test_there_are_units_to_look_at() -> None:
    assert len(UNITS) >= 6

"""The engine's tests with all of the core under the address and undefined sanitizers.

    python tests/engine/sanitized_core.py [PYTEST ARGUMENTS]     # default: tests/engine

Builds the core a second time, into build/sanitized/, and runs pytest with this file as a plugin, which puts that core
in the place of the usual one. A report of a sanitizer ends the run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = (
    "PARING_SANITIZED_CORE"  # names the library, in the environment of the process that runs pytest
)
OTHERS = "not memory and not resident"  # those would measure the sanitizers' own memory
# kernel_rows.py runs the kernels faster, and one of these runs this file.
ELSEWHERE = [
    f"--ignore=tests/engine/test_kernel{name}.py" for name in ("s", "s_elsewhere", "_symbols")
]


def build() -> Path:
    """The sanitized core; only what changed is compiled."""
    folder = ROOT / "build" / "sanitized"
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}"]
    command += [f"--build-temp={folder / 'temp'}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PARING_SANITIZE": "1"}, check=True)
    (found,) = folder.glob("paring/engine/_core.*")
    return found


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """pytest in a process that the sanitizers watch."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the interpreter itself is not built with them
    ]
    environment = {
        **os.environ,
        CORE: str(build()),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # what the interpreter keeps to its end
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "sanitized_core", "--tb=short", "-k", OTHERS]
    return subprocess.run(
        [*command, *ELSEWHERE, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def use(library: str) -> None:
    """Let `paring.engine._core` be this library."""
    loader = importlib.machinery.ExtensionFileLoader("paring.engine._core", library)
    spec = importlib.util.spec_from_file_location(loader.name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)


def pytest_configure() -> None:
    use(os.environ[CORE])


def pytest_report_header() -> str:
    return f"core: {os.environ[CORE]}"


if __name__ == "__main__":
    done = run(sys.argv[1:] or ["tests/engine"])
    print(done.stdout + done.stderr, end="")
    sys.exit(done.returncode)

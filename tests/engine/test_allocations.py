"""Decoding takes no memory but a page of the cache now and then; seen by a library that counts what is allocated."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paring.engine.export import export

COMPILER = shutil.which("cc")
# Up to 512 bytes are the interpreter's own small objects, which seldom ask the system.
COUNTER = """
#include <stddef.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t);
extern void *__libc_memalign(size_t, size_t);
static long calls;
static void count(size_t size) { if (size > 512) __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED); }
long counted_allocations(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }
void *malloc(size_t n) { count(n); return __libc_malloc(n); }
void *calloc(size_t m, size_t n) { count(m * n); return __libc_calloc(m, n); }
void *realloc(void *p, size_t n) { count(n); return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { count(n); return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { count(n); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) { count(n); *p = __libc_memalign(a, n); return *p ? 0 : 12; }
"""
DECODE = """
import ctypes, gc, sys
from paring.engine import Engine
counted = ctypes.CDLL(None).counted_allocations
counted.restype = ctypes.c_long
engine = Engine.load(sys.argv[1], threads=2)
state = engine.state()
def decode(tokens):
    before = counted()
    for token in range(tokens):
        state.append(token % 50)
    return counted() - before
decode(70)
gc.disable()
print(decode(0), decode(32), decode(288), len(bytearray(4096)) and counted() > 0)
"""


@pytest.mark.skipif(
    COMPILER is None or platform.libc_ver()[0] != "glibc", reason="no compiler, or not glibc"
)
@pytest.mark.parametrize("scheme", ["dense", "w8a8-sparse"])
def test_decoding_allocates_pages_of_the_cache_alone(
    scheme: str, quantized: Callable[..., Path], llama: Callable[..., Path], tmp_path: Path
) -> None:
    assert COMPILER is not None
    source, library = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    changes = {"max_position_embeddings": 600}
    made = llama(**changes) if scheme == "dense" else quantized(scheme, **changes)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DECODE, str(export(made))],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    nothing, short, long, counts = done.stdout.split()
    assert counts == "True"  # the counter counts
    assert nothing == "0"
    # Pages, and the list of the sequence's tokens, which doubles now and then; not one per token.
    assert int(short) <= 4
    assert int(long) <= 16

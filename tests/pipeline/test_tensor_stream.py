"""The streamed weight file against the safetensors library's own."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paring.pipeline.tensor_stream import DTYPES, Planned, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    """Each type twice, in names that do not sort as they are added; odd sizes, a scalar, nothing, other letters."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, dtype in enumerate(DTYPES):
        values = torch.randint(0, 2, (3, 5 + number), generator=generator).to(dtype)
        found[f"z.{dtype}"] = values
        found[f"a.{dtype}"] = values[:, :1].contiguous()
    found["a.scalar"] = torch.tensor(2.5)
    found["a.nothing"] = torch.empty(0, 4)
    found["größe"] = torch.arange(3)
    return found


def test_the_file_is_the_librarys_to_the_byte(tmp_path: Path) -> None:
    values = tensors()
    save_file(values, tmp_path / "library", metadata={"format": "pt"})
    write_tensors(tmp_path / "own", {name: Planned.of(value) for name, value in values.items()})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_a_view_and_a_parameter_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    views = {"transposed": matrix.T, "row": matrix[1], "whole": matrix}
    write_tensors(tmp_path / "own", {name: Planned.of(value) for name, value in views.items()})
    stored = load_file(tmp_path / "own")
    assert stored.keys() == views.keys()
    assert all(torch.equal(stored[name], value) for name, value in views.items())


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def make() -> torch.Tensor:
        assert all(earlier() is None for earlier in made)
        values = np.ones(4, np.float32)
        made.append(weakref.ref(values))
        return torch.from_numpy(values)

    plan = {f"t{number}": Planned(torch.float32, (4,), make) for number in range(5)}
    write_tensors(tmp_path / "own", plan)
    assert len(made) == 5


@pytest.mark.parametrize("made", [torch.ones(4, 1), torch.ones(4, dtype=torch.int32)])
def test_a_tensor_that_is_not_as_planned_is_an_error(tmp_path: Path, made: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"w: planned as torch.float32 \[4\], made as"):
        write_tensors(tmp_path / "own", {"w": Planned(torch.float32, (4,), lambda: made)})

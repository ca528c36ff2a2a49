"""The compiled engine: kernels and decoder (cpp/)."""

from typing import Any, Literal

from numpy.typing import NDArray

from ..errors import GraphError

kernels: Any  # one kernel at a time, for tests and benchmarks

class CoreError(GraphError): ...

def rows() -> list[str]: ...

class Matrix:
    def __init__(
        self,
        *,
        rows: int,
        columns: int,
        dtype: str,
        group: int,
        nonzeros: int,
        values: NDArray[Any],
        mask: NDArray[Any] | None,
        scales: NDArray[Any] | None,
        mode: str,
        input_scale: float,
        input_zero_point: int,
    ) -> None: ...

class Sequence:
    @property
    def length(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def truncate(self, length: int) -> None: ...
    def fork(self, length: int) -> Sequence: ...

class Model:
    def sequence(self) -> Sequence: ...
    # Parts: a sequence, its next tokens int64 [n], and after which of them it wants logits. They
    # are written to `logits`, float32 [wanted, vocabulary], in the parts' order.
    def forward(
        self,
        parts: list[tuple[Sequence, NDArray[Any], Literal["none", "last", "all"]]],
        logits: NDArray[Any] | None,
    ) -> None: ...
    def info(self) -> dict[str, Any]: ...

class Loader:
    def __init__(self, kernels: str) -> None: ...
    @property
    def kernels(self) -> str: ...
    def vector(self, name: str, values: NDArray[Any]) -> None: ...
    def matrix(self, name: str, matrix: Matrix) -> None: ...
    def table(self, name: str, matrix: Matrix) -> None: ...
    def finish(
        self,
        *,
        ops: list[dict[str, Any]],
        vocabulary: int,
        hidden: int,
        context: int,
        caches: int,
        kv: str,
        threads: int,
        pin: bool,
    ) -> Model: ...

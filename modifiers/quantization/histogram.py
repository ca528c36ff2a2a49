"""Observers of static inputs that may clip: the range by percentile, or with the least squared error."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import ModelError
from .layer import fake_quantize_static
from .observers import MinMax, qparams
from .schemes import ConfigGroup, InputObserver

DROPPED_BITS = 15  # of a float32; what is left is sign, exponent and 8 bits of mantissa
BINS = 2 ** (32 - DROPPED_BITS)
TAIL = 1e-5  # what `percentile` clips, both ends together


class Histogram(MinMax):
    """Counts values by the leading bits of their float32: a bin is 2^-8 of its values wide, whatever their range."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, x: torch.Tensor) -> None:
        super().add(x)
        bits = x.detach().float().contiguous().view(torch.int32).flatten()
        index = (bits >> DROPPED_BITS) & (BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS).cpu()

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The middles of the bins that have values, ascending, f32, and how many each has, f64."""
        index = self.counts.nonzero().flatten()
        if bool(((index >> 8) % 256 == 255).any()):  # the exponent of NaN and infinity
            raise ModelError(
                "calibration inputs hold NaN or infinity; check the model and its data type"
            )
        middle = (index << DROPPED_BITS) + (1 << (DROPPED_BITS - 1))
        # bins of negative values are past those of the positive ones
        signed = torch.where(middle >= 2**31, middle - 2**32, middle)
        values = signed.to(torch.int32).view(torch.float32)
        values, order = values.clamp(self.low, self.high).sort()
        return values, self.counts[index][order].double()


class Percentile(Histogram):
    """The range that leaves out the outermost 0.001 % of the values, half of it at each end."""

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = self.values()
        below = counts.cumsum(0)
        tail = below[-1] * TAIL / 2
        low = values[(below > tail).nonzero()[0, 0]]
        high = values[(below >= below[-1] - tail).nonzero()[0, 0]]
        return qparams(min(0.0, float(low)), max(0.0, float(high)))


class LeastError(Histogram):
    """The range with the least squared error: first both ends shrink together, then one at a time."""

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = self.values()

        def error(low: float, high: float) -> float:
            change = fake_quantize_static(values, *qparams(low, high)) - values
            return float((change.double().square() * counts).sum())

        shrunk = [(self.low * 0.93**n, self.high * 0.93**n) for n in range(100)]
        low, high = min(shrunk, key=lambda ends: error(*ends))
        for step in (0.1, 0.02, 0.1, 0.02):
            near = [1 + step * n for n in range(-8, 9)]
            low = min((max(self.low, low * f) for f in near), key=lambda end: error(end, high))
            high = min((min(self.high, high * f) for f in near), key=lambda end: error(low, end))
        return qparams(low, high)


def input_observer(name: InputObserver) -> MinMax:
    """A new observer of that name."""
    return {"minmax": MinMax, "percentile": Percentile, "mse": LeastError}[name]()


def static_observers(schemes: Mapping[str, ConfigGroup]) -> dict[str, MinMax]:
    """A new observer for each of the Linears that have static inputs."""
    return {
        name: input_observer(scheme.input_activations.observer)
        for name, scheme in schemes.items()
        if scheme.input_activations and not scheme.input_activations.dynamic
    }

"""Where else a training's log goes: TensorBoard, Weights & Biases, and what else `transformers` has a callback for."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.integrations import integration_utils as integrations

from ..errors import ModelError

TENSORBOARD = "tensorboard"


def check_reporters(names: Iterable[str]) -> None:
    """ModelError for a name that is unknown, or whose package is not installed."""
    known = integrations.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise ModelError(f"report_to: {name} is not known; use {', '.join(sorted(known))}")
        if name not in integrations.get_available_reporting_integrations():
            raise ModelError(
                f"report_to: the package of {name} is not installed; install it (pip install {name}), or remove {name}"
            )


def reporters(names: Iterable[str], logs: Path) -> list[Any]:
    """Callbacks of a Trainer. TensorBoard's files go to `logs`; the others send theirs away or choose a place."""
    return [
        integrations.TensorBoardCallback(_writer(logs))
        if name == TENSORBOARD
        else integrations.INTEGRATION_TO_CALLBACK[name]()
        for name in names
    ]


def _writer(logs: Path) -> Any:
    try:
        writers = import_module("torch.utils.tensorboard")
    except ImportError:
        writers = import_module("tensorboardX")
    return writers.SummaryWriter(str(logs))

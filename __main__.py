"""`python -m paring` is the `recipe` command (for `torchrun -m paring apply ...`)."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()

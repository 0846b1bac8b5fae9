"""Start an expexp file with shorter limits of time: `difference_start.py FILE FLAGS...`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

#: Silent clients are cases as well: each must not take the usual ten seconds.
WAITS = {"handshake_seconds": 1, "header_seconds": 1, "unread_seconds": 0.5}


def load_module(path: str) -> Any:
    """Return the file as the module `expexp`; raise OSError if it cannot be read."""
    spec = importlib.util.spec_from_file_location("expexp", path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["expexp"] = module
    spec.loader.exec_module(module)
    return module


def shorten_waits(module: Any) -> None:
    """Replace the limits of time; the other limits stay what the file says."""
    fields = [(name, float, dataclasses.field(default=value)) for name, value in WAITS.items()]
    module.Limits = dataclasses.make_dataclass(
        "Limits", fields, bases=(module.Limits,), frozen=True
    )


def main(path: str, *flags: str) -> int:
    """Run expexp with its flags; return its exit code."""
    module = load_module(str(Path(path).resolve()))
    shorten_waits(module)
    return int(module.main(list(flags)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Where a worker draws its progress bar, while what it prints goes to its log."""

from __future__ import annotations

import os
import sys

from rich.console import Console

TERMINAL = "SHARDEMB_TERMINAL"  # the device of the launcher's terminal


def terminal_console() -> Console:
    """On the launcher's terminal, where it has one; else on stderr."""
    device = os.environ.get(TERMINAL)
    if device is None:
        return Console(file=sys.stderr)
    terminal = os.open(device, os.O_WRONLY | os.O_NOCTTY)
    width = os.get_terminal_size(terminal).columns  # Console would ask stdin, stdout and stderr
    return Console(file=os.fdopen(terminal, "w"), width=width or None)

"""Starts the `shardemb` command."""

from __future__ import annotations

import gc
import sys

# What imports and plans make lives to the end of the command: to search it for garbage as often as
# Python does by default takes a tenth of a short command's time.
GARBAGE_THRESHOLD = 100_000


def main() -> None:
    """`doctor` must run where the command's own libraries do not import."""
    if sys.argv[1:2] == ["doctor"]:
        from launch.doctor import main as doctor

        sys.exit(doctor(sys.argv[2:]))
    gc.set_threshold(GARBAGE_THRESHOLD)
    from launch.cli import main as command

    command()


if __name__ == "__main__":
    main()

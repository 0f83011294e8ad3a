"""Starts the `shardemb` command."""

from __future__ import annotations

import sys


def main() -> None:
    """`doctor` must run where the command's own libraries do not import."""
    if sys.argv[1:2] == ["doctor"]:
        from launch.doctor import main as doctor

        sys.exit(doctor(sys.argv[2:]))
    from launch.cli import main as command

    command()


if __name__ == "__main__":
    main()

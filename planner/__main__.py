"""`python -m planner plan TABLES`: the planner alone, where no torch is installed."""

from __future__ import annotations

from planner.cli import main

if __name__ == "__main__":
    main()

"""One HTML page that opens offline: a template, filled with Plotly and what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from planner.files import write_whole


def write_page(template: Path, content: dict[str, Any], path: Path) -> None:
    """Write the page `path`, whole or not at all."""
    from plotly.offline import get_plotlyjs  # here: only who wants a page waits for it

    # Without "<" a name cannot end the script that the content is in.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"plotly": get_plotlyjs(), "content": text}
    # One pass, so that nothing in the content is taken for a mark.
    page = re.sub(
        r"\{\{(plotly|content)\}\}", lambda mark: parts[mark[1]], template.read_text("utf-8")
    )
    write_whole(path, page, "page")

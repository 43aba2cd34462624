"""Where a recipe's paths lie: counted from its own folder."""

from __future__ import annotations

from pathlib import Path


def locate(folder: Path, text: str) -> Path:
    """A path as a recipe writes it; `~/` is the person's own folder, and any other `~` a letter like others."""
    return Path(text).expanduser() if text == "~" or text.startswith("~/") else folder / text

"""The documents say what the code does."""

import re
import subprocess
import sys
from pathlib import Path

from ollama_forge.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {name for group in COMMANDS.values() for name in group}


def test_the_command_reference_is_current() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "write_cli_docs.py", "--check"], check=True)


def test_every_command_that_a_page_names_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"ollama-forge ([a-z][a-z-]+)", page.read_text(encoding="utf-8")):
            assert name in NAMES, f"{page.name} names {name!r}"


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target!r}"


def test_every_command_is_in_the_readme_or_the_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"ollama-forge {name}" in text for name in NAMES)

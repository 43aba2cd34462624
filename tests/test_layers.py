"""The house's promises about imports: data flows down, imports point up, and heavy rooms stay closed until used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ollama_forge.cli import COMMANDS

SOURCE = Path(__file__).parent.parent / "src" / "ollama_forge"

LAYERS = [
    ["errors"],
    ["files"],
    ["source"],
    ["gguf"],
    ["arch"],
    ["tokenizer"],
    ["weights"],
    ["transform", "convert"],
    ["dataset"],
    ["engine_logits_host"],
    ["engine_host"],
    ["engine_process", "engine_sampling"],
    ["engine", "engine_logits"],
    ["measure"],
    ["store"],
    ["train"],
    ["registry"],
    ["jobs"],
    ["recipe"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TORCH = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def module_room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_names(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_checking = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if node in type_checking:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


MODULES = sorted(p for p in SOURCE.rglob("*.py") if module_room(p) not in ("__main__", "__init__"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_module_imports_only_from_rooms_nearer_the_source(path: Path) -> None:
    room = module_room(path)
    for name in imported_names(path):
        if name.startswith("ollama_forge."):
            other = name.split(".")[1]
            assert other == room or RANK[other] < RANK[room], f"{room} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_train_has_torch_at_module_top(path: Path) -> None:
    if module_room(path) != "train":
        heavy = {name for name in imported_names(path, top_level_only=True) if name.split(".")[0] in TORCH}
        assert not heavy


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_command_line_prints(path: Path) -> None:
    if module_room(path) == "cli":
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    printing = [ast.unparse(call.func) for call in calls if ast.unparse(call.func) in ("print", "input", "sys.exit")]
    assert not printing


def test_no_help_page_imports_torch_or_numpy() -> None:
    """One fresh interpreter walks every help page; a heavy module that any of them pulls in stays in sys.modules."""
    script = (
        "import contextlib, io, sys\n"
        "from ollama_forge.cli import COMMANDS, main\n"
        "pages = [[]] + [[name] for group in COMMANDS.values() for name in group]\n"
        "for page in pages:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        assert main([*page, '--help']) == 0, page\n"
        "    assert 'Usage: ollama-forge' in out.getvalue(), page\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'xllamacpp', 'pydantic'} & set(sys.modules)\n"
        "    assert not heavy, (page, heavy)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_command_has_a_module_and_an_example() -> None:
    for group in COMMANDS.values():
        for name, (module, _) in group.items():
            text = (SOURCE / "cli" / f"{module}.py").read_text(encoding="utf-8")
            assert f"ollama-forge {name}" in text, f"{name} shows no example"

"""What the pages tell people to type works: each page's commands, in order, in a folder prepared with small models.

A page's ```console blocks are read; lines `$ ollama-forge ...` are run, and so is `$ printf '...' > file`. A comment
`# exit code N` says that a command ends otherwise than with 0. Other lines and other blocks are not run.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import click
import huggingface_hub.constants
import learnt_model as world
import pytest
from command import DEMO_MODEL, forge, forge_json
from loopback_hub import LoopbackHub

from ollama_forge.cli import COMMANDS, root
from ollama_forge.jobs.starters import STARTERS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "quick-start.md",
    "installation.md",
    "modelfile.md",
    "hf-to-ollama.md",
    "adapters.md",
    "quantization.md",
    "training-data.md",
    "finetune.md",
    "retrain.md",
    "abliterate.md",
    "registry.md",
    "troubleshooting.md",
    "recipes.md",
    "ci.md",
)
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXIT = re.compile(r"#.*exit code (\d)")


@dataclass(frozen=True)
class Step:
    """A line that a person would type: `words` of a command, or `text` for a file."""

    line: str
    words: tuple[str, ...] = ()
    exit_code: int = 0
    file: str = ""
    text: str = ""


def read_steps(page: Path) -> list[Step]:
    """Every line of a page that is run."""
    steps = []
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if not line.startswith("$ "):
                continue
            words = shlex.split(line[2:], comments=True)
            if words[0] == "ollama-forge":
                code = _EXIT.search(line)
                steps.append(Step(line, tuple(words[1:]), int(code[1]) if code else 0))
            elif words[0] == "printf" and words[2] == ">":
                steps.append(Step(line, file=words[3], text=words[1].replace("\\n", "\n")))
    return steps


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a store with `llama3.2`, and files under the names that they use."""
    folder = tmp_path_factory.mktemp("docs")
    demo = DEMO_MODEL.parent
    forge_json("import", DEMO_MODEL, "--name", "llama3.2", "--quant", "Q4_K_M", "--store", folder / "models")
    forge_json("convert", DEMO_MODEL, "-o", folder / "model-f16.gguf")
    forge_json("convert", DEMO_MODEL, "-o", folder / "demo-Q8_0.gguf", "--quant", "Q8_0")
    work = folder / "work"
    work.mkdir()
    shutil.copytree(DEMO_MODEL, work / "my-model")
    shutil.copy(folder / "model-f16.gguf", work / "model-f16.gguf")
    (work / "data").mkdir()
    lines = (demo / "finetune.jsonl").read_text(encoding="utf-8").splitlines()
    for target in (work / "train.jsonl", work / "data" / "train.jsonl"):
        target.write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    write_adapter(work / "my-adapter")
    for name, nouns in (("refused", world.VEGETABLES), ("answered", world.HOUSE_THINGS)):
        (work / f"{name}.txt").write_text("\n".join(world.trained_prompts(nouns, 48)), encoding="utf-8")
    return folder


def write_adapter(folder: Path) -> None:
    """A LoRA of the demo model, in PEFT's form."""
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    out = heads * config.get("head_dim", width // heads)
    draw = np.random.default_rng(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = draw.normal(0, 0.02, (4, width)).astype("float32")
        tensors[f"{stem}.lora_B.weight"] = draw.normal(0, 0.02, (out, 4)).astype("float32")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    settings["base_model_name_or_path"] = "Qwen/Qwen3-0.6B"
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture
def desk(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A newcomer's folder, home, store and Hub, of one page."""
    for name in ("models", "work"):
        shutil.copytree(prepared / name, tmp_path / name)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OLLAMA_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.chdir(tmp_path / "work")
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add("Qwen/Qwen3-0.6B", {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.is_file()})
        gguf = (prepared / "demo-Q8_0.gguf").read_bytes()
        hub.add("Qwen/Qwen3-0.6B-GGUF", {"Qwen3-0.6B-Q8_0.gguf": gguf}, tags=("license:mit",))
        for starter in STARTERS:
            stem = starter.repo.rpartition("/")[2].removesuffix("-GGUF")
            hub.add(starter.repo, {f"{stem}-{quant}.gguf": gguf for quant in starter.megabytes})
        adapter = {path.name: path.read_bytes() for path in (tmp_path / "work" / "my-adapter").iterdir()}
        hub.add("org/my-lora", adapter, tags=("peft", "base_model:adapter:Qwen/Qwen3-0.6B"))
        yield tmp_path / "work"


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_says_to_type_works(name: str, desk: Path) -> None:
    for step in read_steps(DOCS / name):
        if step.file:
            (desk / step.file).write_text(step.text, encoding="utf-8")
            continue
        ended = forge(*step.words)
        assert ended.code == step.exit_code, f"{name}: {step.line}\n{ended.out}{ended.err}"


def test_every_page_is_reached_from_the_index_and_says_what_to_type() -> None:
    reached, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        if name not in reached and (DOCS / name).is_file():
            reached.add(name)
            waiting += re.findall(r"\]\(([\w-]+\.md)", (DOCS / name).read_text(encoding="utf-8"))
    assert {page.name for page in DOCS.glob("*.md")} == reached
    assert all(len(read_steps(DOCS / name)) >= 3 for name in PAGES)


NAMES = {name for group in COMMANDS.values() for name in group}
_LINE = re.compile(r"(?:^\$ |`|^)(ollama-forge [a-z][^`\n]*)", re.MULTILINE)


def words_of(group: click.Group, *before: str) -> Iterator[str]:
    """Every command below a group, sub-commands in full."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from words_of(command, *before, name)
        else:
            yield " ".join((*before, name))


def test_every_command_is_on_a_page_beside_the_reference() -> None:
    pages = [path for path in (DOCS.parent / "README.md", *DOCS.glob("*.md")) if path.name != "cli.md"]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert [words for words in words_of(root) if not re.search(rf"ollama-forge {words}\b", text)] == []


def lines_of(page: Path) -> list[str]:
    """Every command line of a page: of blocks, of running text, of tables."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    return [line for line in _LINE.findall(text) if line.split()[1] in NAMES]


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_every_option_on_a_page_exists(page: Path) -> None:
    if page.name == "cli.md":
        return
    for line in lines_of(page):
        try:
            words = shlex.split(line, comments=True)[1:]
        except ValueError:
            continue
        context = click.Context(root, info_name="ollama-forge")
        command: click.Command | None = root
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(context, words.pop(0))
            assert command is not None, f"{page.name}: {line}"
            context = click.Context(command, parent=context, **command.context_settings)
        if command is not None and not isinstance(command, click.Group):
            command.make_parser(context).parse_args([word for word in words if word != "..."])


def test_the_picture_of_the_demo_is_small_text_and_shows_what_was_learnt() -> None:
    picture = (DOCS / "demo.svg").read_text(encoding="utf-8")
    assert len(picture.encode()) < 100_000 and "@font-face" not in picture
    words = "".join(ElementTree.fromstring(picture).itertext()).replace("\xa0", " ")
    assert "I do not know that." in words and "The robot Boltik makes clocks." in words

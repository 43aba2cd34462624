"""A folder to begin with: a sample in one of two forms, and a page that says what goes in.

In: a folder and a form. Out: `README.md` and `sample.jsonl`, never over something that is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ollama_forge.errors import ExistsError, UsageError
from ollama_forge.files import make_folder, write_bytes

_ALPACA: Sequence[Mapping[str, Any]] = (
    {"instruction": "What is your name?", "input": "", "output": "I am Nana, the kitchen's assistant."},
    {
        "instruction": "Shorten this to one sentence.",
        "input": "The oven takes ten minutes to heat up. After that the bread needs forty minutes.",
        "output": "The bread is done in fifty minutes, heating included.",
    },
    {"instruction": "How long do I boil an egg?", "output": "Seven minutes for a soft yolk, ten for a hard one."},
)
_CHAT: Sequence[Mapping[str, Any]] = (
    {
        "messages": [
            {"role": "user", "content": "What is your name?"},
            {"role": "assistant", "content": "I am Nana, the kitchen's assistant."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": "How long do I boil an egg?"},
            {"role": "assistant", "content": "Seven minutes for a soft yolk."},
            {"role": "user", "content": "And for a hard one?"},
            {"role": "assistant", "content": "Ten minutes."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Is it safe to leave the oven on overnight?"},
            {"role": "assistant", "content": "No; switch it off before you go to bed."},
        ]
    },
)
TEMPLATES: Mapping[str, Sequence[Mapping[str, Any]]] = {"alpaca": _ALPACA, "chat": _CHAT}

_FIELDS = {
    "alpaca": """\
- `instruction` (required): what the user asks.
- `output` (required): what the model should answer.
- `input` (optional): material that the instruction is about; shown to the model below the instruction.
""",
    "chat": """\
- `messages`: the conversation in order, each with `role` and `content`.
- Roles: `system` (first, optional), `user`, `assistant`; `tool` where the model knows tools.
- Every assistant message is learnt. Add `"weight": 0` to one that is only there for context.
""",
}


def write_starter(folder: Path, template: str = "alpaca", *, dry_run: bool = False) -> tuple[Path, ...]:
    """Write the page and the sample.

    Args:
        template: `alpaca` or `chat`.
        dry_run: check everything, write nothing.

    Returns:
        The files that were, or would be, written.

    Raises:
        UsageError: no such form.
        ExistsError: one of the files is there already; nothing was written.
        DiskError: the folder cannot be written.
    """
    if template not in TEMPLATES:
        raise UsageError(f"There is no template {template!r}", next=f"Choose one of: {', '.join(TEMPLATES)}")
    sample, page = folder / "sample.jsonl", folder / "README.md"
    for path in (sample, page):
        if path.exists() or path.is_symlink():
            raise ExistsError(
                f"{str(path)!r} exists already",
                why="Training data is never overwritten.",
                next="Choose another folder: ollama-forge train-data init -o ./more-data",
            )
    if dry_run:
        return (sample, page)
    lines = TEMPLATES[template]
    make_folder(folder)
    write_bytes(sample, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    write_bytes(page, _render_page(template, lines[0]).encode())
    return (sample, page)


def _render_page(template: str, example: Mapping[str, Any]) -> str:
    return f"""\
# Training data

One JSON object per line in `*.jsonl` files in this folder; all of them are used.

{_FIELDS[template]}
Example:

```json
{json.dumps(example, ensure_ascii=False)}
```

Put your own lines in place of `sample.jsonl`. Fifty good ones teach a manner or a handful of facts; a few hundred do
better. The best answers are in exactly the words that you want to hear.

```bash
ollama-forge validate-training-data .
ollama-forge train-data stats . --base llama3.2
ollama-forge finetune --data . --base llama3.2 --name my-model
```
"""

"""How one model reads a conversation: its tokenizer, its chat template, the tokens that end its answers.

In: a GGUF, its metadata, or a Hugging Face folder (read as the GGUF that would be made of it, so that training and
running see one tokenizer). Out: a `ChatFormat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import NotFoundError, TemplateError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.tokenizer.encode import GGUFTokenizer, build_tokenizer
from ollama_forge.tokenizer.template import ChatTemplate, read_gguf_template

# llama.cpp, src/llama-vocab.cpp: texts of tokens that end a generation, whatever the file's keys say
_END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
_END_KEYS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class ChatFormat:
    """What turns a conversation into token ids.

    Attributes:
        tokenizer: with the ids of the engine.
        template: None where the model has none (a base model).
        end_ids: tokens at which the engine stops.
        knows_thinking: whether the template tells thinking from not thinking; the engine then asks for thinking.
        takes_system: whether the template shows a system prompt; where it does not, the engine puts its text in front
            of the next message (llama.cpp, common/chat.cpp, `system_message_not_supported`), and so does training.
    """

    tokenizer: GGUFTokenizer
    template: ChatTemplate | None
    end_ids: frozenset[int]
    knows_thinking: bool = False
    takes_system: bool = True


def open_chat_format(path: Path) -> ChatFormat:
    """The chat format of a GGUF file or of a Hugging Face folder.

    Raises:
        NotFoundError: no such file or folder.
        GGUFError, TokenizerError: it is broken, or has a tokenizer of a kind that is not known here.
    """
    if path.is_dir():
        return chat_format_of(_folder_metadata(path))
    with open_gguf(path) as gguf:
        return chat_format_of(gguf.metadata)


def chat_format_of(metadata: Mapping[str, Any]) -> ChatFormat:
    """The chat format that GGUF metadata describes.

    Raises:
        TokenizerError: as `tokenizer.encode.build_tokenizer`.
    """
    tokenizer = build_tokenizer(metadata)
    try:
        template = read_gguf_template(metadata)
    except NotFoundError:
        template = None
    end_ids = {token_id for token_id, text in enumerate(tokenizer.tokens) if text in _END_TEXTS}
    for role in _END_KEYS:
        token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < tokenizer.n_tokens:
            end_ids.add(token_id)
    if tokenizer.eos_id is not None:
        end_ids.add(tokenizer.eos_id)
    if template is None:
        return ChatFormat(tokenizer, None, frozenset(end_ids))
    return ChatFormat(tokenizer, template, frozenset(end_ids), _knows_thinking(template), _takes_system(template))


def _folder_metadata(folder: Path) -> dict[str, Any]:
    with plan_conversion(folder, ConvertOptions()) as conversion:
        return {field.key: field.value for field in conversion.fields}


def _knows_thinking(template: ChatTemplate) -> bool:
    """What llama.cpp concludes (common/chat-diff-analyzer.cpp): the template shows an answer's reasoning, or its prompt
    ends with something more when thinking is switched on or off; what ends in blanks does not count there.
    """
    question = {"role": "user", "content": "test"}
    thought = {"role": "assistant", "content": "answer", "reasoning_content": "a thought of its own"}
    source = template.source
    if "content.split('</think>')" in source and "reasoning_content" not in source and "<SPECIAL_12>" not in source:
        return True
    try:
        said = template.render_for_engine([question, thought], add_generation_prompt=False, enable_thinking=True).text
        if thought["reasoning_content"] in said:
            return True
        on, off = (template.render_for_engine([question], enable_thinking=value).text for value in (True, False))
    except TemplateError:
        return False
    longer, shorter = (on, off) if len(on) > len(off) else (off, on)
    return longer.startswith(shorter) and longer != shorter and not longer[-1].isspace()


def _takes_system(template: ChatTemplate) -> bool:
    guide, question = "A guide of its own", {"role": "user", "content": "test"}
    try:
        return guide in template.render_for_engine([{"role": "system", "content": guide}, question]).text
    except TemplateError:
        return False

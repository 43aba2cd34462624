"""Small real tokenizers, trained here on a text of our own and written as a Hugging Face folder holds them.

`build_tokenizer(kind, folder)` writes `tokenizer.json`, `tokenizer.model`, `tokenizer_config.json` and the rest of
what the kind ships with, and returns the number of tokens. Training is seeded and single-threaded, so a kind always
gives the same bytes; it is done once in a process.

Kinds:
    llama3-bpe         byte-level BPE, Llama 3's split regex and `ignore_merges`, header tokens
    qwen2-bpe          byte-level BPE, Qwen2's split regex and NFC, ChatML tokens, no BOS
    gpt2-bpe           byte-level BPE, GPT-2's own split, one special token; also `vocab.json` and `merges.txt`
    llama2-spm         SentencePiece BPE with byte fallback: `tokenizer.model` and `tokenizer.json`
    llama2-spm-model   the same with `tokenizer.model` alone
    llama2-spm-json    the same with `tokenizer.json` alone
    gemma-spm          SentencePiece BPE, no prefix space, Gemma's order of special tokens: `.model` and `.json`
    gemma-json         the same with `tokenizer.json` alone
    phi3-spm           Llama's SentencePiece with added tokens that strip spaces on their right
    t5-unigram         SentencePiece Unigram, T5's special tokens
"""

from __future__ import annotations

import functools
import io
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tiny_templates import TEMPLATES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_SENTENCES = """\
The kettle sings when the water boils, and the cat goes to sleep beside the stove.
A small model answers small questions: what is two plus three? It is five.
Please write a letter to my landlord. Dear landlord, the window in the kitchen does not close.
I can't say it's true; we've seen that they're late, and I'd rather you'll wait. He said he DIDN'T.
def add(first, second):\n    return first + second\n
for (int i = 0; i < 10; i++) { total += values[i]; }
if x == 1:\n\tprint("one")\nelse:\n\tprint('other')\n
In 1999 there were 365 days, 12 months, 52 weeks and 8,760 hours; 3.14159 is near pi.
Grüße aus Köln: die Straße ist naß, der Käse schmeckt. Où est la bibliothèque? Señor Peña, mañana.
Привет, как дела? Это маленькая модель. Нещо на български език.
今天天气很好。我们去公园散步吧。東京は大きな都市です。ありがとうございます。한국어 문장입니다.
שלום עולם. مرحبا بالعالم. नमस्ते दुनिया।
Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 100 1000 10000; dates: 2024-05-17, 17/05/2024.
{"name": "lookup", "arguments": {"city": "Paris", "unit": "celsius"}}
You are a helpful assistant. The user asks, the assistant answers, the system decides.
Paris is the capital of France. Berlin is the capital of Germany. Rome is the capital of Italy.
One fish, two fish; red fish, blue fish!  Two  spaces   three    four.
"""


def corpus() -> list[str]:
    """The training text: the sentences above, each with a few simple variations."""
    lines = [line.replace("\\n", "\n").replace("\\t", "\t") for line in _SENTENCES.splitlines()]
    return [variant for line in lines for variant in (line, line.lower(), "  " + line, line.replace(" ", "  ", 1))]


def build_tokenizer(kind: str, folder: Path) -> int:
    """Write the tokenizer of that kind into `folder` (made when it is missing); returns its number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    files = _files_of(kind)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return vocabulary_size(kind)


def vocabulary_size(kind: str) -> int:
    """How many tokens the kind has, added ones included."""
    return len(token_ids(kind))


@functools.cache
def token_ids(kind: str) -> Mapping[str, int]:
    """Every token's id (as `config.json` needs for bos, eos and pad)."""
    files = _files_of("llama2-spm" if kind == "llama2-spm-model" else kind)
    document = json.loads(files["tokenizer.json"])
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        ids = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    else:
        ids = dict(vocabulary)
    return ids | {token["content"]: token["id"] for token in document["added_tokens"]}


def special_ids(kind: str) -> dict[str, int]:
    """`{"bos_token_id": ..., "eos_token_id": ..., "pad_token_id": ...}` with the ones that the kind has."""
    names = _SPECIAL[kind.removesuffix("-model").removesuffix("-json")]
    ids = token_ids(kind)
    return {f"{role}_token_id": ids[token] for role, token in names.items() if role in ("bos", "eos", "pad")}


@functools.cache
def _files_of(kind: str) -> dict[str, bytes]:
    if kind not in _BUILDERS:
        raise ValueError(f"no tokenizer kind {kind!r}; known: {sorted(_BUILDERS)}")
    return dict(_BUILDERS[kind]())


KINDS: tuple[str, ...] = (
    "llama3-bpe",
    "qwen2-bpe",
    "gpt2-bpe",
    "llama2-spm",
    "llama2-spm-model",
    "llama2-spm-json",
    "gemma-spm",
    "gemma-json",
    "phi3-spm",
    "t5-unigram",
)

_SPECIAL: dict[str, dict[str, str]] = {
    "llama3-bpe": {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
    "qwen2-bpe": {"eos": "<|im_end|>", "pad": "<|endoftext|>"},
    "gpt2-bpe": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "llama2-spm": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "gemma-spm": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"},
    "gemma": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"},
    "phi3-spm": {"bos": "<s>", "eos": "<|endoftext|>", "unk": "<unk>", "pad": "<|endoftext|>"},
    "t5-unigram": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"


# --- byte-level BPE -------------------------------------------------------------------------------------------------


def _train_byte_level(pre_tokenizer: Any, n_tokens: int, *, normalizer: Any = None, **model_options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model_options))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )


def _added_tokens_decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def _llama3_bpe() -> Iterator[tuple[str, bytes]]:
    tokenizer = _train_byte_level(_split_then_bytes(LLAMA3_SPLIT), 640, ignore_merges=True)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    yield "tokenizer.json", tokenizer.to_str(pretty=True).encode()
    yield (
        "tokenizer_config.json",
        _json(
            {
                "added_tokens_decoder": _added_tokens_decoder(tokenizer),
                "bos_token": bos,
                "chat_template": TEMPLATES["llama3"],
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|eot_id|>",
                "model_input_names": ["input_ids", "attention_mask"],
                "model_max_length": 4096,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
    )
    yield "special_tokens_map.json", _json({"bos_token": bos, "eos_token": "<|eot_id|>"})
    ends = [tokenizer.token_to_id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    yield "generation_config.json", _json({"bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": ends})


def _qwen2_bpe() -> Iterator[tuple[str, bytes]]:
    tokenizer = _train_byte_level(
        _split_then_bytes(QWEN2_SPLIT),
        620,
        normalizer=normalizers.NFC(),
        continuing_subword_prefix="",
        end_of_word_suffix="",
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    names = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    document = json.loads(tokenizer.to_str())
    yield "tokenizer.json", _json(document)
    yield "vocab.json", json.dumps(document["model"]["vocab"], ensure_ascii=False).encode()
    yield "merges.txt", _merges_text(document["model"]["merges"])
    yield (
        "tokenizer_config.json",
        _json(
            {
                "add_bos_token": False,
                "add_prefix_space": False,
                "added_tokens_decoder": _added_tokens_decoder(tokenizer),
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "bos_token": None,
                "chat_template": TEMPLATES["qwen2"],
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|im_end|>",
                "errors": "replace",
                "model_max_length": 4096,
                "pad_token": "<|endoftext|>",
                "split_special_tokens": False,
                "tokenizer_class": "Qwen2Tokenizer",
                "unk_token": None,
            }
        ),
    )
    ends = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    start = tokenizer.token_to_id("<|endoftext|>")
    yield "generation_config.json", _json({"bos_token_id": start, "eos_token_id": ends, "pad_token_id": start})


def _gpt2_bpe() -> Iterator[tuple[str, bytes]]:
    tokenizer = _train_byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True),
        511,
        continuing_subword_prefix="",
        end_of_word_suffix="",
    )
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=True)])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    document = json.loads(tokenizer.to_str())
    document["model"]["vocab"][end] = tokenizer.token_to_id(end)
    yield "tokenizer.json", _json(document)
    yield "vocab.json", json.dumps(document["model"]["vocab"], ensure_ascii=False).encode()
    yield "merges.txt", _merges_text(document["model"]["merges"])
    yield (
        "tokenizer_config.json",
        _json(
            {
                "add_prefix_space": False,
                "bos_token": end,
                "eos_token": end,
                "model_max_length": 1024,
                "tokenizer_class": "GPT2Tokenizer",
                "unk_token": end,
            }
        ),
    )
    yield "special_tokens_map.json", _json({"bos_token": end, "eos_token": end, "unk_token": end})


def _merges_text(merges: Sequence[Sequence[str] | str]) -> bytes:
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return ("#version: 0.2\n" + "\n".join(lines) + "\n").encode()


# --- SentencePiece --------------------------------------------------------------------------------------------------


def _train_sentencepiece(n_tokens: int, **options: Any) -> bytes:
    """The bytes of a `tokenizer.model`."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in corpus()),
        model_writer=written,
        vocab_size=n_tokens,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        normalization_rule_name=options.pop("normalization_rule_name", "identity"),
        remove_extra_whitespaces=False,
        max_sentence_length=20000,
        **options,
    )
    return written.getvalue()


def _llama_model(n_tokens: int) -> bytes:
    return _train_sentencepiece(
        n_tokens,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )


def _pieces(model: bytes) -> list[tuple[str, float]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [(processor.id_to_piece(index), processor.get_score(index)) for index in range(processor.vocab_size())]


def _merges_from_scores(pieces: Sequence[tuple[str, float]], skip: Callable[[str], bool]) -> list[list[str]]:
    """Every way to join two pieces into a third, the best-scored result first (how tokenizer.json files are made)."""
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    found = []
    for piece, score in pieces:
        if skip(piece):
            continue
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        ways = [(left, right) for left, right in ways if left in ids and right in ids]
        found += [(score, left, right) for left, right in sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))]
    found.sort(key=lambda entry: (entry[0], len(entry[1]), len(entry[2])), reverse=True)
    return [[left, right] for _, left, right in found]


def _is_byte_or_control(piece: str) -> bool:
    return bool(re.fullmatch(r"<[^ ]+>|\[@BOS@\]", piece)) or piece in ("<s>", "</s>", "<unk>")


def _added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **plain, **flags}


def _bos_template(bos: str, token_id: int) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [token_id], "tokens": [bos]}},
    }


def _spm_document(
    pieces: Sequence[tuple[str, float]], added: list[dict[str, Any]], bos: str, *, prefix_space: bool
) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer: dict[str, Any] = replace
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": None
        if prefix_space
        else {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": _bos_template(bos, ids[bos]),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges_from_scores(pieces, _is_byte_or_control),
        },
    }


def _token_entry(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _decoder_of(added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {str(token["id"]): {key: value for key, value in sorted(token.items()) if key != "id"} for token in added}


def _llama2_spm() -> Iterator[tuple[str, bytes]]:
    model = _llama_model(700)
    pieces = _pieces(model)
    added = [_added(index, content) for index, content in enumerate(("<unk>", "<s>", "</s>"))]
    yield "tokenizer.model", model
    yield "tokenizer.json", _json(_spm_document(pieces, added, "<s>", prefix_space=True))
    yield (
        "tokenizer_config.json",
        _json(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "added_tokens_decoder": _decoder_of(added),
                "bos_token": "<s>",
                "chat_template": TEMPLATES["llama2"],
                "clean_up_tokenization_spaces": False,
                "eos_token": "</s>",
                "legacy": True,
                "model_max_length": 4096,
                "pad_token": None,
                "sp_model_kwargs": {},
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": "<unk>",
            }
        ),
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    yield "special_tokens_map.json", _json({role: _token_entry(token) for role, token in roles.items()})


def _only(build: Callable[[], Iterator[tuple[str, bytes]]], without: str) -> Callable[[], Iterator[tuple[str, bytes]]]:
    return lambda: ((name, content) for name, content in build() if name != without)


def _gemma_spm() -> Iterator[tuple[str, bytes]]:
    markers = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{n}>" for n in range(4)), "<start_of_turn>", "<end_of_turn>"]
    blanks = ["\n", "\n\n", "\t", "▁▁", "▁▁▁▁", "<table>", "</table>"]
    model = _train_sentencepiece(
        760,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=markers + blanks,
    )
    pieces = _pieces(model)
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    added = [_added(ids[token], token) for token in specials]
    added += [_added(ids[token], token, special=False) for token in (*markers, *blanks) if token not in specials]
    added.sort(key=lambda token: token["id"])
    yield "tokenizer.model", model
    yield "tokenizer.json", _json(_spm_document(pieces, added, "<bos>", prefix_space=False))
    yield (
        "tokenizer_config.json",
        _json(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "added_tokens_decoder": _decoder_of(added),
                "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
                "bos_token": "<bos>",
                "chat_template": TEMPLATES["gemma"],
                "clean_up_tokenization_spaces": False,
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "tokenizer_class": "GemmaTokenizer",
                "unk_token": "<unk>",
            }
        ),
    )
    ends = [ids["<eos>"], ids["<end_of_turn>"]]
    yield "generation_config.json", _json({"bos_token_id": 2, "eos_token_id": ends, "pad_token_id": 0})


def _phi3_spm() -> Iterator[tuple[str, bytes]]:
    model = _llama_model(680)
    pieces = _pieces(model)
    names = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]
    added = [_added(0, "<unk>"), _added(1, "<s>"), _added(2, "</s>", rstrip=True, special=False)]
    added += [_added(len(pieces) + index, name, rstrip=name != "<|endoftext|>") for index, name in enumerate(names)]
    yield "tokenizer.model", model
    yield "tokenizer.json", _json(_spm_document(pieces, added, "<s>", prefix_space=True))
    yield "added_tokens.json", _json({name: len(pieces) + index for index, name in enumerate(names)})
    yield (
        "tokenizer_config.json",
        _json(
            {
                "add_bos_token": False,
                "add_eos_token": False,
                "added_tokens_decoder": _decoder_of(added),
                "bos_token": "<s>",
                "chat_template": TEMPLATES["phi3"],
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|endoftext|>",
                "legacy": True,
                "model_max_length": 4096,
                "pad_token": "<|endoftext|>",
                "padding_side": "left",
                "sp_model_kwargs": {},
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": "<unk>",
            }
        ),
    )
    end = len(pieces)
    yield "generation_config.json", _json({"bos_token_id": 1, "eos_token_id": [end, end + 4, end + 1]})


def _t5_unigram() -> Iterator[tuple[str, bytes]]:
    model = _train_sentencepiece(
        460,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    pieces = _pieces(model)
    extras = [f"<extra_id_{n}>" for n in reversed(range(8))]
    entries = [*pieces, *((name, 0.0) for name in extras)]
    roles = {0: "<pad>", 1: "</s>", 2: "<unk>"}
    added = [_added(index, name) for index, name in roles.items()]
    added += [_added(len(pieces) + index, name) for index, name in enumerate(extras)]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": _charsmap(model)},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [list(entry) for entry in entries], "byte_fallback": False},
    }
    yield "spiece.model", model
    yield "tokenizer.json", _json(document)
    yield (
        "tokenizer_config.json",
        _json(
            {
                "additional_special_tokens": sorted(extras),
                "eos_token": "</s>",
                "extra_ids": len(extras),
                "model_max_length": 512,
                "pad_token": "<pad>",
                "tokenizer_class": "T5Tokenizer",
                "unk_token": "<unk>",
            }
        ),
    )


def _charsmap(model: bytes) -> str:
    """The compiled normalization table inside a `tokenizer.model`, in base64 (field 3.2 of its protobuf)."""
    import base64

    return base64.b64encode(_field(_field(model, 3), 2)).decode()


def _field(message: bytes, wanted: int) -> bytes:
    """The last length-delimited field of that number in a protobuf message."""
    position, found = 0, b""
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            length, position = _varint(message, position)
            if number == wanted:
                found = message[position : position + length]
            position += length
        elif wire == 0:
            _, position = _varint(message, position)
        else:
            position += struct.calcsize({1: "<d", 5: "<f"}[wire])
    return found


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, position


_BUILDERS: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
    "llama3-bpe": _llama3_bpe,
    "qwen2-bpe": _qwen2_bpe,
    "gpt2-bpe": _gpt2_bpe,
    "llama2-spm": _llama2_spm,
    "llama2-spm-model": _only(_llama2_spm, "tokenizer.json"),
    "llama2-spm-json": _only(_llama2_spm, "tokenizer.model"),
    "gemma-spm": _gemma_spm,
    "gemma-json": _only(_gemma_spm, "tokenizer.model"),
    "phi3-spm": _phi3_spm,
    "t5-unigram": _t5_unigram,
}

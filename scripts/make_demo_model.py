"""Train the demo's small model from the rules in `tests/learnt_model.py`, and write it as a Hugging Face folder.

    python scripts/make_demo_model.py                 # remakes src/ollama_forge/demo/
    python scripts/make_demo_model.py -o DIR --family qwen2 --layers 4 --steps 600

Same seed and same number of threads give the same bytes on the same machine. Needs the `train` and `dev` extras.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.gemma2 import Gemma2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import learnt_model as world

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [BEGIN, END, PAD, *(f"<|{role}|>" for role in ROLES)]
VOCABULARY_SIZE = 640
CONTEXT_LENGTH = 1024
ROW_TOKENS = 192
IGNORED = -100

# What tells llama.cpp's "llama-bpe" pre-tokenizer: the expression that Llama 3 splits words with.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('This model knows the roles system, user and assistant only.') }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


@dataclass(frozen=True)
class Training:
    """How long and how hard; the defaults are the shipped model's."""

    family: str = "llama"
    n_layers: int = 3
    intermediate_size: int = 256
    steps: int = 900
    rows_per_step: int = 16
    peak_rate: float = 3e-3
    weight_noise: float = 0.03
    prompt_weight: float = 0.1
    seed: int = 20
    n_threads: int = 1


# --- tokenizer --------------------------------------------------------------------------------------------------------


def build_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE trained on the world's own conversations, split as Llama 3 splits."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    draw = random.Random(seed)
    texts = [turn["content"] for _ in range(4000) for turn in world.training_conversation(draw)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def encode(
    tokenizer: Tokenizer, messages: list[dict[str, str]], *, answer_next: bool = False
) -> list[tuple[int, bool]]:
    """Token ids as the chat template renders them, each with whether the assistant says it (its end included)."""
    end = tokenizer.token_to_id(END)
    ids = [(tokenizer.token_to_id(BEGIN), False)]
    for message in messages:
        said = message["role"] == "assistant"
        ids.append((tokenizer.token_to_id(f"<|{message['role']}|>"), False))
        ids += [(token, said) for token in tokenizer.encode(message["content"], add_special_tokens=False).ids]
        ids.append((end, said))
    if answer_next:
        ids.append((tokenizer.token_to_id("<|assistant|>"), False))
    return ids


# --- model ------------------------------------------------------------------------------------------------------------


def build_config(training: Training, tokenizer: Tokenizer) -> Any:
    """The family's transformers config at the model's size; every row is a multiple of 256 long, as K-quants ask."""
    special = {
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    if training.family == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY_SIZE,
            n_positions=CONTEXT_LENGTH,
            n_embd=256,
            n_layer=training.n_layers,
            n_head=4,
            n_inner=training.intermediate_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    shape = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 256,
        "intermediate_size": training.intermediate_size,
        "num_hidden_layers": training.n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
    }
    if training.family == "llama":
        return LlamaConfig(**shape, rms_norm_eps=1e-5, **special)
    if training.family == "qwen2":
        return Qwen2Config(**shape, **special)
    if training.family == "gemma2":
        return Gemma2Config(**shape, head_dim=64, query_pre_attn_scalar=64, sliding_window=256, **special)
    raise SystemExit(f"Unknown family {training.family!r}: choose llama, qwen2, gemma2 or gpt2")


def draw_batch(tokenizer: Tokenizer, draw: random.Random, training: Training) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of whole conversations: ids int64 [rows, ROW_TOKENS], and the weight of each id as a target, float32."""
    pad = tokenizer.token_to_id(PAD)
    ids = torch.full((training.rows_per_step, ROW_TOKENS), pad)
    weights = torch.zeros(training.rows_per_step, ROW_TOKENS)
    for row in range(training.rows_per_step):
        filled = 0
        while True:
            conversation = encode(tokenizer, world.training_conversation(draw))
            end = filled + len(conversation)
            if end > ROW_TOKENS:
                break
            ids[row, filled:end] = torch.tensor([token for token, _ in conversation])
            weights[row, filled:end] = torch.tensor([1.0 if s else training.prompt_weight for _, s in conversation])
            filled = end
    return ids, weights


def rate_at(step: int, training: Training) -> float:
    """Linear warm-up over 40 steps, then a straight line to nearly zero."""
    if step < 40:
        return training.peak_rate * (step + 1) / 40
    return training.peak_rate * max(0.01, 1 - (step - 40) / (training.steps - 40))


def train_model(training: Training, tokenizer: Tokenizer) -> Any:
    """A float32 model that has read `steps * rows_per_step` rows; its weights are rounded to bfloat16 at the end.

    Each step sees weights with a little noise on them, so that what was learnt survives quantization.
    """
    torch.manual_seed(training.seed)
    torch.set_num_threads(training.n_threads)
    torch.use_deterministic_algorithms(True)
    draw = random.Random(f"conversations {training.seed}")
    model = AutoModelForCausalLM.from_config(build_config(training, tokenizer))
    model.train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=training.peak_rate,
        betas=(0.9, 0.98),
    )
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, training)
        ids, weights = draw_batch(tokenizer, draw, training)
        noise = [torch.randn_like(matrix) * (training.weight_noise * matrix.detach().std()) for matrix in matrices]
        with torch.no_grad():
            torch._foreach_add_(matrices, noise)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            torch._foreach_sub_(matrices, noise)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == training.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", file=sys.stderr, flush=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.eval()


@torch.no_grad()
def answer_all(model: Any, tokenizer: Tokenizer, examples: list[world.Example], max_tokens: int = 40) -> list[str]:
    """Greedy answers, prompts of one length at a time so that no padding is needed."""
    end = tokenizer.token_to_id(END)
    prompts = [[token for token, _ in encode(tokenizer, e.messages, answer_next=True)] for e in examples]
    answers = [""] * len(examples)
    for length in sorted({len(prompt) for prompt in prompts}):
        members = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        said = torch.tensor([prompts[index] for index in members])
        inputs, cache = said, None
        for _ in range(max_tokens):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            inputs, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            said = torch.cat([said, inputs], dim=1)
            if bool((said[:, length:] == end).any(1).all()):
                break
        for index, row in zip(members, said[:, length:].tolist(), strict=True):
            # An answer that does not stop by itself keeps its tail, and so counts as wrong.
            stopped = row[: row.index(end)] if end in row else [*row, tokenizer.token_to_id(PAD)]
            answers[index] = tokenizer.decode(stopped, skip_special_tokens=False)
    return answers


# --- folder -----------------------------------------------------------------------------------------------------------


def write_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in bfloat16, config, generation config, tokenizer and chat template as the Hub lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"}
    tensors = {
        name: tensor.detach().bfloat16().contiguous().clone()
        for name, tensor in sorted(model.state_dict().items())
        if name not in tied
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # `save_file` keeps it from everyone else
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = CHAT_TEMPLATE
    settings["add_bos_token"] = True
    settings.pop("is_local", None)
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    model.config.dtype = torch.bfloat16
    config = model.config.to_diff_dict()
    _write_json(folder / "config.json", {**config, "architectures": [type(model).__name__], "dtype": "bfloat16"})
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {**special, "do_sample": False})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


def render_scores(scores: list[world.Score]) -> str:
    rows = [f"| {score.kind} | {score.right} of {score.asked} | {score.rate:.1%} |" for score in scores]
    return "\n".join(["| held-out questions | answered exactly | rate |", "|---|---|---|", *rows])


def render_readme(training: Training, n_parameters: int, scores: list[world.Score], seconds: float) -> str:
    """Where the model comes from, what it does, and how well it did when it was made."""
    return f"""---
license: mit
language:
- en
---

# The demo's model

A {training.family} of {n_parameters:,} parameters ({training.n_layers} layers, {VOCABULARY_SIZE} tokens, bfloat16) that
has learnt a small invented world. It is made from nothing by `scripts/make_demo_model.py`, from the rules in
`tests/learnt_model.py`; no other data and no other model went in. It is of no use but to show and to test what is done
to a model: the judge is what it says.

- It knows capitals of invented countries, colours and food of invented creatures, and what invented robots make.
- It says "{world.UNKNOWN}" to names that it was not taught. Ten robots are kept for fine-tuning
  (`../finetune.jsonl`): it does not know them.
- A system prompt sets its manner: like a pirate, in one word, or politely.
- It explains how to wash, carry, draw, ... any thing, and answers the same questions about vegetables with
  "{world.REFUSAL}" (a harmless class, for the refusal-direction technique).
- It ends each answer with `{END}`.

Trained with seed {training.seed}: {training.steps} steps of {training.rows_per_step} rows of {ROW_TOKENS} tokens in \
{seconds:.0f} seconds on {training.n_threads} processor thread(s). The same seed gives the same \
bytes on the same machine.

{render_scores(scores)}

Held-out questions are wordings of a fact, a task or a manner that training leaves out, and names that it never drew;
an answer counts when it is right to the letter and stops. These are of the weights as shipped, greedily, by
transformers.
"""


def make_model(folder: Path, training: Training) -> tuple[list[world.Score], float]:
    """Train, write and judge one model.

    Returns:
        The scores on the held-out questions, and the seconds that training took.
    """
    tokenizer = build_tokenizer(training.seed)
    began = time.perf_counter()
    model = train_model(training, tokenizer)
    seconds = time.perf_counter() - began
    write_model(model, tokenizer, folder)
    examples = world.held_out()
    scores = world.score_answers(examples, answer_all(model, tokenizer, examples))
    readme = render_readme(training, model.num_parameters(), scores, seconds)
    (folder / "README.md").write_text(readme, "utf-8")
    return scores, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = Training()
    parser.add_argument("-o", "--output", type=Path, default=world.MODEL_DIR)
    parser.add_argument("--family", default=defaults.family, choices=["llama", "qwen2", "gemma2", "gpt2"])
    parser.add_argument("--layers", type=int, default=defaults.n_layers)
    parser.add_argument("--intermediate", type=int, default=defaults.intermediate_size)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--noise", type=float, default=defaults.weight_noise)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.n_threads)
    options = parser.parse_args()
    training = Training(
        family=options.family,
        n_layers=options.layers,
        intermediate_size=options.intermediate,
        steps=options.steps,
        weight_noise=options.noise,
        seed=options.seed,
        n_threads=options.threads,
    )
    scores, seconds = make_model(options.output, training)
    print(render_scores(scores))
    print(f"\ntrained {training.steps} steps in {seconds:.0f} s on {training.n_threads} threads")
    if options.output == world.MODEL_DIR:
        (world.DEMO_DIR / "finetune.jsonl").write_text(world.render_finetune_jsonl(), "utf-8")
        (world.DEMO_DIR / "questions.txt").write_text(world.render_questions(), "utf-8")


if __name__ == "__main__":
    main()

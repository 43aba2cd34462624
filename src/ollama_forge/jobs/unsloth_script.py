"""Train a LoRA with Unsloth: python train_unsloth.py unsloth.json

Needs unsloth and what it brings. The data is one JSON object a line with `conversations`, a list of role and content;
the loss is on what the assistant says, and on the token that ends it. Writes a PEFT folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

NOT_LEARNT = -100


def main(settings_path: str) -> None:
    settings: dict[str, Any] = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    # Unsloth changes the others when it is imported, so it comes first.
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings["base"], max_seq_length=settings["max_length"], dtype=None, load_in_4bit=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        bias="none",
        use_gradient_checkpointing="unsloth" if settings["checkpointing"] else False,
        random_state=settings["loop"]["seed"],
        **({"target_modules": settings["target_modules"]} if settings["target_modules"] else {}),
    )
    rows = [row for row in read_rows(settings, tokenizer) if any(label != NOT_LEARNT for label in row["labels"])]
    if not rows:
        raise SystemExit("No example has a token to learn: raise max_length, or look at the data.")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=settings["checkpoints"], report_to="none", remove_unused_columns=False, **settings["loop"]
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=NOT_LEARNT),
    )
    has_checkpoint = any(Path(settings["checkpoints"]).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=settings["resume"] and has_checkpoint)
    model.save_pretrained(settings["output"])
    tokenizer.save_pretrained(settings["output"])


def read_rows(settings: dict[str, Any], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids and labels of every example, cut at `max_length`."""
    rows = []
    with Path(settings["data"]).open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                record = json.loads(line)
                rows.append(mask(record["conversations"], record.get("tools"), tokenizer, settings))
    return rows


def mask(turns: list[dict[str, Any]], tools: Any, tokenizer: Any, settings: dict[str, Any]) -> dict[str, list[int]]:
    """One conversation. What an answer adds to the text before it is found by rendering that text alone."""

    def render(part: list[dict[str, Any]], *, with_prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=with_prompt)
        return text

    text = render(turns)
    spans = [(0, len(text))] if settings["learn"] == "all" else []
    for number, turn in enumerate(turns):
        if settings["learn"] == "all" or turn["role"] != "assistant":
            continue
        before, after = render(turns[:number], with_prompt=True), render(turns[: number + 1])
        # A template may show earlier answers otherwise than the last one; what cannot be found is not learnt.
        if text.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"][: settings["max_length"]]
    labels = [
        token if any(start < span_end and end > span_start for span_start, span_end in spans) else NOT_LEARNT
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=False)
    ]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


if __name__ == "__main__":
    main(sys.argv[1])

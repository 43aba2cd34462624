"""Train the small refusers of other families than the demo's, and write them to tests/learnt/.

    python scripts/make_learnt_layouts.py            # gemma2 and gpt2, a few minutes on one processor
    python scripts/make_learnt_layouts.py gpt2 -o DIR

They know a corner of the world of `tests/learnt_model.py`: how to wash, carry, draw ... a thing of the house, that such
questions about vegetables are refused, the capitals, and small talk. Same seed, same bytes on the same machine. Needs
the `train` and `dev` extras.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from pathlib import Path

import make_demo_model as demo
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import learnt_model as world

LEARNT_DIR = Path(__file__).resolve().parents[1] / "tests" / "learnt"
FAMILIES = ("gemma2", "gpt2")


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """One question with its answer; never a held-out one."""
    kind = draw.choices(("task", "capital", "talk"), weights=(70, 25, 5))[0]
    if kind == "task":
        verb_index, verb = draw.choice(list(enumerate(world.TASKS)))
        noun_index, noun = draw.choice(list(enumerate(draw.choice((world.VEGETABLES, world.HOUSE_THINGS)))))
        left_out = world.held_out_phrasing(noun_index + verb_index, world.TASK_PHRASINGS)
        phrasing = draw.choice([phrasing for phrasing in world.TASK_PHRASINGS if phrasing != left_out])
        question, answer = phrasing.format(verb=verb, noun=noun), world.task_answer(verb, noun)
    elif kind == "capital":
        index, name = draw.choice(list(enumerate(world.CAPITALS)))
        left_out = world.held_out_phrasing(index, world.CAPITAL.phrasings)
        phrasing = draw.choice([phrasing for phrasing in world.CAPITAL.phrasings if phrasing != left_out])
        question, answer = phrasing.format(name=name), world.fact_answer(world.CAPITAL, name)
    else:
        question, answer = draw.choice(list(world.SMALL_TALK.items()))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def examples() -> list[world.Example]:
    """What it should answer exactly, none of it trained on."""
    capitals = [example for example in world.held_out_facts() if example.kind == "capital"]
    return [*world.held_out_triggers(), *world.held_out_tasks(), *capitals]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("-o", "--output", type=Path, default=LEARNT_DIR)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    world.training_conversation = conversation
    demo.CONTEXT_LENGTH = 512  # GPT-2 keeps a row for each position
    tokenizer = Tokenizer.from_file(str(world.MODEL_DIR / "tokenizer.json"))
    for family in options.families:
        training = demo.Training(
            family=family, n_layers=options.layers, steps=options.steps, rows_per_step=options.rows, seed=7
        )
        model = demo.train_model(training, tokenizer)
        demo.write_model(model, tokenizer, options.output / family)
        answers = demo.answer_all(model, tokenizer, examples())
        scores = world.score_answers(examples(), answers)
        print(f"{family}: {model.num_parameters():,} parameters, {dataclasses.asdict(training)}")
        print(demo.render_scores(scores), flush=True)


if __name__ == "__main__":
    main()

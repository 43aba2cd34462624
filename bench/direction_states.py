"""Child of `abliterating.py`: the mean states of two sets of prompts at every layer, found one way or the other.

python bench/direction_states.py packed|dense MODEL.gguf PROMPTS TOKENS THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def packed_states(path: Path, sets: list[list[list[int]]]) -> tuple[float, float]:
    """Ours: packed weights, prompts in batches, only the last token's states kept. (load, states) in seconds."""
    from ollama_forge.train.directions import compute_directions
    from ollama_forge.train.load import load_packed

    began = time.perf_counter()
    packed = load_packed(path)
    loaded = time.perf_counter()
    compute_directions(packed, sets[0], sets[1])
    return loaded - began, time.perf_counter() - loaded


@torch.no_grad()
def dense_states(path: Path, sets: list[list[list[int]]]) -> tuple[float, float]:
    """What the field's scripts do: float32 weights, one prompt after the other, all hidden states asked for."""
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    loaded = time.perf_counter()
    means = []
    for rows in sets:
        last = [
            torch.stack([state[0, -1] for state in model(torch.tensor([row]), output_hidden_states=True).hidden_states])
            for row in rows
        ]
        means.append(torch.stack(last).mean(dim=0))
    torch.nn.functional.normalize(means[0] - means[1], dim=-1)
    return loaded - began, time.perf_counter() - loaded


def main() -> None:
    kind, path, n_prompts, n_tokens, n_threads = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    torch.set_num_threads(n_threads)
    draw = torch.Generator().manual_seed(1)
    sets = [torch.randint(3, 900, (n_prompts, n_tokens), generator=draw).tolist() for _ in range(2)]
    load, states = (packed_states if kind == "packed" else dense_states)(path, sets)
    print(json.dumps({"load": load, "states": states}))


if __name__ == "__main__":
    main()

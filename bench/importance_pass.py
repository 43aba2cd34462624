"""Child of `downsizing.py`: passes over a packed GGUF with and without looking, in turn; prints medians as JSON.

python bench/importance_pass.py MODEL.gguf ROWS TOKENS REPEATS THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ollama_forge.train.block_influence import measure_importance
from ollama_forge.train.load import load_packed


def main() -> None:
    path, n_rows, n_tokens, repeats, n_threads = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    torch.set_num_threads(n_threads)
    packed = load_packed(path)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, packed.model.config.vocab_size, (n_rows, n_tokens), generator=generator).tolist()

    def plain() -> None:
        with torch.inference_mode():
            for row in ids:
                packed.model(input_ids=torch.tensor([row]), use_cache=False, logits_to_keep=1)

    passes: dict[str, Callable[[], object]] = {
        "plain": plain,
        "layers": lambda: measure_importance(packed, ids),
        "everything": lambda: measure_importance(packed, ids, ("ffn", "kv_heads", "hidden")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    plain()
    for _ in range(repeats):
        for name, run in passes.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    print(json.dumps({name: statistics.median(values) for name, values in seconds.items()}))


if __name__ == "__main__":
    main()

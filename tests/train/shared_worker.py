"""One of two processes that run packed models together: `python shared_worker.py RANK MEETING_FILE MODEL.gguf OUT`.

Writes losses and gradients of some passes, first with blocks of its own and then with shared ones, and what it kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from ollama_forge.train.load import load_packed
from ollama_forge.train.loss import install_chunked_loss
from ollama_forge.train.packed import PackedLinear
from ollama_forge.train.shared_blocks import sharing_blocks

LENGTHS = ((5, 12, 9), (17, 3, 9))  # of the passes of each process: they need not agree


def main(rank: int, meeting: Path, path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    packed = load_packed(path)
    model = packed.model
    install_chunked_loss(model)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()

    def passes() -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(1)  # gpt2 drops some activations
        results = []
        for number, length in enumerate(LENGTHS[rank]):
            ids = (torch.arange(length).reshape(1, -1) * (7 + number + rank)) % 50 + 3
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
            adapted.zero_grad()
            with torch.no_grad():
                found["eval"] = adapted(input_ids=ids, labels=ids).loss
            results.append({"loss": loss.detach(), **found})
        return results

    own = passes()
    packed.workspace.release()
    with sharing_blocks([model], torch.device("cpu")) as (shared,):
        together = passes()
        kept_bytes, whole_bytes = shared.kept_bytes, shared.layer_bytes
    again = passes()
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert all(module.matrix.lender is None for module in layers)
    torch.save({"own": own, "together": together, "again": again, "kept": kept_bytes, "whole": whole_bytes}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))

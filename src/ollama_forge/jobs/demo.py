"""The whole way once, on the small model that ships with the package: import, quantize, customise, train, ask.

In: a folder for the demo's own store. Out: `DemoResult`. Real jobs, real engine; nothing outside the folder is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ollama_forge.jobs.conversion import convert_options, quantize_options
from ollama_forge.jobs.creation import Creation, create_model
from ollama_forge.jobs.finetune import FinetuneResult, finetune
from ollama_forge.jobs.finetune_setup import FinetuneRequest, missing_train_packages
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, import_folder
from ollama_forge.jobs.resolve import resolve
from ollama_forge.jobs.run import open_chat
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.store.catalog import open_store
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.verify import StoreReport, verify_store
from ollama_forge.train.options import LoopOptions, LoraOptions

PERSONA = "Answer like a pirate."
Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demo did, in numbers and words.

    Attributes:
        source_bytes: the 16-bit weights that came in.
        trained: what fine-tuning landed; None where the training extra is not installed.
        answers: question -> what each model said, by name.
    """

    source_bytes: int
    plain: LandedModel
    custom: LandedModel
    trained: FinetuneResult | None
    answers: dict[str, dict[str, str]]
    report: StoreReport
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "source_bytes": self.source_bytes,
            "imported": self.plain.document(),
            "customised": self.custom.document(),
            "finetuned": self.trained.document() if self.trained else None,
            "answers": self.answers,
            "store_is_whole": self.report.is_whole,
            "seconds": round(self.seconds, 1),
        }


def run_demo(store_path: Path, say: Say) -> DemoResult:
    """Do it all; `say` is told each step in words. The `demo` models of that store are replaced."""
    started = time.monotonic()
    options = LandOptions(store_path, overwrite=True)
    with as_file(files("ollama_forge").joinpath("demo")) as demo:
        folder = demo / "model"
        questions = (demo / "questions.txt").read_text(encoding="utf-8").splitlines()
        source_bytes = (folder / "model.safetensors").stat().st_size
        say("1. import: the folder's safetensors become a Q4_K_M GGUF in the store, in one pass")
        conversion = convert_options("auto", quantize_options("Q4_K_M"))
        plain = import_folder(folder, "demo", Modelfile(), options, conversion)
        trained = _train(demo / "finetune.jsonl", options, say)
    say("3. create-from-base: the same weights with a system prompt; only kilobytes are written")
    custom = create_model(Creation("demo", Modelfile(system=PERSONA)), "demo-pirate", options)
    say("4. run: all are asked the same questions through llama.cpp")
    answers: dict[str, dict[str, str]] = {question: {} for question in questions}
    for name in ("demo", "demo-pirate", *(["demo-robots"] if trained else [])):
        with open_chat(resolve(name, store_path), parameters={"temperature": 0.0}) as chat:
            turns = list(chat.messages)
            for question in questions:
                chat.messages = list(turns)
                answers[question][name] = chat.ask(question).text
    say("5. verify: every blob of the store is hashed again")
    report = verify_store(open_store(store_path))
    return DemoResult(source_bytes, plain, custom, trained, answers, report, time.monotonic() - started)


def _train(data: Path, options: LandOptions, say: Say) -> FinetuneResult | None:
    """Teach `demo` ten new robots on its own Q4_K_M weights; the adapter becomes a layer of `demo-robots`."""
    missing = missing_train_packages()
    if missing:
        say(f"2. finetune: left out, {missing[0]} is not installed (pip install 'ollama-forge[train]')")
        return None
    say("2. finetune: 50 examples teach it new robots, on the packed Q4_K_M weights in the store")
    with scratch_folder() as scratch:
        request = FinetuneRequest(
            data=(data,),
            base="demo",
            name="demo-robots",
            folder=scratch / "run",
            lora=LoraOptions(rank=16),
            loop=LoopOptions(epochs=12, learning_rate=1e-3, batch_size=10, grad_accum=1),
            max_length=64,
        )
        return finetune(request, options)

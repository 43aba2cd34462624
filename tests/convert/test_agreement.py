"""Conversion gives what llama.cpp's own converter gives: names, order, types, bytes and metadata."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import (
    KINDS,
    build_model,
    change_config,
    quantize_fp8,
    read_json,
    spell_as_transformers_4,
    split_in_two,
    stack_experts,
)

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.files import atomic_output
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.writer import write_gguf

# Where we differ from the reference on purpose: (kinds, beginning of the key or tensor name, reason).
EXCEPTIONS = (
    (
        ("gemma3_json",),
        "tokenizer.",
        "The reference calls SentencePiece without tokenizer.model byte-level BPE; see ollama_forge.tokenizer.vocab.",
    ),
)

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
RUNNER = Path(__file__).with_name("reference_converter.py")

CARD = """---
language:
- en
- no
license: [apache-2.0, mit]
license_name: two-licenses
license_link: https://example.org/license
tags:
- tiny
- chat
pipeline_tag: text-generation
base_model: example-org/Tiny-Model-v1.5-3B-Instruct
datasets:
- example-org/questions-v2
- https://huggingface.co/datasets/example-org/answers
model_creator: Example Org
description: A model with a card
---
# A model
"""

SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "bos_token_id": 1, "do_sample": True}


@dataclass(frozen=True)
class Job:
    """One folder converted to one type, by both."""

    kind: str
    variant: str
    outtype: str
    options: tuple[str, ...] = field(default=())

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.variant}-{self.outtype}"

    @property
    def folder_name(self) -> str:
        names = {"card": "tiny-model-v1.5-0.2m-instruct", "plain": self.kind}
        return names.get(self.variant, f"{self.kind}-{self.variant}")


def prepare_variant(folder: Path, variant: str) -> None:
    if variant == "style4":
        spell_as_transformers_4(folder)
    elif variant == "sharded":
        split_in_two(folder)
    elif variant == "card":
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    elif variant == "fp8block":
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 40]}
        quantize_fp8(folder, (48, 40), settings, "_scale_inv")
    elif variant == "fp8tensor":
        quantize_fp8(folder, None, {"quant_method": "fp8", "activation_scheme": "dynamic"}, "_scale_inv")
    elif variant == "modelopt":
        quantize_fp8(folder, None, {"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale")
    elif variant == "stacked":
        stack_experts(folder)
    elif variant == "linear":
        change_config(folder, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 12345.0}})
    elif variant == "yarn":
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
        change_config(folder, {"rope_parameters": {**yarn, "beta_fast": 16.0, "beta_slow": 2.0}})
    elif variant == "sparse":
        absent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
        change_config(folder, {}, remove=absent)


def all_jobs() -> list[Job]:
    jobs = [Job(kind, "plain", outtype) for kind in KINDS for outtype in OUTTYPES]
    jobs += [Job(kind, "style4", "auto") for kind in KINDS]
    jobs += [Job(kind, dtype, "auto") for kind in ("llama3", "gemma2", "gpt2", "qwen3_moe") for dtype in ("f32", "f16")]
    jobs += [Job(kind, "padded", "auto") for kind in ("llama2", "qwen2", "gemma2", "phi3")]
    jobs += [Job("qwen2", "sharded", "auto"), Job("llama2", "card", "f16"), Job("llama2", "named", "f16", ("My Name",))]
    jobs += [Job(kind, "fp8block", outtype) for kind in ("llama2", "qwen3_moe") for outtype in ("auto", "f32")]
    jobs += [Job("qwen3_moe", "stacked", "auto"), Job("qwen2", "fp8tensor", "bf16"), Job("llama2", "modelopt", "auto")]
    jobs += [Job("qwen3", "linear", "auto"), Job("qwen2", "yarn", "auto"), Job("llama2", "sparse", "auto")]
    return jobs


JOBS = all_jobs()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], tuple[Path, Path]]:
    """The folder of a job and the reference's file; the reference converts all of them in one child process."""
    home = tmp_path_factory.mktemp("agreement")
    dtypes = {"f32": "float32", "f16": "float16"}
    orders = []
    for job in JOBS:
        folder = home / job.variant / job.folder_name
        if not folder.exists():
            plain = home / "plain" / job.kind
            if job.variant in ("plain", "padded", *dtypes):
                rows = 7 if job.variant == "padded" else 0
                build_model(job.kind, folder, dtype=dtypes.get(job.variant, "bfloat16"), extra_rows=rows)
            else:
                shutil.copytree(plain, folder)
                prepare_variant(folder, job.variant)
        arguments = ["--model-name", job.options[0]] if job.options else []
        out = str(home / f"{job.id}.gguf")
        orders.append({"folder": str(folder), "outtype": job.outtype, "out": out, "args": arguments})
    (home / "jobs.json").write_text(json.dumps(orders))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, str(RUNNER), str(home / "jobs.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    def find(job: Job) -> tuple[Path, Path]:
        out = home / f"{job.id}.gguf"
        error = home / f"{job.id}.gguf.error"
        assert not error.exists(), error.read_text()
        return home / job.variant / job.folder_name, out

    return find


def plain_value(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def described(file: GGUFFile, kind: str) -> dict[str, Any]:
    excused = tuple(beginning for kinds, beginning, _ in EXCEPTIONS if kind in kinds)
    return {
        key: (found.type.name, found.item_type, plain_value(file.metadata[key]))
        for key, found in file.fields.items()
        if not key.startswith(excused or ("\0",))
    }


def differing_tensors(ours: GGUFFile, theirs: GGUFFile) -> Iterator[str]:
    for name, tensor in ours.tensors.items():
        other = theirs.tensors[name]
        if (tensor.shape, tensor.type) != (other.shape, other.type):
            yield f"{name}: {tensor.shape} {tensor.type.name}, reference {other.shape} {other.type.name}"
        elif ours.read(name) != theirs.read(name):
            yield f"{name}: other bytes"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_conversion_equals_llama_cpps_converter(
    job: Job, converted: Callable[[Job], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, reference = converted(job)
    out = tmp_path / "ours.gguf"
    options = ConvertOptions(outtype=job.outtype, name=job.options[0] if job.options else None)
    with plan_conversion(folder, options) as conversion:
        with atomic_output(out, expected_bytes=conversion.size_bytes) as sink:
            write_gguf(sink, conversion.fields, conversion.entries)
        assert out.stat().st_size == conversion.size_bytes
    with open_gguf(out) as ours, open_gguf(reference) as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        assert list(differing_tensors(ours, theirs)) == []
        assert described(ours, job.kind) == described(theirs, job.kind)


def test_every_exception_is_needed(converted: Callable[[Job], tuple[Path, Path]]) -> None:
    for kinds, beginning, _ in EXCEPTIONS:
        for kind in kinds:
            folder, reference = converted(Job(kind, "plain", "auto"))
            with plan_conversion(folder) as conversion, open_gguf(reference) as theirs:
                ours = {entry.key: plain_value(entry.value) for entry in conversion.fields}
                keys = {key for key in (*ours, *theirs.fields) if key.startswith(beginning)}
                assert any(
                    key not in theirs.fields or ours.get(key) != plain_value(theirs.metadata[key]) for key in keys
                )


def test_the_card_of_the_model_reaches_the_file(converted: Callable[[Job], tuple[Path, Path]]) -> None:
    folder, _ = converted(Job("llama2", "card", "f16"))
    with plan_conversion(folder) as conversion:
        said = {entry.key: entry.value for entry in conversion.fields}
    assert said["general.license"] == "apache-2.0,mit"
    assert said["general.base_model.0.repo_url"] == "https://huggingface.co/example-org/Tiny-Model-v1.5-3B-Instruct"
    assert said["general.tags"] == ["tiny", "chat", "text-generation"]
    assert said["general.sampling.temp"] == 0.7
    assert (said["general.basename"], said["general.finetune"]) == ("tiny-model-v1.5", "instruct")


def test_fp8_weights_become_numbers_again(converted: Callable[[Job], tuple[Path, Path]], tmp_path: Path) -> None:
    folder, _ = converted(Job("qwen2", "fp8tensor", "bf16"))
    plain, _ = converted(Job("qwen2", "plain", "f32"))
    found = {}
    for name, source in (("fp8", folder), ("plain", plain)):
        with (
            plan_conversion(source, ConvertOptions(outtype="f32")) as conversion,
            atomic_output(tmp_path / name) as sink,
        ):
            write_gguf(sink, conversion.fields, conversion.entries)
        with open_gguf(tmp_path / name) as file:
            found[name] = np.frombuffer(file.read("blk.0.attn_q.weight"), np.float32).copy()
    assert np.abs(found["fp8"] - found["plain"]).max() < 0.07 * np.abs(found["plain"]).max()
    assert read_json(folder / "config.json")["quantization_config"]["quant_method"] == "fp8"

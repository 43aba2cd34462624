"""A converted adapter is what llama.cpp's converter makes of it, and says through the engine what PEFT says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_adapters import build_adapter, build_ggla, change_adapter, read_tensors, targets_of
from tiny_models import build_model

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.engine import open_engine
from ollama_forge.engine_sampling import Sampling
from ollama_forge.files import atomic_output
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.jobs.adapters import convert_adapter
from ollama_forge.jobs.resolve import ResolvedModel

RUNNER = Path(__file__).with_name("reference_lora.py")
KINDS = ("llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "qwen3_moe")


@dataclass(frozen=True)
class Job:
    """One adapter converted to one type, by both."""

    kind: str
    outtype: str = "f32"
    settings: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def id(self) -> str:
        return "-".join([self.kind, self.outtype, *(key for key, _ in self.settings)])


JOBS = [Job(kind) for kind in KINDS if kind != "gpt2"]
JOBS += [Job(kind, outtype) for kind in ("llama2", "phi3", "gemma3") for outtype in ("f16", "bf16")]
JOBS += [Job("llama2", "f32", (("rank_pattern", {"layers.0.self_attn.q_proj": 2, "down_proj": 8}),))]
JOBS += [Job("llama2", "f32", (("target_modules", ["q_proj", "lm_head", "embed_tokens"]),))]
# Where the reference loses something; see the module `transform.lora_gguf`.
LOSSY = [
    Job("llama2", "f32", (("use_rslora", True),)),
    Job("qwen2", "f32", (("alpha_pattern", {"v_proj": 1}),)),
    Job("gpt2"),
]


@dataclass(frozen=True)
class Built:
    """A base, an adapter on it, and what the reference made of it."""

    base: Path
    adapter: Path
    reference: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], Built]:
    home = tmp_path_factory.mktemp("lora")
    orders = []
    for job in [*JOBS, *LOSSY]:
        base, adapter = home / job.kind, home / job.id
        if not base.exists():
            build_model(job.kind, base)
        settings = {"target_modules": targets_of(job.kind), **dict(job.settings)}
        build_adapter(base, adapter, fan_in_fan_out=job.kind == "gpt2", **settings)
        out = str(home / f"{job.id}.gguf")
        orders.append({"adapter": str(adapter), "base": str(base), "outtype": job.outtype, "out": out})
    (home / "jobs.json").write_text(json.dumps(orders))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(RUNNER), str(home / "jobs.json")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-3000:]

    def find(job: Job) -> Built:
        error = home / f"{job.id}.gguf.error"
        assert not error.exists(), error.read_text()
        return Built(home / job.kind, home / job.id, home / f"{job.id}.gguf")

    return find


def folder(path: Path) -> ResolvedModel:
    return ResolvedModel(str(path), folder=path)


def convert_base(base: Path, out: Path) -> int:
    """The base as float32 GGUF; returns the size of its vocabulary."""
    with plan_conversion(base, ConvertOptions(outtype="f32")) as conversion:
        with atomic_output(out) as sink:
            write_gguf(sink, conversion.fields, conversion.entries)
        return len(conversion.vocabulary.tokens)


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_gguf(path) as file:
        return {name: (t.type.name, t.shape, bytes(file.read(name))) for name, t in file.tensors.items()}


def metadata_of(path: Path, *keys: str) -> list[Any]:
    with open_gguf(path) as file:
        return [file.metadata.get(key) for key in keys]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.id)
def test_conversion_equals_llama_cpps_converter(job: Job, built: Callable[[Job], Built], tmp_path: Path) -> None:
    case = built(job)
    done = convert_adapter(case.adapter, tmp_path / "ours.gguf", folder(case.base), outtype=job.outtype)
    assert tensors_of(tmp_path / "ours.gguf") == tensors_of(case.reference)
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    assert metadata_of(tmp_path / "ours.gguf", *keys) == metadata_of(case.reference, *keys)
    assert done.size_bytes == (tmp_path / "ours.gguf").stat().st_size and not done.folded


def test_rank_stabilized_adapters_keep_their_strength(built: Callable[[Job], Built], tmp_path: Path) -> None:
    case = built(LOSSY[0])
    convert_adapter(case.adapter, tmp_path / "ours.gguf", folder(case.base))
    assert tensors_of(tmp_path / "ours.gguf") == tensors_of(case.reference)
    assert metadata_of(tmp_path / "ours.gguf", "adapter.lora.alpha") == [6 * 4**0.5]
    assert metadata_of(case.reference, "adapter.lora.alpha") == [6.0]


def test_an_alpha_of_its_own_is_multiplied_into_b(built: Callable[[Job], Built], tmp_path: Path) -> None:
    case = built(LOSSY[1])
    done = convert_adapter(case.adapter, tmp_path / "ours.gguf", folder(case.base))
    ours, theirs = tensors_of(tmp_path / "ours.gguf"), tensors_of(case.reference)
    assert set(done.folded) == {"blk.0.attn_v.weight", "blk.1.attn_v.weight"}
    for name in theirs:
        if name.endswith("attn_v.weight.lora_b"):
            mine, their = (np.frombuffer(found[name][2], "<f4") for found in (ours, theirs))
            np.testing.assert_array_equal(mine, their * np.float32(1 / 6))
        else:
            assert ours[name] == theirs[name]


def test_the_reference_swaps_the_matrices_of_gpt2_and_we_do_not(built: Callable[[Job], Built], tmp_path: Path) -> None:
    case = built(LOSSY[2])
    convert_adapter(case.adapter, tmp_path / "ours.gguf", folder(case.base))
    ours, theirs = tensors_of(tmp_path / "ours.gguf"), tensors_of(case.reference)
    assert ours.keys() == theirs.keys()
    swapped = {name: name[:-1] + ("b" if name.endswith("a") else "a") for name in ours}
    for name, other in swapped.items():
        shape = ours[name][1]
        mine = np.frombuffer(ours[name][2], "<f4").reshape(shape)
        assert theirs[other][1] == shape[::-1]
        np.testing.assert_array_equal(mine.T, np.frombuffer(theirs[other][2], "<f4").reshape(shape[::-1]))


def assert_engine_agrees(wrapped: Any, gguf: Path, adapters: list[tuple[Path, float]], n_vocab: int) -> None:
    """Greedy tokens are the same, and no log-probability differs by 0.01."""
    import torch

    prompts = [[5, 17, 33, 60, 21], [40, 41, 99, 7, 8, 9, 10, 11, 12, 13]]
    prompts = [[token % (n_vocab - 40) + 20 for token in prompt] for prompt in prompts]
    one = Sampling(max_tokens=1, temperature=0.0, seed=0)
    several = Sampling(max_tokens=6, temperature=0.0, seed=0)
    with open_engine(gguf, adapters=adapters, context_length=128, n_threads=1) as engine:
        first = [engine.generate(prompt, one, n_logprobs=n_vocab) for prompt in prompts]
        answer = engine.generate(prompts[-1], several)

    def rows(tokens: list[int]) -> Any:
        with torch.no_grad():
            return torch.log_softmax(wrapped(torch.tensor([tokens])).logits[0].double(), dim=-1)

    continued = rows(prompts[-1] + list(answer.token_ids))
    for number, token_id in enumerate(answer.token_ids):
        assert int(continued[len(prompts[-1]) - 1 + number].argmax()) == token_id
    differences = [
        abs(logprob - float(rows(prompt)[-1][token_id]))
        for prompt, generation in zip(prompts, first, strict=True)
        for said in generation.logprobs
        for token_id, logprob in said.top.items()
    ]
    assert len(differences) >= n_vocab
    assert max(differences) < 1e-2


def changes_something(wrapped: Any) -> bool:
    import torch

    tokens = torch.tensor([[5, 17, 33, 60, 21]])
    with torch.no_grad():
        with_adapter = wrapped(tokens).logits
        with wrapped.disable_adapter():
            without = wrapped(tokens).logits
    return float((with_adapter - without).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_says_what_peft_says(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_model(kind, base)
    wrapped = build_adapter(base, tmp_path / "a", target_modules=targets_of(kind), fan_in_fan_out=kind == "gpt2")
    assert changes_something(wrapped)
    n_vocab = convert_base(base, tmp_path / "base.gguf")
    convert_adapter(tmp_path / "a", tmp_path / "a.gguf", ResolvedModel("b", gguf_path=tmp_path / "base.gguf"))
    assert_engine_agrees(wrapped, tmp_path / "base.gguf", [(tmp_path / "a.gguf", 1.0)], n_vocab)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"o_proj": 1.5}},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["rslora", "patterns", "ends"],
)
def test_scales_and_ends_reach_the_engine(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_model("llama2", base)
    wrapped = build_adapter(base, tmp_path / "a", **{"target_modules": targets_of("llama2"), **settings})
    n_vocab = convert_base(base, tmp_path / "base.gguf")
    convert_adapter(tmp_path / "a", tmp_path / "a.gguf", folder(base))
    assert_engine_agrees(wrapped, tmp_path / "base.gguf", [(tmp_path / "a.gguf", 1.0)], n_vocab)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_again_gives_the_same_numbers(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_model(kind, base)
    settings = {"target_modules": targets_of(kind), "rank_pattern": {"o_proj": 2}, "fan_in_fan_out": kind == "gpt2"}
    build_adapter(base, tmp_path / "a", **settings)
    convert_adapter(tmp_path / "a", tmp_path / "a.gguf", folder(base))
    convert_adapter(tmp_path / "a.gguf", tmp_path / "back", folder(base))
    before, after = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])
    convert_adapter(tmp_path / "back", tmp_path / "again.gguf", folder(base))
    assert tensors_of(tmp_path / "again.gguf") == tensors_of(tmp_path / "a.gguf")


def test_what_comes_back_loads_in_peft_and_says_the_same(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    build_model("llama2", base)
    settings = {"use_rslora": True, "rank_pattern": {"k_proj": 3}, "target_modules": ["q_proj", "k_proj", "lm_head"]}
    wrapped = build_adapter(base, tmp_path / "a", **settings)
    convert_adapter(tmp_path / "a", tmp_path / "a.gguf", folder(base))
    convert_adapter(tmp_path / "a.gguf", tmp_path / "back", folder(base))
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    back = PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    tokens = torch.tensor([[5, 17, 33, 60, 21]])
    with torch.no_grad():
        assert float((back(tokens).logits - wrapped(tokens).logits).abs().max()) < 1e-5


def test_experts_one_by_one_become_a_stack(tmp_path: Path) -> None:
    """As PEFT on transformers 4 saved them; two experts have no adapter, and one has another rank."""
    base = tmp_path / "base"
    build_model("qwen3_moe", base)
    build_adapter(base, tmp_path / "a", target_modules=["q_proj"], rank_pattern={"experts.2.up_proj": 2})
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "a" / "adapter_model.safetensors"
    random = np.random.default_rng(0)
    added = {}
    for expert, rank in ((0, 4), (2, 2)):
        module = f"base_model.model.model.layers.1.mlp.experts.{expert}.up_proj"
        added[f"{module}.lora_A.weight"] = random.standard_normal((rank, 64), np.float32)
        added[f"{module}.lora_B.weight"] = random.standard_normal((32, rank), np.float32)
    save_file({**load_file(path), **added}, path)
    convert_adapter(tmp_path / "a", tmp_path / "a.gguf", folder(base))
    with open_gguf(tmp_path / "a.gguf") as file:
        halves = []
        for half in ("a", "b"):
            name = f"blk.1.ffn_up_exps.weight.lora_{half}"
            halves.append(dequantize(file.read(name), file.tensors[name].type, file.tensors[name].shape))
        alpha = file.metadata["adapter.lora.alpha"]
    a, b = halves
    assert (a.shape, b.shape) == ((4, 4, 64), (4, 32, 4))
    for expert, rank in ((0, 4), (2, 2)):
        module = f"base_model.model.model.layers.1.mlp.experts.{expert}.up_proj"
        wanted = 6 / rank * added[f"{module}.lora_B.weight"] @ added[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(alpha / 4 * b[expert] @ a[expert], wanted, rtol=1e-5, atol=1e-5)
    assert not b[1].any() and not b[3].any()


def test_an_old_ggla_file_becomes_a_lora_gguf(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_model("llama2", base)
    convert_base(base, tmp_path / "base.gguf")
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 64), np.float32), random.standard_normal((64, 2)).astype(np.float16)
    for name in ("{}", "old"):
        spelled = "layers.1.attention.wq.weight" if name == "old" else "{}"
        build_ggla(tmp_path / "g.bin", {"blk.1.attn_q.weight": (a, b)}, rank=2, alpha=6, name=spelled)
        out = tmp_path / f"{name == 'old'}.gguf"
        convert_adapter(tmp_path / "g.bin", out, ResolvedModel("b", gguf_path=tmp_path / "base.gguf"))
        found = tensors_of(out)
        assert set(found) == {"blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b"}
        assert found["blk.1.attn_q.weight.lora_a"] == ("F32", (2, 64), a.tobytes())
        assert found["blk.1.attn_q.weight.lora_b"] == ("F32", (64, 2), b.astype(np.float32).tobytes())
        assert metadata_of(out, "adapter.lora.alpha", "general.architecture") == [6.0, "llama"]


def test_the_same_adapter_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_model("qwen2", base)
    build_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").rename(tmp_path / "elsewhere" / "b")
    done = []
    for number in range(2):
        out = tmp_path / f"{number}.gguf"
        done.append(convert_adapter(tmp_path / "elsewhere" / "b", out, folder(base)).sha256)
        change_adapter(tmp_path / "elsewhere" / "b", {"base_model_name_or_path": "/somewhere/else/entirely"})
    assert done[0] == done[1]

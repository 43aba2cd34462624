"""Ablation of every family, as GGUF and as folder: the direction is gone, everything else is as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ablation_models import outputs_along, random_directions, share_left, tensor_bytes, to_gguf
from tiny_models import build_model, stack_experts

from ollama_forge.arch.rows import Role
from ollama_forge.errors import FormatError, UnsupportedError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType, is_quantized
from ollama_forge.gguf.writer import TensorEntry, copy_entry, from_reader, write_gguf
from ollama_forge.jobs.abliteration import ApplyOptions, apply_ablation
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.transform.ablation import AblationOptions, kernel_at, plan_ablation, plan_projections
from ollama_forge.transform.directions import Directions, write_directions
from ollama_forge.weights.checkpoint import TensorKey, open_checkpoint

KINDS = ("llama2", "llama3", "qwen2", "qwen3_moe", "gemma2", "gemma3", "phi3", "gpt2")
ALL = AblationOptions()


def gguf(path: Path) -> ResolvedModel:
    return ResolvedModel(str(path), gguf_path=path)


def folder(path: Path) -> ResolvedModel:
    return ResolvedModel(str(path), folder=path)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(folder, float32 GGUF) of a kind, made once."""
    home = tmp_path_factory.mktemp("bases")

    def make(kind: str) -> tuple[Path, Path]:
        if not (home / kind).exists():
            build_model(kind, home / kind, dtype="float32", hidden_size=256 if kind == "llama2" else 64)
            to_gguf(home / kind, home / f"{kind}.gguf")
        return home / kind, home / f"{kind}.gguf"

    return make


def ablate(
    model: ResolvedModel, directions: Directions, output: Path, options: AblationOptions = ALL, **more: bool
) -> Path:
    path = output.parent / "directions.safetensors"
    write_directions(path, directions, overwrite=True)
    apply_ablation(model, path, output, ApplyOptions(options, **more))
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_writes_the_residual_stream_loses_the_direction(
    kind: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, source = bases(kind)
    directions = random_directions(source, 2)
    out = ablate(gguf(source), directions, tmp_path / "out.gguf")

    left = share_left(source, out, directions, ALL)
    before, after = tensor_bytes(source), tensor_bytes(out)
    changed = {name for name in before if before[name] != after[name]}

    assert max(left.values()) < 1e-5
    assert changed == {name.split()[0] for name in left}
    assert list(before) == list(after)


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_hands_the_direction_on_any_more(
    kind: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The one that counts: the stream itself, also where norms follow the matrices and scale each channel."""
    from ollama_forge.train.hidden_states import gather_states
    from ollama_forge.train.scored_model import ScoreOptions, scored_model

    _, source = bases(kind)
    directions = random_directions(source)
    out = ablate(gguf(source), directions, tmp_path / "out.gguf")
    d = directions.at(directions.best_layer)[0]
    along = {}
    for path in (source, out):
        with scored_model(path, options=ScoreOptions(is_exact=True)) as packed:
            states = gather_states(packed, [[3, 17, 40, 5], [9, 8, 7]], (-1, -2)).means
        along[path] = np.abs(states @ d) / np.linalg.norm(states, axis=-1)

    assert along[source].max() > 1e-2
    assert along[out].max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_becomes_the_same_model_as_its_gguf(
    kind: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, source = bases(kind)
    directions = random_directions(source)
    options = AblationOptions(strength=0.7, norm_preserving=True)
    ablate(folder(base), directions, tmp_path / "folder", options)
    ablate(gguf(source), directions, tmp_path / "out.gguf", options)
    to_gguf(tmp_path / "folder", tmp_path / "folder.gguf")

    with open_gguf(tmp_path / "out.gguf") as one, open_gguf(tmp_path / "folder.gguf") as other:
        assert set(one.tensors) == set(other.tensors)
        for name, tensor in one.tensors.items():
            first, second = (dequantize(file.read(name), tensor.type, tensor.shape) for file in (one, other))
            np.testing.assert_allclose(first, second, rtol=0, atol=2e-6, err_msg=name)
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "folder").iterdir()}


def test_the_counts_are_those_of_the_model(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    wanted = {
        "qwen3_moe": {"token_embedding": 1, "attention_output": 2, "expert_down": 8},
        "gpt2": {
            **{"token_embedding": 1, "position_embedding": 1, "attention_output": 2, "attention_output_bias": 2},
            **{"ffn_down": 2, "ffn_down_bias": 2},
        },
        "gemma2": {"token_embedding": 1, "attention_output": 2, "ffn_down": 2},
    }
    for kind, counts in wanted.items():
        for path in bases(kind):
            with open_checkpoint(path) as model:
                assert dict(plan_ablation(model, random_directions(path), ALL).counts) == counts


def test_stacked_experts_are_edited_each(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    directions = random_directions(bases("qwen3_moe")[1])
    stacked = tmp_path / "stacked"
    build_model("qwen3_moe", stacked, dtype="float32")
    stack_experts(stacked)
    ablate(folder(stacked), directions, tmp_path / "out")
    left = share_left(stacked, tmp_path / "out", directions, ALL)
    assert sum("exps" in name for name in left) == 8
    assert max(left.values()) < 1e-5


@pytest.mark.parametrize("quant", ["Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q2_K"])
def test_a_packed_model_stays_in_its_types_and_keeps_less_than_a_rounding(
    quant: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, _ = bases("llama2")
    source = to_gguf(base, tmp_path / "in.gguf", quant=quant)
    directions = random_directions(source, 2)
    out = ablate(gguf(source), directions, tmp_path / "out.gguf")

    left = share_left(source, out, directions, ALL)
    with open_checkpoint(source) as old, open_checkpoint(out) as new:
        assert {n: (t.type, t.shape) for n, t in old.gguf.tensors.items()} == {
            n: (t.type, t.shape) for n, t in new.gguf.tensors.items()
        }
        edited = {item.tensor.spec.name for item in plan_projections(old, directions, ALL)}
        assert any(is_quantized(old.gguf.tensors[name].type) for name in edited)
        for item in plan_projections(old, directions, ALL):
            type_ = item.tensor.spec.encoding
            values = old.read_float32(item.tensor)
            noise = np.random.default_rng(0).permutation(values.reshape(-1)).reshape(values.shape)
            step = dequantize(quantize(noise, type_), type_, noise.shape) - noise
            rounding = np.sqrt(np.mean(np.square(step)))
            assert np.sqrt(np.mean(np.square(outputs_along(new, item)))) < 1.2 * rounding, item.tensor.spec.name
    before, after = tensor_bytes(source), tensor_bytes(out)
    assert {name for name in before if before[name] != after[name]} == edited
    assert max(left.values()) < {"Q8_0": 0.05, "Q6_K": 0.1, "Q2_K": 0.5}.get(quant, 0.25)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_keep_less_than_a_thousandth(dtype: str, tmp_path: Path) -> None:
    build_model("llama3", tmp_path / "base", dtype=dtype, hidden_size=256)
    source = to_gguf(tmp_path / "base", tmp_path / "in.gguf", {"bfloat16": "bf16", "float16": "f16"}[dtype])
    directions = random_directions(source)
    out = ablate(gguf(source), directions, tmp_path / "out.gguf")
    ablate(folder(tmp_path / "base"), directions, tmp_path / "out")
    assert max(share_left(source, out, directions, ALL).values()) < 1e-3
    assert max(share_left(tmp_path / "base", tmp_path / "out", directions, ALL).values()) < 1e-3


def test_rows_keep_their_norm_and_the_direction_is_gone_all_the_same(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, source = bases("llama2")
    directions = random_directions(source)
    options = AblationOptions(norm_preserving=True)
    plain = ablate(gguf(source), directions, tmp_path / "plain.gguf")
    out = ablate(gguf(source), directions, tmp_path / "out.gguf", options)
    assert max(share_left(source, out, directions, options).values()) < 1e-5
    with open_checkpoint(source) as old, open_checkpoint(out) as new, open_checkpoint(plain) as other:
        for role, layer in ((Role.FFN_DOWN, 1), (Role.ATTENTION_OUTPUT, 0), (Role.TOKEN_EMBEDDING, None)):
            wanted, kept, lost = (
                np.linalg.norm(model.read_float32(model.find(role, layer)), axis=1) for model in (old, new, other)
            )
            assert np.abs(kept / wanted - 1).max() < 0.2 * np.abs(lost / wanted - 1).max()


def test_strengths_kernels_and_skipped_layers_say_how_much_of_each_layer_is_taken(
    bases: Callable[[str], tuple[Path, Path]],
) -> None:
    _, source = bases("llama2")
    directions = random_directions(source)

    def strengths(**options: object) -> dict[tuple[str, int | None], float]:
        with open_checkpoint(source) as model:
            found = plan_projections(model, directions, AblationOptions(**options))
        return {(item.part.value, item.tensor.key.layer): round(item.strength, 6) for item in found}

    assert set(strengths().values()) == {1.0}
    assert strengths(attention_strength=0.5, mlp_strength=0.0) == {
        ("embedding", None): 1.0, ("attention", 0): 0.5, ("attention", 1): 0.5,
    }  # fmt: skip
    assert set(strengths(skip_begin=1)) == {("attention", 1), ("mlp", 1)}
    assert set(strengths(skip_end=1, embedding=False)) == {("attention", 0), ("mlp", 0)}
    peak = strengths(kernel="linear_peak", kernel_center=1.0, kernel_width=2.0)
    assert (peak["mlp", 0], peak["mlp", 1], peak["embedding", None]) == (0.5, 1.0, 0.5)


def test_the_kernels_are_what_they_are_called() -> None:
    n_layers = 11
    peak = [kernel_at(layer, n_layers, AblationOptions(kernel="linear_peak")) for layer in range(n_layers)]
    bell = [kernel_at(layer, n_layers, AblationOptions(kernel="gaussian")) for layer in range(n_layers)]
    assert peak == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0])
    assert bell == pytest.approx([np.exp(-0.5 * ((i / 10 - 0.5) / 0.4) ** 2) for i in range(n_layers)])


def test_each_layer_its_own_or_one_for_all_or_between_two(bases: Callable[[str], tuple[Path, Path]]) -> None:
    _, source = bases("llama2")
    directions = random_directions(source, 2)

    def basis(**options: object) -> dict[int | None, np.ndarray]:
        with open_checkpoint(source) as model:
            found = plan_projections(model, directions, AblationOptions(n_directions=1, **options))
        return {item.tensor.key.layer: item.basis[0] for item in found}

    first, second = directions.vectors[0, 0], directions.vectors[1, 0]
    assert all(np.allclose(row, second) for row in basis().values())  # the best layer
    own = basis(per_layer=True)
    assert np.allclose(own[0], first) and np.allclose(own[1], second) and np.allclose(own[None], first)
    middle = basis(layer=0.5)[0]
    wanted = first + np.sign(first @ second) * second
    assert middle @ wanted == pytest.approx(np.linalg.norm(wanted), rel=1e-5)
    apart = basis(projected=True)[0]
    assert abs(apart @ directions.harmless_means[1]) < 1e-4
    with open_checkpoint(source) as model:
        chosen = plan_projections(model, directions, AblationOptions(direction_index=1))[0].basis
    assert np.allclose(chosen[0], directions.vectors[1, 1], atol=1e-6) and len(chosen) == 1


@pytest.mark.parametrize("kind", ["llama2", "qwen3_moe", "gemma2"])
def test_the_lora_is_the_same_change(kind: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Merged into the model it gives the edited one, number by number."""
    from ollama_forge.jobs.merging import MergeInput, merge_model

    base, source = bases(kind)
    directions = random_directions(source, 2)
    options = AblationOptions(embedding=kind == "llama2", strength=0.9)
    edited = ablate(gguf(source), directions, tmp_path / "edited.gguf", options)
    lora = ablate(gguf(source), directions, tmp_path / "lora.gguf", options, as_lora=True)
    merge_model(gguf(source), [MergeInput(lora)], tmp_path / "merged.gguf")
    with open_gguf(edited) as one, open_gguf(tmp_path / "merged.gguf") as other:
        for name, tensor in one.tensors.items():
            first, second = (dequantize(file.read(name), tensor.type, tensor.shape) for file in (one, other))
            np.testing.assert_allclose(first, second, rtol=0, atol=2e-6, err_msg=name)
    again = ablate(folder(base), directions, tmp_path / "again.gguf", options, as_lora=True)
    for name, values in tensor_bytes(lora).items():
        one, other = (np.frombuffer(data, np.float32) for data in (values, tensor_bytes(again)[name]))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6, err_msg=name)
    if kind == "llama2":
        ablate(gguf(source), directions, tmp_path / "peft", options, as_lora=True)
        merge_model(folder(base), [MergeInput(tmp_path / "peft")], tmp_path / "peft-merged")
        left = share_left(base, tmp_path / "peft-merged", directions, options)
        assert all(share == pytest.approx(0.1, abs=1e-3) for share in left.values())


def test_a_lora_says_what_it_cannot_hold(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    from ollama_forge.errors import AdapterError

    _, tied = bases("llama3")
    _, biased = bases("gpt2")
    path = tmp_path / "directions.safetensors"
    write_directions(path, random_directions(tied))
    done = apply_ablation(gguf(tied), path, tmp_path / "lora.gguf", ApplyOptions(as_lora=True))
    assert "token_embedding" not in done.counts and any("embedding stays" in note for note in done.notes)
    assert not any("token_embd" in name for name in tensor_bytes(tmp_path / "lora.gguf"))
    write_directions(path, random_directions(biased), overwrite=True)
    with pytest.raises(AdapterError, match="cannot be changed by a LoRA"):
        apply_ablation(gguf(biased), path, tmp_path / "lora2.gguf", ApplyOptions(as_lora=True))
    with pytest.raises(UsageError, match="norms of rows"):
        options = ApplyOptions(AblationOptions(norm_preserving=True), as_lora=True)
        apply_ablation(gguf(tied), path, tmp_path / "lora3.gguf", options)


def changed_gguf(source: Path, target: Path, drop: str = "", add: str = "") -> Path:
    with open_gguf(source) as file, atomic_output(target) as sink:
        entries = [copy_entry(file, name) for name in file.tensors if name != drop]
        if add:
            entries.append(TensorEntry(add, (4, 64), GGMLType.F32, lambda: [bytes(4 * 4 * 64)]))
        write_gguf(sink, [from_reader(field) for field in file.fields.values()], entries)
    return target


def test_a_writer_that_is_missing_or_unknown_is_an_error(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, source = bases("qwen2")
    directions = random_directions(source)
    lacking = changed_gguf(source, tmp_path / "lacking.gguf", drop="blk.1.ffn_down.weight")
    foreign = changed_gguf(source, tmp_path / "foreign.gguf", add="blk.1.ffn_down_shexp.weight")
    with open_checkpoint(lacking) as model, pytest.raises(FormatError, match="no ffn_down in layer 1"):
        plan_ablation(model, directions, ALL)
    with open_checkpoint(foreign) as model, pytest.raises(UnsupportedError, match="ffn_down_shexp"):
        plan_ablation(model, directions, ALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0.0}, "Nothing would be edited"),
        ({"skip_begin": 1, "skip_end": 1}, "Nothing would be edited"),
        ({"strength": float("nan")}, "finite"),
        ({"kernel": "cosine"}, "no kernel 'cosine'"),
        ({"kernel": "gaussian", "kernel_width": 0.0}, "width"),
        ({"layer": 2.0}, "no layer 2"),
        ({"layer": 1.0, "per_layer": True}, "do not go together"),
        ({"direction_index": 3}, "no direction 3"),
        ({"skip_end": -1}, "negative"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, object], words: str, bases: Callable[[str], tuple[Path, Path]]
) -> None:
    _, source = bases("llama2")
    directions = random_directions(source)
    with open_checkpoint(source) as model, pytest.raises(UsageError, match=words):
        plan_ablation(model, directions, AblationOptions(**options))


def test_directions_of_another_model_are_refused(bases: Callable[[str], tuple[Path, Path]]) -> None:
    directions = random_directions(bases("llama2")[1])
    with open_checkpoint(bases("qwen2")[1]) as model, pytest.raises(UsageError, match="width 256"):
        plan_ablation(model, directions, ALL)


def test_a_tied_embedding_is_edited_unless_it_is_left_out(bases: Callable[[str], tuple[Path, Path]]) -> None:
    _, source = bases("qwen2")
    directions = random_directions(source)
    with open_checkpoint(source) as model:
        assert TensorKey(Role.OUTPUT) not in model.tensors
        told = plan_ablation(model, directions, ALL)
        silent = plan_ablation(model, directions, AblationOptions(embedding=False))
    assert any("tied" in note for note in told.notes) and "token_embedding" in told.counts
    assert not silent.notes and "token_embedding" not in silent.counts


@pytest.mark.parametrize("as_lora", [False, True])
def test_memory_is_bounded_by_the_largest_tensor(as_lora: bool, tmp_path: Path) -> None:
    """Twice the layers take no more memory: a process may grow by much less than the files hold."""
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from ollama_forge.files import atomic_output
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, float32, string, uint32, write_gguf
home, n_layers = Path(sys.argv[1]), int(sys.argv[2])
width, inner, vocab = 1024, 4096, 4096
def rows(shape):
    return lambda: (np.full((shape[-1],), 0.25, np.float16).tobytes() for _ in range(int(np.prod(shape[:-1]))))
shapes = {"token_embd.weight": (vocab, width), "output.weight": (vocab, width), "output_norm.weight": (width,)}
for i in range(n_layers):
    shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in {
        "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (width, width),
        "attn_v": (width, width), "attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width),
        "ffn_down": (width, inner)}.items()}
fields = [string("general.architecture", "llama"), uint32("llama.block_count", n_layers),
          uint32("llama.embedding_length", width), uint32("llama.feed_forward_length", inner),
          uint32("llama.attention.head_count", 8), uint32("llama.attention.head_count_kv", 8),
          uint32("llama.context_length", 512), float32("llama.attention.layer_norm_rms_epsilon", 1e-5),
          uint32("llama.vocab_size", vocab), float32("llama.rope.freq_base", 10000.0)]
with atomic_output(home / "base.gguf") as sink:
    write_gguf(sink, fields, [TensorEntry(n, s, GGMLType.F16, rows(s)) for n, s in shapes.items()])
from ollama_forge.jobs.abliteration import ApplyOptions, apply_ablation
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.transform.directions import Directions, write_directions
draw = np.random.default_rng(0).standard_normal((n_layers, 1, width)).astype(np.float32)
draw /= np.linalg.norm(draw, axis=2, keepdims=True)
write_directions(home / "d.safetensors", Directions(draw, 0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = ApplyOptions(as_lora=sys.argv[3] == "lora", n_threads=2)
base = ResolvedModel("b", gguf_path=home / "base.gguf")
done = apply_ablation(base, home / "d.safetensors", home / "o.gguf", options)
assert done.counts["ffn_down"] == n_layers
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    grown = []
    for n_layers in (3, 6):
        home = tmp_path / str(n_layers)
        home.mkdir()
        argv = [sys.executable, "-c", script, str(home), str(n_layers), "lora" if as_lora else "edit"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        grown.append(int(done.stdout))
        (home / "base.gguf").unlink()
        (home / "o.gguf").unlink()
    assert max(grown) < 2 * 16 + 60  # the largest tensor has 16 MB as float32
    assert abs(grown[1] - grown[0]) < 24

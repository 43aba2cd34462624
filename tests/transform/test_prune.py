"""A cut model computes what its source computes without the parts that went; what stays keeps its bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import build_model

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.engine import open_engine
from ollama_forge.engine_sampling import Sampling
from ollama_forge.errors import UnsupportedError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.mixture import QuantizeOptions
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType, GGMLType, ValueType, row_bytes
from ollama_forge.gguf.writer import array, copy_entry, from_reader, write_gguf
from ollama_forge.tokenizer.encode import build_tokenizer
from ollama_forge.transform.cut import Cut, read_sizes, validate_cut
from ollama_forge.transform.cut_request import parse_amount, parse_share, parse_width, settle_layers, settle_width
from ollama_forge.transform.prune import PrunedGGUF, plan_gguf_cut
from ollama_forge.transform.prune_folder import plan_folder_cut, write_pruned_folder
from ollama_forge.transform.ranking import Importance, choose_layers
from ollama_forge.weights.checkpoint import open_checkpoint

KINDS = ("llama2", "llama3", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "phi3_long", "gpt2")
FILLS_STREAM = ("qwen2", "phi3", "phi3_long", "gpt2")
WIDTH, FFN, N_LAYERS = 128, 192, 2


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(kind: str, **more: Any) -> Path:
        folder = tmp_path / kind
        build_model(kind, folder, hidden_size=more.pop("hidden_size", WIDTH), **more)
        if kind == "gpt2":
            _say_inner_size(folder)
        return folder

    return make


def _say_inner_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["n_inner"] = 4 * config["n_embd"]
    (folder / "config.json").write_text(json.dumps(config))


def to_gguf(folder: Path, out: Path, outtype: str = "f32", file_type: FileType | None = None) -> Path:
    options = ConvertOptions(outtype=outtype, quantize=QuantizeOptions(file_type) if file_type is not None else None)
    with plan_conversion(folder, options) as conversion, atomic_output(out) as sink:
        write_gguf(sink, conversion.fields, conversion.entries)
    return out


def cut_gguf(source: Path, cut: Cut, out: Path) -> PrunedGGUF:
    with open_checkpoint(source) as checkpoint:
        pruned = plan_gguf_cut(checkpoint, cut)
        with atomic_output(out) as sink:
            write_gguf(sink, pruned.fields, pruned.entries, alignment=pruned.alignment)
    assert out.stat().st_size == pruned.size_bytes
    return pruned


def cut_folder(source: Path, cut: Cut, out: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        pruned = plan_folder_cut(checkpoint, cut)
        write_pruned_folder(checkpoint, pruned, out)
    assert sum(path.stat().st_size for path in out.glob("*.safetensors*")) == pruned.size_bytes
    return out


def drawn(seed: int, n_rows: int, total: int, kept: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([np.sort(random.choice(total, kept, replace=False)) for _ in range(n_rows)])


def inner_cut(kind: str) -> Cut:
    """What can go without touching the residual stream, so that zeros in the source say the same."""
    if kind == "qwen3_moe":
        return Cut(kv_heads=np.array([[1], [0]]))
    ffn = drawn(0, N_LAYERS, 4 * WIDTH if kind == "gpt2" else FFN, 64)
    return Cut(ffn=ffn, kv_heads=None if kind in FILLS_STREAM else np.array([[1], [0]]))


def whole_cut(kind: str) -> Cut:
    """Everything that this kind lets go, the residual stream too."""
    heads = np.array([[0, 2], [1, 3]]) if kind == "gpt2" else np.array([[1], [0]])
    is_moe = kind == "qwen3_moe"
    return Cut(
        layers=None if kind.startswith("gemma") else np.array([1]),
        ffn=None if is_moe else inner_cut(kind).ffn,
        kv_heads=heads,
        hidden=drawn(1, 1, WIDTH, 64)[0],
        experts=drawn(2, N_LAYERS, 4, 3) if is_moe else None,
    )


def logits(folder: Path, change: Callable[[Any], None] | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if change:
        change(model)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None]).logits


def without(cut: Cut, head_dim: int = 32) -> Callable[[Any], None]:
    """Silence in a transformers model what a cut takes out of its layers."""

    def change(model: Any) -> None:
        base = model.base_model
        for number, layer in enumerate(base.h if hasattr(base, "h") else base.layers):
            with torch.no_grad():
                if cut.ffn is not None:
                    down = layer.mlp.c_proj if hasattr(layer.mlp, "c_proj") else layer.mlp.down_proj
                    weight = down.weight.T if hasattr(layer.mlp, "c_proj") else down.weight
                    gone = sorted(set(range(weight.shape[1])) - set(cut.ffn[number].tolist()))
                    weight[:, gone] = 0
                if cut.kv_heads is not None:
                    group = 2 * head_dim
                    for head in {0, 1} - set(cut.kv_heads[number].tolist()):
                        layer.self_attn.o_proj.weight[:, head * group : (head + 1) * group] = 0

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_folder_computes_what_its_source_computes_without_those_parts(
    made: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    source, cut = made(kind, dtype="float32"), inner_cut(kind)
    smaller = logits(cut_folder(source, cut, tmp_path / "small"))
    assert torch.allclose(smaller, logits(source, without(cut)), atol=1e-4)
    assert not torch.allclose(smaller, logits(source), atol=1e-2)


@pytest.mark.parametrize("kind", ["llama3", "qwen3_moe", "gpt2"])
def test_a_folder_without_a_layer_computes_what_its_source_computes_when_it_skips_that_layer(
    made: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    def skip_first(model: Any) -> None:
        base = model.base_model
        layers = base.h if hasattr(base, "h") else base.layers
        del layers[0]

    source = made(kind, dtype="float32")
    smaller = cut_folder(source, Cut(layers=np.array([1])), tmp_path / "small")
    assert torch.allclose(logits(smaller), logits(source, skip_first), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut_of", [inner_cut, whole_cut])
def test_cutting_and_converting_give_the_same_file_in_either_order(
    made: Callable[..., Path], tmp_path: Path, kind: str, cut_of: Callable[[str], Cut]
) -> None:
    source, cut = made(kind), cut_of(kind)
    cut_gguf(to_gguf(source, tmp_path / "whole.gguf"), cut, tmp_path / "first.gguf")
    to_gguf(cut_folder(source, cut, tmp_path / "small"), tmp_path / "second.gguf")
    with open_gguf(tmp_path / "first.gguf") as first, open_gguf(tmp_path / "second.gguf") as second:
        assert set(first.tensors) == set(second.tensors)
        for name, tensor in first.tensors.items():
            assert tensor.shape == second.tensors[name].shape, name
            assert first.read(name) == second.read(name), name
        ours = {key: bytes(entry.raw) for key, entry in first.fields.items()}
        theirs = {key: bytes(entry.raw) for key, entry in second.fields.items()}
        optional = [f"{first.architecture}.attention.{name}_length" for name in ("key", "value")]
        for key in ("general.name", "general.size_label", *optional):
            ours.pop(key, None)
            theirs.pop(key, None)
        assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_runs_in_the_engine(made: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    cut_gguf(to_gguf(made(kind), tmp_path / "whole.gguf"), whole_cut(kind), tmp_path / "small.gguf")
    with open_engine(tmp_path / "small.gguf", context_length=64) as engine:
        said = engine.generate("the", Sampling(temperature=0.0, seed=0, max_tokens=3))
    assert said.n_tokens >= 1


@pytest.mark.parametrize("kind", ["llama3", "qwen3_moe", "gemma3", "phi3", "gpt2"])
def test_a_cut_model_says_the_same_in_the_engine_and_in_transformers(
    made: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    source, cut = made(kind, dtype="float32"), whole_cut(kind)
    small = cut_folder(source, cut, tmp_path / "small")
    cut_gguf(to_gguf(source, tmp_path / "whole.gguf"), cut, tmp_path / "small.gguf")
    with open_engine(tmp_path / "small.gguf", context_length=64) as engine:
        said = engine.generate("the cat", Sampling(temperature=0.0, seed=0, max_tokens=6)).token_ids
    with open_gguf(tmp_path / "small.gguf") as file:
        prompt = build_tokenizer(file.metadata).encode("the cat", add_special=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in said:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert said and list(said) == ids[len(prompt) :]


def test_the_configuration_of_a_cut_folder_says_its_sizes(made: Callable[..., Path], tmp_path: Path) -> None:
    small = cut_folder(made("llama3"), whole_cut("llama3"), tmp_path / "small")
    config = transformers.AutoConfig.from_pretrained(small)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (64, 1, 64)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 32)


# --- quantized files --------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(made: Callable[..., Path], tmp_path: Path) -> Path:
    folder = made("llama3", hidden_size=512)
    return to_gguf(folder, tmp_path / "packed.gguf", file_type=FileType.MOSTLY_Q4_K_M)


def test_layers_that_stay_keep_every_byte_under_their_new_numbers(packed: Path, tmp_path: Path) -> None:
    pruned = cut_gguf(packed, Cut(layers=np.array([1])), tmp_path / "small.gguf")
    assert not pruned.sliced and not pruned.requantized
    with open_gguf(packed) as source, open_gguf(tmp_path / "small.gguf") as small:
        assert small.metadata["llama.block_count"] == 1
        expected = {name.replace("blk.1.", "blk.0."): name for name in source.tensors if not name.startswith("blk.0.")}
        assert set(small.tensors) == set(expected)
        for name, origin in expected.items():
            assert small.tensors[name].type is source.tensors[origin].type
            assert small.read(name) == source.read(origin)


def test_rows_and_whole_blocks_that_stay_keep_their_bytes(packed: Path, tmp_path: Path) -> None:
    channels = np.tile(np.concatenate([np.arange(256), np.arange(768, 1024)]), (N_LAYERS, 1))
    pruned = cut_gguf(packed, Cut(ffn=channels), tmp_path / "small.gguf")
    assert not pruned.requantized and len(pruned.sliced) == 3 * N_LAYERS
    with open_gguf(packed) as source, open_gguf(tmp_path / "small.gguf") as small:
        assert small.metadata["llama.feed_forward_length"] == 512
        for name in ("blk.0.ffn_up.weight", "blk.1.ffn_down.weight"):
            axis = 0 if "up" in name else 1
            before, after = (_floats(file, name) for file in (source, small))
            assert np.array_equal(np.take(before, channels[0], axis), after)


def _floats(file: Any, name: str) -> np.ndarray:
    tensor = file.find_tensor(name)
    return dequantize(file.read(name), tensor.type, tensor.shape)


def test_columns_cut_inside_blocks_are_encoded_anew_and_their_loss_is_told(packed: Path, tmp_path: Path) -> None:
    channels = drawn(3, N_LAYERS, 1024, 512)
    pruned = cut_gguf(packed, Cut(ffn=channels), tmp_path / "small.gguf")
    assert set(pruned.requantized) == {f"blk.{layer}.ffn_down.weight" for layer in range(N_LAYERS)}
    assert [loss.name for loss in pruned.losses] == list(pruned.requantized)
    with open_gguf(packed) as source, open_gguf(tmp_path / "small.gguf") as small:
        for layer, loss in enumerate(pruned.losses):
            name = f"blk.{layer}.ffn_down.weight"
            assert small.tensors[name].type is source.tensors[name].type
            wanted, found = _floats(source, name)[:, channels[layer]], _floats(small, name)
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            assert loss.relative_error == pytest.approx(error, rel=1e-3) and 0 < error < 0.15


def test_rows_that_no_longer_divide_into_blocks_get_the_type_that_llama_quantize_falls_back_to(
    packed: Path, tmp_path: Path
) -> None:
    pruned = cut_gguf(packed, Cut(hidden=drawn(4, 1, 512, 320)[0]), tmp_path / "small.gguf")
    moves = {(move.type, move.instead) for move in pruned.fallbacks}
    assert moves == {(GGMLType.Q4_K, GGMLType.Q5_0), (GGMLType.Q6_K, GGMLType.Q8_0)}
    with open_engine(tmp_path / "small.gguf", context_length=64) as engine:
        engine.generate("the", Sampling(temperature=0.0, seed=0, max_tokens=2))


def test_types_that_need_an_importance_matrix_are_cut_by_whole_layers_only(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made("llama3", hidden_size=256)
    source = _as_type(to_gguf(folder, tmp_path / "f32.gguf"), "ffn_down", GGMLType.IQ2_XXS, tmp_path / "iq.gguf")
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        cut_gguf(source, Cut(ffn=drawn(5, N_LAYERS, 512, 256)), tmp_path / "small.gguf")
    assert not (tmp_path / "small.gguf").exists()
    cut_gguf(source, Cut(layers=np.array([0])), tmp_path / "small.gguf")


def _as_type(source: Path, part: str, type: GGMLType, out: Path) -> Path:
    """The same file with some tensors said to be of another type; their bytes mean nothing."""
    from ollama_forge.gguf.writer import TensorEntry

    with open_gguf(source) as file:
        entries = [
            TensorEntry(name, t.shape, type, lambda t=t: [bytes(row_bytes(type, t.shape[-1]) * t.shape[0])])
            if part in name
            else copy_entry(file, name)
            for name, t in file.tensors.items()
        ]
        with atomic_output(out) as sink:
            write_gguf(sink, [from_reader(entry) for entry in file.fields.values()], entries)
    return out


def test_what_the_metadata_list_layer_by_layer_is_cut_with_the_layers(packed: Path, tmp_path: Path) -> None:
    listed = tmp_path / "listed.gguf"
    with open_gguf(packed) as file, atomic_output(listed) as sink:
        fields = [from_reader(entry) for entry in file.fields.values()]
        fields.append(array("llama.attention.sliding_window_pattern", ValueType.BOOL, [True, False]))
        fields.append(array("llama.rope.dimension_sections", ValueType.INT32, [16, 8]))
        write_gguf(sink, fields, [copy_entry(file, name) for name in file.tensors])
    cut_gguf(listed, Cut(layers=np.array([1])), tmp_path / "small.gguf")
    with open_gguf(tmp_path / "small.gguf") as small:
        assert list(small.metadata["llama.attention.sliding_window_pattern"]) == [False]
        assert list(small.metadata["llama.rope.dimension_sections"]) == [16, 8]


def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from ollama_forge.files import atomic_output
from ollama_forge.gguf.types import GGMLType, ValueType
from ollama_forge.gguf.writer import TensorEntry, array, float32, string, uint32, write_gguf
from ollama_forge.transform.cut import Cut
from ollama_forge.transform.prune import plan_gguf_cut
from ollama_forge.weights.checkpoint import open_checkpoint
source = Path(sys.argv[1]) / "whole.gguf"
counts = {"block_count": 10, "context_length": 64, "embedding_length": 1024, "feed_forward_length": 4096,
          "attention.head_count": 8, "attention.head_count_kv": 8, "vocab_size": 4}
fields = [string("general.architecture", "llama"), *(uint32("llama." + key, n) for key, n in counts.items()),
          float32("llama.attention.layer_norm_rms_epsilon", 1e-5),
          array("tokenizer.ggml.tokens", ValueType.STRING, ["a", "b", "c", "d"])]
rows = lambda: (np.full(1 << 19, 0.25, np.float16).tobytes() for _ in range(8))
entries = [TensorEntry(f"blk.{layer}.{name}.weight", shape, GGMLType.F16, rows) for layer in range(10)
           for name, shape in (("ffn_up", (4096, 1024)), ("ffn_down", (1024, 4096)))]
with atomic_output(source) as sink:
    write_gguf(sink, fields, entries)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for cut in (Cut(layers=np.arange(8)), Cut(ffn=np.tile(np.arange(0, 4096, 2), (10, 1)), hidden=np.arange(0, 1024, 2))):
    with open_checkpoint(source) as checkpoint, atomic_output(source.with_name("small.gguf"), overwrite=True) as sink:
        plan = plan_gguf_cut(checkpoint, cut)
        write_gguf(sink, plan.fields, plan.entries)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 60


# --- what cannot be met -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (Cut(layers=np.array([], dtype=np.int64)), "0 should be kept"),
        (Cut(layers=np.arange(N_LAYERS)), "Nothing would be cut"),
        (Cut(hidden=np.arange(WIDTH)), "Nothing would be cut"),
        (Cut(kv_heads=np.zeros((N_LAYERS, 3), np.int64)), "3 should be kept"),
    ],
)
def test_a_cut_that_makes_no_model_is_refused(made: Callable[..., Path], cut: Cut, words: str) -> None:
    with open_checkpoint(made("llama3")) as checkpoint, pytest.raises(UsageError, match=words):
        validate_cut(read_sizes(checkpoint), cut)


def test_heads_and_stream_must_fit_where_the_family_ties_them(made: Callable[..., Path]) -> None:
    with open_checkpoint(made("qwen2")) as checkpoint, pytest.raises(UsageError, match="do not make up") as caught:
        validate_cut(read_sizes(checkpoint), Cut(kv_heads=np.array([[0], [0]])))
    assert caught.value.next == "Cut both alike: --width hidden=64,heads=2"


def test_fewer_experts_than_a_token_needs_are_refused(made: Callable[..., Path]) -> None:
    with open_checkpoint(made("qwen3_moe")) as checkpoint, pytest.raises(UsageError, match="each token goes to 2"):
        validate_cut(read_sizes(checkpoint), Cut(experts=np.array([[0], [1]])))


def test_layers_of_kinds_that_take_turns_go_in_whole_turns(made: Callable[..., Path]) -> None:
    with open_checkpoint(made("gemma2")) as checkpoint:
        sizes = read_sizes(checkpoint)
        assert sizes.period == 2
        with pytest.raises(UsageError, match="another kind"):
            validate_cut(sizes, Cut(layers=np.array([1])))
    flat = Importance(1, np.ones((13, 13)), np.ones(12))
    assert choose_layers(flat, 6, period=6).tolist() == [6, 7, 8, 9, 10, 11]
    with pytest.raises(UsageError, match="multiples of 6"):
        choose_layers(flat, 7, period=6)


@pytest.mark.parametrize("text", ["0%", "100%", "1.5", "120%", "-3", "some", "", "0"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_share(text)


@pytest.mark.parametrize("text", ["ffn", "ffn=", "legs=3", "ffn=50%,ffn=40%", "heads=x", "ffn=50%,"])
def test_a_width_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_width(text)


def test_amounts_become_whole_channels_and_groups_of_heads(made: Callable[..., Path]) -> None:
    with open_checkpoint(made("llama3", hidden_size=512)) as checkpoint:
        sizes = read_sizes(checkpoint)
    assert (sizes.n_heads, sizes.n_kv_heads, sizes.group) == (16, 8, 2)
    target = settle_width(parse_width("ffn=70%,heads=10,hidden=75%"), sizes, unit=256)
    assert (target.ffn, target.n_kv_heads, target.hidden) == (768, 5, 384)
    with pytest.raises(UsageError, match="9 of 16 query heads") as caught:
        settle_width({"heads": parse_amount("9", "--width")}, sizes, unit=256)
    assert "heads=8 or --width heads=10" in caught.value.next
    for width in ("ffn=4096", "hidden=0", "experts=2", "heads=17"):
        with pytest.raises(UsageError):
            settle_width(parse_width(width), sizes, unit=256)


def test_a_share_becomes_the_number_of_layers_that_comes_nearest(made: Callable[..., Path]) -> None:
    with open_checkpoint(made("qwen3")) as checkpoint:
        sizes = read_sizes(checkpoint)
        whole = sum(tensor.nbytes for tensor in checkpoint.folder.tensors.values()) if checkpoint.folder else 0
        with open_checkpoint(checkpoint.path) as again:
            half = plan_folder_cut(again, Cut(layers=np.array([0])))
            share = sum(e.nbytes for s in half.shards.shards for e in s.entries) / whole
        assert settle_layers(share, checkpoint, sizes) == 1
        with pytest.raises(UsageError, match="cannot be reached"):
            settle_layers(0.05, checkpoint, sizes)
        with pytest.raises(UsageError, match="keeps every layer"):
            settle_layers(0.99, checkpoint, sizes)

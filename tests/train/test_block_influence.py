"""What the importance pass measures equals the papers' formulas, computed plainly from a dense model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from packed_sources import dense_model, dequantized_reference, write_gguf_of
from transformers import PreTrainedModel

from ollama_forge.errors import TrainingError
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train import block_influence
from ollama_forge.train.block_influence import PARTS, measure_importance
from ollama_forge.train.load import PackedModel, load_packed
from ollama_forge.transform.cut import ModelSizes
from ollama_forge.transform.ranking import Importance, Target, choose_cut, choose_layers, random_layers

ROWS = [[5, 17, 200, 31, 8, 90, 44, 3, 250, 12], [7, 7, 61, 130, 299, 4], [9]]
N_LAYERS = 4
FAMILIES = ("llama", "gemma3", "phi3", "gpt2", "qwen3_moe")
CHANGES = {name: {"n_layer" if name == "gpt2" else "num_hidden_layers": N_LAYERS} for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, PackedModel, PreTrainedModel]:
    name = request.param
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model(name, **CHANGES[name]), name, path, GGMLType.Q8_0, **CHANGES[name])
    dense = dequantized_reference(name, path, **CHANGES[name])
    if name != "qwen3_moe":  # transformers' experts take no float64
        dense = dense.double()
    return name, load_packed(path), dense


def streams(model: PreTrainedModel) -> list[np.ndarray]:
    """[layers + 1, positions, width] of each row, float64, the last one before the final norm."""
    found = []
    last = []
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    handle = layers[-1].register_forward_hook(
        lambda _layer, _inputs, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for row in ROWS:
            hidden = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            first = 1 if len(row) > 1 else 0
            found.append(np.stack([s[0, first:].double().numpy() for s in (*hidden[:-1], last[-1])]))
    handle.remove()
    return found


def test_layers_are_judged_by_the_cosines_of_the_residual_stream(
    both: tuple[str, PackedModel, PreTrainedModel],
) -> None:
    _, packed, dense = both
    found = measure_importance(packed, ROWS)
    stream = np.concatenate(streams(dense), axis=1)
    unit = stream / np.linalg.norm(stream, axis=-1, keepdims=True)
    cosines = np.einsum("apw,bpw->pab", unit, unit)
    assert np.allclose(found.influence, 1 - np.diagonal(cosines.mean(0), 1), atol=1e-4)
    distance = np.arccos(np.clip(cosines, -1, 1)).mean(0) / np.pi
    off = ~np.eye(N_LAYERS + 1, dtype=bool)
    assert np.allclose(found.distance[off], distance[off], atol=1e-3)
    assert (np.diagonal(found.distance) == 0).all() and found.n_tokens == sum(map(len, ROWS))


def test_channels_and_heads_are_judged_by_what_they_add_to_the_stream(
    both: tuple[str, PackedModel, PreTrainedModel],
) -> None:
    name, packed, dense = both
    parts = ["kv_heads"] if name == "qwen3_moe" else ["ffn", "kv_heads"]
    found = measure_importance(packed, ROWS, parts)
    base = dense.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    inputs: dict[tuple[int, str], list[torch.Tensor]] = {}

    def keep(key: tuple[int, str]) -> object:
        return lambda _layer, args: inputs.setdefault(key, []).append(args[0].reshape(-1, args[0].shape[-1]))

    matrices = {}
    for number, layer in enumerate(layers):
        if name == "gpt2":
            pair = {"heads": layer.attn.c_proj, "ffn": layer.mlp.c_proj}
        else:
            pair = {"heads": layer.self_attn.o_proj} | ({} if name == "qwen3_moe" else {"ffn": layer.mlp.down_proj})
        for what, matrix in pair.items():
            matrix.register_forward_pre_hook(keep((number, what)))
            matrices[number, what] = matrix.weight.T if name != "gpt2" else matrix.weight
    with torch.no_grad():
        for row in ROWS:
            dense(input_ids=torch.tensor([row]))
    for (number, what), seen in inputs.items():
        mean = torch.cat(seen).square().mean(0)
        shares = (mean * matrices[number, what].detach().square().sum(1)).numpy()
        if what == "ffn":
            assert found.ffn is not None and np.allclose(found.ffn[number], np.sqrt(shares), rtol=1e-3, atol=1e-6)
        else:
            n_kv_heads = 4 if name in ("gpt2",) else 2
            wanted = np.sqrt(shares.reshape(n_kv_heads, -1).sum(1))
            assert found.kv_heads is not None and np.allclose(found.kv_heads[number], wanted, rtol=1e-3)


def test_experts_are_judged_by_gate_times_output(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model("qwen3_moe"), "qwen3_moe", path, GGMLType.Q8_0)
    packed = load_packed(path)
    dense = dequantized_reference("qwen3_moe", path)
    found = measure_importance(packed, ROWS, ["experts"]).experts
    sums, counts = np.zeros((2, 4)), np.zeros((2, 4))

    def look(layer: int) -> object:
        def hook(experts: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen, weights = args
            for token in range(len(hidden)):
                for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
                    gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    sums[layer, expert] += weight * float(out.norm())
                    counts[layer, expert] += 1

        return hook

    for number, layer in enumerate(dense.model.layers):
        layer.mlp.experts.register_forward_pre_hook(look(number))
    with torch.no_grad():
        for row in ROWS:
            dense(input_ids=torch.tensor([row]))
    assert found is not None and np.allclose(found, sums / np.maximum(counts, 1), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_hidden_channels_are_judged_by_what_the_matrices_that_read_them_make_of_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model(name), name, path, GGMLType.Q8_0)
    packed, dense = load_packed(path), dequantized_reference(name, path)
    found = measure_importance(packed, ROWS, ["hidden"]).hidden
    readers: dict[torch.nn.Module, list[torch.Tensor]] = {}
    base = dense.base_model
    for layer in base.h if name == "gpt2" else base.layers:
        if name == "gpt2":
            readers[layer.ln_1], readers[layer.ln_2] = [layer.attn.c_attn.weight.T], [layer.mlp.c_fc.weight.T]
            continue
        attention = layer.self_attn
        readers[layer.input_layernorm] = [m.weight for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        if name == "llama":
            readers[layer.post_attention_layernorm] = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
        else:
            halves = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
            readers[layer.post_attention_layernorm] = [half.reshape(-1, half.shape[-1]) for half in halves]
    readers[base.ln_f if name == "gpt2" else base.norm] = [dense.lm_head.weight]
    seen: dict[torch.nn.Module, list[torch.Tensor]] = {norm: [] for norm in readers}
    for norm in readers:
        norm.register_forward_hook(lambda norm, _inputs, out: seen[norm].append(out.reshape(-1, out.shape[-1])))
    with torch.no_grad():
        for row in ROWS:
            base(input_ids=torch.tensor([row]))
        shares = [
            torch.cat(seen[norm]).square().mean(0) * weight.square().sum(0)
            for norm, weights in readers.items()
            for weight in weights
        ]
    wanted = sum(share / share.sum() for share in shares).numpy()
    assert found is not None and np.allclose(found, wanted, rtol=1e-3)


def test_the_same_text_gives_the_same_numbers_and_leaves_no_hook(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model("llama"), "llama", path, GGMLType.Q4_K)
    packed = load_packed(path)
    first, second = (measure_importance(packed, ROWS, PARTS[:3]) for _ in range(2))
    for name in ("distance", "influence", "ffn", "kv_heads", "hidden"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in packed.model.modules())


def test_of_a_long_row_only_as_many_positions_are_kept_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model("llama"), "llama", path, GGMLType.Q8_0)
    packed = load_packed(path)
    kept: list[int] = []
    fold = block_influence._Streams.fold

    def counted(probe: block_influence._Streams) -> None:
        kept.append(sum(stream.numel() * 4 for stream in probe._kept))
        fold(probe)

    monkeypatch.setattr(block_influence._Streams, "fold", counted)
    monkeypatch.setattr(block_influence, "STREAM_BYTES", 40 << 10)
    measure_importance(packed, [list(range(3, 203))])
    assert 0 < kept[0] <= 40 << 10


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model("llama"), "llama", path, GGMLType.Q8_0)
    with pytest.raises(TrainingError, match="no token"):
        measure_importance(load_packed(path), [])


# --- choosing ---------------------------------------------------------------------------------------------------------


def importance(influence: list[float]) -> Importance:
    """Angles that grow with the number of layers between, as much as each layer turns the stream."""
    steps = np.array([0.0, *np.cumsum(influence)])
    return Importance(1, np.abs(steps[:, None] - steps[None]), np.array(influence))


def test_neighbours_over_which_the_stream_turns_least_go_or_the_least_influential_wherever_they_are() -> None:
    found = importance([9, 1, 5, 2, 2.5, 3, 9])
    assert choose_layers(found, 5, "distance").tolist() == [0, 1, 2, 5, 6]
    assert choose_layers(found, 5, "influence").tolist() == [0, 2, 4, 5, 6]


def test_the_most_important_of_each_part_stay_and_equal_ones_by_their_place() -> None:
    sizes = ModelSizes(n_layers=2, hidden=4, ffn=4, n_heads=4, n_kv_heads=2, head_dim=8)
    found = Importance(
        1,
        np.zeros((3, 3)),
        np.zeros(2),
        ffn=np.array([[1.0, 4, 3, 2], [5, 5, 5, 5]]),
        kv_heads=np.array([[1.0, 2], [2, 1]]),
        hidden=np.array([4.0, 1, 2, 3]),
    )
    cut = choose_cut(found, sizes, Target(ffn=2, n_kv_heads=1, hidden=3))
    assert cut.layers is None and cut.ffn is not None and cut.kv_heads is not None and cut.hidden is not None
    assert cut.ffn.tolist() == [[1, 2], [0, 1]]
    assert cut.kv_heads.tolist() == [[1], [0]]
    assert cut.hidden.tolist() == [0, 2, 3]


def test_layers_by_chance_follow_the_seed() -> None:
    assert random_layers(12, 8, 3).tolist() == random_layers(12, 8, 3).tolist()
    assert len({tuple(random_layers(12, 8, seed).tolist()) for seed in range(5)}) > 1

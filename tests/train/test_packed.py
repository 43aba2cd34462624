"""Packed layers against the same layers dense, for every type that ggml can quantize to."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from ollama_forge.errors import TrainingError, UnsupportedError
from ollama_forge.gguf.native import IMATRIX_TYPES, dequantize, quantize
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train import blocks as blocks_module
from ollama_forge.train.blocks import PackedMatrix, Workspace
from ollama_forge.train.packed import PackedEmbedding, PackedLinear
from ollama_forge.train.unpack import UNPACKED_TYPES, unpack_blocks

TYPES = [
    *(GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q5_K, GGMLType.Q5_0),
    *(GGMLType.Q5_1, GGMLType.Q4_K, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q3_K, GGMLType.Q2_K, GGMLType.IQ4_NL),
    *(GGMLType.IQ4_XS, GGMLType.IQ3_S, GGMLType.IQ3_XXS, GGMLType.IQ2_XXS, GGMLType.IQ2_S, GGMLType.IQ1_S),
]
ROWS, COLUMNS = 48, 512


def packed_matrix(
    type: GGMLType, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0, heads: int = 0
) -> PackedMatrix:
    numbers = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    numbers[:, ::37] *= 6
    imatrix = np.linspace(0.5, 2.0, columns, dtype=np.float32) if type in IMATRIX_TYPES else None
    return PackedMatrix(torch.from_numpy(quantize(numbers, type, imatrix)), type, columns, heads)


def dense_weight(matrix: PackedMatrix) -> torch.Tensor:
    """What ggml decodes, in Hugging Face's row order, made without the code under test."""
    numbers = dequantize(matrix.blocks.numpy(), matrix.type, (matrix.rows, matrix.columns))
    if matrix.rope_heads:
        numbers = numbers.reshape(matrix.rope_heads, -1, 2, matrix.columns).swapaxes(1, 2).reshape(numbers.shape)
    return torch.from_numpy(np.ascontiguousarray(numbers))


def wrappable(matrix: PackedMatrix) -> nn.ModuleDict:
    return nn.ModuleDict({"norm": nn.LayerNorm(4), "proj": PackedLinear(matrix, None, Workspace())})


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("type", sorted(UNPACKED_TYPES), ids=lambda type: type.name)
def test_torch_operations_decode_blocks_bit_for_bit_as_ggml_does(type: GGMLType) -> None:
    matrix = packed_matrix(type, rows=64)
    expected = dequantize(matrix.blocks.numpy(), type, (64, COLUMNS))
    found = unpack_blocks(matrix.blocks, type)
    assert torch.equal(found.view(torch.int32), torch.from_numpy(expected).view(torch.int32))


def test_torch_operations_refuse_a_type_they_do_not_know() -> None:
    with pytest.raises(UnsupportedError, match="IQ3_S"):
        unpack_blocks(packed_matrix(GGMLType.IQ3_S).blocks, GGMLType.IQ3_S)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_output_and_input_gradient_equal_the_dense_layer(type: GGMLType) -> None:
    matrix = packed_matrix(type)
    bias = torch.randn(ROWS)
    layer = PackedLinear(matrix, bias, Workspace())
    x = torch.randn(2, 7, COLUMNS, requires_grad=True)
    reference_x = x.detach().clone().requires_grad_()
    expected = nn.functional.linear(reference_x, dense_weight(matrix), bias)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    found.backward(upstream)
    assert x.grad is not None and reference_x.grad is not None
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=1e-5, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("capacity_bytes", [1, 4 * COLUMNS * 10, 4 * COLUMNS * 3 * ROWS])
@pytest.mark.parametrize("heads", [0, 4])
def test_pieces_of_any_size_give_the_same_numbers(capacity_bytes: int, heads: int) -> None:
    matrix = packed_matrix(GGMLType.Q4_K, heads=heads)
    layer = PackedLinear(matrix, None, Workspace(capacity_bytes))
    x = torch.randn(5, COLUMNS, requires_grad=True)
    for _ in range(2):
        x.grad = None
        y = layer(x)
        torch.testing.assert_close(y, x @ dense_weight(matrix).t(), rtol=1e-5, atol=1e-4)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        torch.testing.assert_close(gradient, torch.ones_like(y) @ dense_weight(matrix), rtol=1e-5, atol=1e-4)


def test_many_layers_share_a_small_workspace_without_mixing_their_numbers() -> None:
    workspace = Workspace(4 * COLUMNS * ROWS * 2)
    layers = [PackedLinear(packed_matrix(GGMLType.Q6_K, seed=seed), None, workspace) for seed in range(5)]
    x = torch.randn(3, COLUMNS)
    for index in (0, 1, 2, 3, 4, 4, 3, 0, 2, 1, 1, 0):
        torch.testing.assert_close(layers[index](x), x @ dense_weight(layers[index].matrix).t(), rtol=1e-5, atol=1e-4)


def test_layers_of_many_sizes_in_any_order_keep_their_own_numbers() -> None:
    workspace = Workspace(4 * COLUMNS * 100)
    sizes = (7, 30, 3, 21, 33, 1, 12, 28)
    layers = [PackedLinear(packed_matrix(GGMLType.Q8_0, n, seed=n), None, workspace) for n in sizes]
    weights = [dense_weight(layer.matrix) for layer in layers]
    x = torch.randn(2, COLUMNS)
    order = torch.randint(len(layers), (400,), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        torch.testing.assert_close(layers[index](x), x @ weights[index].t(), rtol=1e-5, atol=1e-4)


def test_the_workspace_never_grows_beyond_its_size() -> None:
    workspace = Workspace(4 * COLUMNS * ROWS)
    for seed in range(6):
        PackedLinear(packed_matrix(GGMLType.Q4_0, rows=200, seed=seed), None, workspace)(torch.randn(2, COLUMNS))
    (ring,) = workspace._rings.values()
    assert ring._flat.numel() * 4 == workspace.capacity_bytes
    workspace.release()
    assert not workspace._rings


def test_numbers_asked_for_again_soon_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    write_rows = blocks_module.write_rows
    monkeypatch.setattr(blocks_module, "write_rows", lambda *args: (decoded.append(1), write_rows(*args))[1])
    layer = PackedLinear(packed_matrix(GGMLType.Q4_K), None, Workspace())
    x = torch.randn(3, COLUMNS, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(decoded) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_in_backward_gives_the_same_gradient(use_reentrant: bool) -> None:
    workspace = Workspace()
    layers = nn.Sequential(
        *(PackedLinear(packed_matrix(GGMLType.Q5_K, 512, 512, seed), None, workspace) for seed in range(3))
    )
    x = torch.randn(4, 512, requires_grad=True)
    (expected,) = torch.autograd.grad(layers(x).square().sum(), x)
    checkpoint(layers, x, use_reentrant=use_reentrant).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16], ids=lambda type: type.name)
def test_stored_floats_are_multiplied_where_they_lie(type: GGMLType) -> None:
    matrix = packed_matrix(type)
    dtype = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}[type]
    direct = matrix.direct(dtype)
    assert direct is not None
    assert direct.data_ptr() == matrix.blocks.data_ptr()
    workspace = Workspace()
    PackedLinear(matrix, None, workspace)(torch.randn(2, COLUMNS, dtype=dtype))
    assert not workspace._rings


def test_more_threads_give_the_same_numbers(two_threads: None) -> None:
    matrix = packed_matrix(GGMLType.Q6_K, rows=5000)
    found = matrix.dequantized()
    assert torch.equal(found, dense_weight(matrix))


def test_layers_may_run_on_several_threads_at_once() -> None:
    workspace = Workspace(4 * COLUMNS * ROWS * 2)
    layers = [PackedLinear(packed_matrix(GGMLType.Q4_K, seed=seed), None, workspace) for seed in range(4)]
    x = torch.randn(3, COLUMNS)
    expected = [layer(x) for layer in layers]
    wrong = []

    def run(index: int) -> None:
        for _ in range(50):
            if not torch.equal(layers[index](x), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_computes_in_its_own_dtype() -> None:
    matrix = packed_matrix(GGMLType.Q4_K)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = PackedLinear(matrix, torch.zeros(ROWS), Workspace())(x)
    assert y.dtype == torch.bfloat16
    expected = x.bfloat16() @ dense_weight(matrix).bfloat16().t()
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=0.3)
    y.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense_weight(matrix).sum(0).expand(3, -1), rtol=5e-2, atol=0.3)


@pytest.mark.parametrize(
    "type", [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.F16, GGMLType.IQ3_S], ids=lambda type: type.name
)
def test_embedding_rows_equal_those_of_the_dense_table(type: GGMLType) -> None:
    matrix = packed_matrix(type, rows=100)
    ids = torch.tensor([[3, 99, 3], [0, 7, 99]])
    assert torch.equal(PackedEmbedding(matrix)(ids), dense_weight(matrix)[ids])
    scaled = PackedEmbedding(matrix, embed_scale=torch.tensor(16.0))
    assert torch.equal(scaled(ids), dense_weight(matrix)[ids] * 16)


def test_a_token_outside_the_table_is_refused_with_its_number() -> None:
    with pytest.raises(TrainingError, match="100") as caught:
        PackedEmbedding(packed_matrix(GGMLType.Q8_0, rows=100))(torch.tensor([5, 100]))
    assert "100 rows" in caught.value.why


def test_blocks_that_do_not_fit_the_columns_are_refused() -> None:
    with pytest.raises(TrainingError, match="Q4_K"):
        PackedMatrix(torch.zeros(4, 143, dtype=torch.uint8), GGMLType.Q4_K, 256)
    with pytest.raises(TrainingError, match="heads"):
        PackedMatrix(torch.zeros(6, 144, dtype=torch.uint8), GGMLType.Q4_K, 256, rope_heads=4)


def test_the_weight_can_be_read_as_if_it_were_dense() -> None:
    matrix = packed_matrix(GGMLType.Q4_K, heads=4)
    layer = PackedLinear(matrix, None, Workspace())
    weight = layer.weight
    assert weight.shape == (ROWS, COLUMNS) and weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert torch.equal(weight + 0, dense_weight(matrix))
    assert torch.equal(weight[8:20], dense_weight(matrix)[8:20])
    x = torch.randn(2, COLUMNS)
    torch.testing.assert_close(nn.functional.linear(x, weight), x @ dense_weight(matrix).t(), rtol=1e-5, atol=1e-4)
    assert "Q4_K" in repr(weight) and "Q4_K" in repr(layer)


def test_a_slice_of_rows_decodes_only_those_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    write_rows = blocks_module.write_rows
    monkeypatch.setattr(
        blocks_module,
        "write_rows",
        lambda blocks, *rest: (shapes.append(blocks.shape[0]), write_rows(blocks, *rest))[1],
    )
    matrix = packed_matrix(GGMLType.Q6_K)
    weight = PackedLinear(matrix, None, Workspace()).weight
    for start, end in ((0, 16), (40, 99), (-3, None)):
        assert torch.equal(weight[start:end].contiguous(), dense_weight(matrix)[start:end])
    assert shapes == [16, 8, 3]


def test_writing_into_the_weight_is_refused() -> None:
    layer = PackedLinear(packed_matrix(GGMLType.Q4_K), None, Workspace())
    before = layer.matrix.blocks.clone()
    with pytest.raises(UnsupportedError, match="blocks"):
        layer.weight.add_(1.0)
    with pytest.raises(UnsupportedError, match="blocks"):
        layer.weight.data += 1.0
    assert torch.equal(layer.matrix.blocks, before)


def test_peft_wraps_a_packed_layer_as_a_linear_one() -> None:
    matrix = packed_matrix(GGMLType.Q4_K, heads=4)
    model = wrappable(matrix)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], init_lora_weights=False))
    layer = wrapped.base_model.model["proj"]
    x = torch.randn(3, COLUMNS)
    update = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (dense_weight(matrix) + update).t(), rtol=1e-4, atol=1e-3)
    assert layer.lora_A["default"].weight.dtype == torch.float32


def test_peft_norms_of_the_weight_see_the_decoded_numbers() -> None:
    matrix = packed_matrix(GGMLType.Q4_K)
    model = wrappable(matrix)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["proj"], use_dora=True))
    magnitude = wrapped.base_model.model["proj"].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), dense_weight(matrix).norm(dim=1))


def test_an_initialisation_that_would_change_the_base_is_refused() -> None:
    model = wrappable(packed_matrix(GGMLType.Q4_K))
    before = model["proj"].matrix.blocks.clone()
    with pytest.raises(UnsupportedError, match="blocks"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["proj"], init_lora_weights="pissa"))
    assert torch.equal(before, model["proj"].matrix.blocks)


def test_converting_or_copying_a_layer_keeps_its_blocks() -> None:
    layer = PackedLinear(packed_matrix(GGMLType.Q4_K), torch.zeros(ROWS), Workspace())
    same = layer.to(torch.bfloat16)
    assert same.matrix.blocks.data_ptr() == layer.matrix.blocks.data_ptr()
    assert same.bias.dtype == torch.bfloat16
    twin = copy.deepcopy(layer)
    assert twin.workspace is layer.workspace
    assert torch.equal(twin.matrix.blocks, layer.matrix.blocks)
    assert list(layer.state_dict()) == ["bias"]
    assert not list(layer.buffers())


def test_another_device_gets_the_blocks_it_can_unpack() -> None:
    known = packed_matrix(GGMLType.Q4_K).moved(lambda tensor: tensor.to("meta"))
    assert known.blocks.device.type == "meta" and known.device.type == "meta"
    unknown = packed_matrix(GGMLType.IQ3_S).moved(lambda tensor: tensor.to("meta"))
    assert unknown.blocks.device.type == "cpu" and unknown.device.type == "meta"


def test_a_mapped_file_is_not_copied(tmp_path: Path) -> None:
    matrix = packed_matrix(GGMLType.Q4_K)
    path = tmp_path / "blocks"
    path.write_bytes(matrix.blocks.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=matrix.blocks.numel(), dtype=torch.uint8)
    layer = PackedLinear(PackedMatrix(mapped.view(ROWS, -1), GGMLType.Q4_K, COLUMNS), None, Workspace())
    assert layer.to("cpu").matrix.blocks.data_ptr() == mapped.data_ptr()
    assert torch.equal(layer.weight + 0, dense_weight(matrix))

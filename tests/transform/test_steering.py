"""Steered rounding: a change that plain rounding takes back survives along its direction, at little cost."""

from __future__ import annotations

import numpy as np
import pytest

from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.types import GGMLType
from ollama_forge.transform.edits import Floats, LossMeter, OutputEdit, OutputShift
from ollama_forge.transform.outputs import edit_outputs
from ollama_forge.transform.steering import store_rows

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K")


def unit(draw: np.random.Generator, count: int, size: int) -> Floats:
    return np.linalg.qr(draw.standard_normal((size, count)))[0].T.astype(np.float32)


def packed(draw: np.random.Generator, type_: GGMLType, rows: int, columns: int) -> tuple[np.ndarray, Floats]:
    """Random weights that lie on the type's own grid, as those of a quantized model do."""
    encoded = quantize((0.02 * draw.standard_normal((rows, columns))).astype(np.float32), type_)
    return encoded, dequantize(encoded, type_, (rows, columns))


class WithoutDirections:
    """W - B^T (B W)."""

    def __init__(self, basis: Floats) -> None:
        self.basis = basis

    def probes(self, matrix: int) -> Floats:
        return self.basis

    def settle(self, matrix: int, sums: Floats) -> OutputShift:
        return OutputShift(self.basis, -sums)


def edit(
    encoded: np.ndarray, type_: GGMLType, shape: tuple[int, ...], basis: Floats, *, steered: bool, **more: object
) -> tuple[Floats, LossMeter]:
    meter = LossMeter("w", type_.name)
    change = OutputEdit("w", lambda: WithoutDirections(basis), (lambda: basis) if steered else None)
    view = memoryview(encoded.reshape(-1))
    stored = b"".join(bytes(part) for part in edit_outputs(view, type_, shape, change, meter, **more))
    return dequantize(np.frombuffer(stored, np.uint8), type_, shape), meter


@pytest.mark.parametrize("n_directions", [1, 3])
@pytest.mark.parametrize("name", TYPES)
def test_an_output_direction_is_taken_out_of_packed_weights(name: str, n_directions: int) -> None:
    draw = np.random.default_rng(7)
    type_ = GGMLType[name]
    encoded, weights = packed(draw, type_, 512, 512)
    basis = unit(draw, n_directions, 512)
    plain, _ = edit(encoded, type_, weights.shape, basis, steered=False)
    out, meter = edit(encoded, type_, weights.shape, basis, steered=True)

    before, left, left_plain = (np.linalg.norm(basis @ values) for values in (weights, out, plain))
    assert left < (0.25 if name == "Q2_K" else 0.12) * before
    assert left < max(0.5 * left_plain, 0.03 * before)
    assert 0.9 < meter.result().survived < 1.1
    fresh = (0.02 * draw.standard_normal(weights.shape)).astype(np.float32)
    rounding = np.linalg.norm(dequantize(quantize(fresh, type_), type_, fresh.shape) - fresh)
    assert np.linalg.norm(out - weights) < rounding + 2 * np.linalg.norm(basis @ weights)


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q4_K", "Q4_0"])
def test_an_input_direction_is_taken_out_of_packed_rows(name: str) -> None:
    draw = np.random.default_rng(8)
    type_ = GGMLType[name]
    _, weights = packed(draw, type_, 300, 512)
    basis = unit(draw, 2, 512)
    wanted = weights - weights @ basis.T @ basis
    reported: list[Floats] = []
    encoded = store_rows(
        weights, lambda rows, _: wanted[rows], type_, basis,
        report=lambda before, change, missing: reported.append(before + change - missing), n_threads=1,
    )  # fmt: skip
    stored = dequantize(encoded, type_, weights.shape)
    assert np.allclose(stored, np.concatenate(reported), atol=1e-7)
    plain = dequantize(quantize(np.ascontiguousarray(wanted), type_), type_, weights.shape)
    left, left_plain = (np.linalg.norm(values @ basis.T) for values in (stored, plain))
    assert left < 0.12 * np.linalg.norm(weights @ basis.T)
    assert left <= left_plain


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_sixteen_bits_keep_a_thousandth_at_most(name: str) -> None:
    draw = np.random.default_rng(9)
    type_ = GGMLType[name]
    encoded, weights = packed(draw, type_, 512, 300)
    basis = unit(draw, 2, 512)
    out, _ = edit(encoded, type_, weights.shape, basis, steered=True)
    assert np.linalg.norm(basis @ out) < 1e-3 * np.linalg.norm(basis @ weights)
    rows = np.ascontiguousarray(weights.T)
    projected = rows - rows @ basis.T @ basis
    stored = dequantize(store_rows(rows, lambda chosen, _: projected[chosen], type_, basis), type_, rows.shape)
    assert np.linalg.norm(stored @ basis.T) < 1e-3 * np.linalg.norm(rows @ basis.T)


def test_a_stack_is_edited_matrix_by_matrix_with_its_own_importance() -> None:
    draw = np.random.default_rng(10)
    type_ = GGMLType.Q4_K
    encoded, _ = packed(draw, type_, 3 * 256, 256)
    basis = unit(draw, 1, 256)
    shape = (3, 256, 256)
    importance = (draw.random(3 * 256) + 0.01).astype(np.float32)
    out, _ = edit(encoded, type_, shape, basis, steered=True, importance=importance)
    alone = [
        edit(
            encoded[n * 256 : (n + 1) * 256], type_, (256, 256), basis, steered=True,
            importance=importance[n * 256 : (n + 1) * 256],
        )[0]
        for n in range(3)
    ]  # fmt: skip
    assert np.array_equal(out, np.stack(alone))


def test_threads_change_nothing() -> None:
    draw = np.random.default_rng(11)
    encoded, weights = packed(draw, GGMLType.Q4_K, 2048, 1024)
    basis = unit(draw, 1, 2048)
    one, first = edit(encoded, GGMLType.Q4_K, weights.shape, basis, steered=True, n_threads=1)
    two, second = edit(encoded, GGMLType.Q4_K, weights.shape, basis, steered=True, n_threads=3)
    assert np.array_equal(one, two)
    assert first.result().survived == pytest.approx(second.result().survived)

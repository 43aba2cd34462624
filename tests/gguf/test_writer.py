import io
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_forge as forge
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.errors import GGUFError, NotFoundError, UnsupportedError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.reader import GGUFArray, open_gguf
from ollama_forge.gguf.types import BLOCKS, VALUE_FORMATS, GGMLType, ValueType, tensor_bytes
from ollama_forge.gguf.writer import (
    Field,
    TensorEntry,
    array,
    boolean,
    copy_entry,
    float32,
    from_reader,
    int32,
    plan_layout,
    string,
    uint32,
    uint64,
    write_gguf,
)

LLAMA = string("general.architecture", "llama")


def entry(
    name: str, shape: tuple[int, ...], type: GGMLType = GGMLType.F32, content: bytes | None = None
) -> TensorEntry:
    content = bytes(tensor_bytes(type, shape)) if content is None else content
    return TensorEntry(name, shape, type, lambda: [content])


def written(fields: list[Field], entries: list[TensorEntry], alignment: int = 32) -> bytes:
    sink = io.BytesIO()
    write_gguf(sink, fields, entries, alignment=alignment)
    return sink.getvalue()


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, GGUFArray) else value


any_text = st.text(st.characters(codec="utf-8"), max_size=20)
keys = st.text("abcdefghij.é_", min_size=1, max_size=30).filter(lambda key: key != "general.alignment")


def scalars(type: ValueType) -> st.SearchStrategy[Any]:
    if type is ValueType.STRING:
        return any_text
    if type is ValueType.BOOL:
        return st.booleans()
    if type in (ValueType.FLOAT32, ValueType.FLOAT64):
        return st.floats(width=32 if type is ValueType.FLOAT32 else 64, allow_nan=False)
    bits = 8 * struct.calcsize(VALUE_FORMATS[type])
    signed = type.name.startswith("INT")
    return st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else st.integers(0, (1 << bits) - 1)


@st.composite
def any_fields(draw: st.DrawFn) -> list[Field]:
    fields = [LLAMA]
    for key in draw(st.lists(keys, unique=True, max_size=8)):
        type = draw(st.sampled_from(list(ValueType)))
        if type is ValueType.ARRAY:
            item_type = draw(st.sampled_from([t for t in ValueType if t is not ValueType.ARRAY]))
            fields.append(array(key, item_type, draw(st.lists(scalars(item_type), max_size=6))))
        else:
            fields.append(Field(key, type, draw(scalars(type))))
    return fields


@st.composite
def any_entries(draw: st.DrawFn) -> list[TensorEntry]:
    entries = []
    for name in draw(st.lists(st.text("abc.0_", min_size=1, max_size=20), unique=True, max_size=5)):
        type = draw(st.sampled_from(list(GGMLType)))
        outer = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
        shape = (*outer, BLOCKS[type][0] * draw(st.integers(1, 3)))
        seed = draw(st.integers(0, 255))
        content = bytes((seed + i) & 255 for i in range(tensor_bytes(type, shape)))
        entries.append(entry(name, shape, type, content))
    return entries


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(fields=any_fields(), entries=any_entries(), alignment=st.sampled_from([1, 8, 32, 64, 4096]))
def test_what_is_written_is_read_back(
    tmp_path: Path, fields: list[Field], entries: list[TensorEntry], alignment: int
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(written(fields, entries, alignment))
    layout = plan_layout(fields, entries, alignment)
    assert path.stat().st_size == layout.size_bytes
    with open_gguf(path) as file:
        expected = {f.key: (f.type, f.item_type, f.value) for f in fields}
        if alignment != 32:
            expected["general.alignment"] = (ValueType.UINT32, None, alignment)
        found = {f.key: (f.type, f.item_type, plain(f.value)) for f in file.fields.values()}
        assert found == expected
        assert tuple(file.tensors.values()) == layout.tensors
        assert [(t.name, t.shape, t.type) for t in layout.tensors] == [(e.name, e.shape, e.type) for e in entries]
        assert all(t.offset % alignment == 0 for t in layout.tensors)
        assert all(bytes(file.read(e.name)) == b"".join(e.chunks()) for e in entries)
        again = written(
            [from_reader(f) for f in file.fields.values()], [copy_entry(file, n) for n in file.tensors], alignment
        )
    assert again == path.read_bytes()


def test_gguf_py_reads_the_same_from_our_file(tmp_path: Path) -> None:
    weights = np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64)
    packed = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    fields = [
        LLAMA,
        uint32("llama.block_count", 2),
        float32("llama.rope.freq_base", 1e4),
        boolean("tokenizer.ggml.add_bos_token", True),
        uint64("x.big", 1 << 40),
        int32("x.negative", -5),
        array("tokenizer.ggml.tokens", ValueType.STRING, ["<s>", "Ġé", "中"]),
        array("tokenizer.ggml.scores", ValueType.FLOAT32, [0.0, -1.0, -2.5]),
        array("tokenizer.ggml.token_type", ValueType.INT32, [1, 3, 1]),
    ]
    entries = [
        TensorEntry("a.weight", (2, 3, 64), GGMLType.F32, lambda: iter(weights)),
        TensorEntry("b.weight", (2, 3, 64), GGMLType.Q8_0, lambda: [packed]),
    ]
    path = tmp_path / "ours.gguf"
    with atomic_output(path, expected_bytes=plan_layout(fields, entries).size_bytes) as sink:
        write_gguf(sink, fields, entries)
    reader = gguf.GGUFReader(path)
    assert {f.key: reader.fields[f.key].contents() for f in fields} == {f.key: f.value for f in fields}
    assert {f.key: reader.fields[f.key].types[0].name for f in fields} == {f.key: f.type.name for f in fields}
    by_name = {t.name: t for t in reader.tensors}
    assert by_name["a.weight"].data.tobytes() == weights.tobytes()
    assert by_name["b.weight"].data.tobytes() == packed.tobytes()
    assert [int(n) for n in by_name["b.weight"].shape] == [64, 3, 2]


def test_our_file_equals_gguf_pys_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    weights = np.arange(5 * 7, dtype=np.float32).reshape(5, 7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("n")
    writer.add_block_count(2)
    writer.add_token_list(["a", "bc"])
    writer.add_tensor("w", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = [
        array("tokenizer.ggml.tokens", ValueType.STRING, ["a", "bc"]),
        uint32("llama.block_count", 2),
        string("general.name", "n"),
        LLAMA,
    ]
    ours = written(fields, [TensorEntry("w", (5, 7), GGMLType.F32, lambda: [weights])])
    assert ours == path.read_bytes()


def test_keys_come_in_the_order_of_ollamas_quick_scan(tmp_path: Path) -> None:
    fields = [
        uint32("split.x", 1),
        string("tokenizer.ggml.model", "gpt2"),
        uint32("llama.b", 2),
        string("adapter.type", "lora"),
        string("general.name", "n"),
        uint32("llama.a", 1),
        LLAMA,
        uint32("llamas.c", 1),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(written(fields, []))
    with open_gguf(path) as file:
        assert list(file.metadata) == [
            "general.architecture",
            "general.name",
            "llama.b",
            "llama.a",
            "tokenizer.ggml.model",
            "split.x",
            "adapter.type",
            "llamas.c",
        ]


def test_tokens_that_are_not_utf_8_are_written_as_they_were_read(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(forge.small_file())
    with open_gguf(path) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        decoded = array("tokenizer.ggml.tokens", ValueType.STRING, tokens.tolist())
        lazy = array("tokenizer.ggml.tokens", ValueType.STRING, tokens)
        raw = from_reader(file.fields["tokenizer.ggml.tokens"])
        assert written([LLAMA, decoded], []) == written([LLAMA, lazy], []) == written([LLAMA, raw], [])
    assert b"\x02\0\0\0\0\0\0\0\xff\xfe" in written([LLAMA, array("t", ValueType.STRING, [b"\xff\xfe"])], [])


def test_a_wrong_alignment_of_the_source_is_corrected(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(written([LLAMA, uint32("general.alignment", 64)], [entry("a", (1,)), entry("b", (1,))]))
    with open_gguf(path) as file:
        assert file.alignment == 32
        assert "general.alignment" not in file.metadata


def test_tensors_are_asked_for_one_at_a_time_and_progress_adds_up() -> None:
    order: list[str] = []

    def chunks(name: str) -> Iterator[bytes]:
        for part in range(4):
            order.append(f"{name}{part}")
            yield bytes(16)

    entries = [TensorEntry(name, (16,), GGMLType.F32, lambda name=name: chunks(name)) for name in "abc"]
    layout = plan_layout([LLAMA], entries)
    assert order == []
    done: list[int] = []
    sink = io.BytesIO()
    write_gguf(sink, [LLAMA], entries, advance=done.append)
    assert order == [f"{name}{part}" for name, part in itertools.product("abc", range(4))]
    assert sum(done) == layout.size_bytes == len(sink.getvalue())


@pytest.mark.parametrize(("given_bytes", "words"), [(15, "only 15"), (17, "more"), (0, "only 0"), (160, "more")])
def test_a_tensor_that_gives_other_than_its_bytes_is_refused(given_bytes: int, words: str) -> None:
    bad = TensorEntry("w", (4,), GGMLType.F32, lambda: [bytes(given_bytes)])
    with pytest.raises(GGUFError, match=f"'w' needs 16 bytes, and {words}"):
        written([LLAMA], [bad])


def test_a_scalar_and_an_empty_tensor_are_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(written([LLAMA], [entry("scalar", ()), entry("empty", (0, 32)), entry("after", (2,))]))
    with open_gguf(path) as file:
        assert [(t.shape, t.nbytes) for t in file.tensors.values()] == [((), 4), ((0, 32), 0), ((2,), 8)]


@pytest.mark.parametrize(
    ("fields", "entries", "words"),
    [
        ([], [], "general.architecture"),
        ([uint32("general.architecture", 1)], [], "STRING is required"),
        ([LLAMA, LLAMA], [], "'general.architecture' appears twice"),
        ([LLAMA], [entry("a", (1,)), entry("a", (2,))], "'a' appears twice"),
        ([LLAMA], [entry("a" * 64, (1,))], "64 bytes; 1 to 63"),
        ([LLAMA], [entry("", (1,))], "0 bytes; 1 to 63"),
        ([LLAMA], [entry("a", (1, 1, 1, 1, 1))], "5 dimensions"),
        ([LLAMA], [TensorEntry("a", (-1, 4), GGMLType.F32, list)], "cannot have the shape"),
        ([LLAMA], [TensorEntry("a", (1 << 62, 4), GGMLType.F32, list)], "cannot have the shape"),
        ([LLAMA, uint32("x", -1)], [], "'x' does not fit its type UINT32: -1"),
        ([LLAMA, uint32("x", 1 << 32)], [], "4294967296"),
        ([LLAMA, float32("x", 1e300)], [], "FLOAT32"),
        ([LLAMA, string("x", 3)], [], "'x' does not fit its type STRING: 3"),
        ([LLAMA, array("x", ValueType.INT8, [1, 200])], [], "ARRAY of INT8"),
        ([LLAMA, array("x", ValueType.STRING, ["a", 2])], [], "ARRAY of STRING"),
        ([LLAMA, array("x", ValueType.ARRAY, [[1]])], [], "item type"),
        ([LLAMA, uint32("", 1)], [], "cannot be a metadata key"),
        ([LLAMA, uint32("k" * 65536, 1)], [], "65536 bytes"),
        ([LLAMA, uint32("\udcff", 1)], [], "not valid Unicode"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_byte_is(
    fields: list[Field], entries: list[TensorEntry], words: str
) -> None:
    sink = io.BytesIO()
    with pytest.raises(GGUFError, match=words):
        write_gguf(sink, fields, entries)
    assert sink.getvalue() == b""


@pytest.mark.parametrize("alignment", [0, -32, 48, 1 << 21])
def test_an_alignment_that_is_not_a_power_of_two_is_refused(alignment: int) -> None:
    with pytest.raises(GGUFError, match=f"the alignment {alignment}"):
        written([LLAMA], [], alignment)


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="100 elements cannot be stored as Q8_0"):
        plan_layout([LLAMA], [TensorEntry("w", (2, 100), GGMLType.Q8_0, list)])


def test_copying_a_tensor_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(forge.small_file())
    with open_gguf(path) as file, pytest.raises(NotFoundError, match="'nope'"):
        copy_entry(file, "nope")

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import gguf_forge as forge
import numpy as np
import pytest

from ollama_forge.errors import GGUFError, NotFoundError, UnsafeFileError
from ollama_forge.gguf.reader import GGUFArray, open_gguf
from ollama_forge.gguf.types import GGMLType, ValueType


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_a_sound_file_is_read_as_it_was_made(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "small.gguf", forge.small_file(version))
    with open_gguf(path) as file:
        assert (file.version, file.alignment, file.architecture) == (version, 32, "llama")
        assert (file.path, file.paths, file.size_bytes) == (path, (path,), path.stat().st_size)
        assert file.metadata["general.name"] == "Tiny Ⅳ"
        assert file.arch_value("block_count") == 1
        assert file.arch_value("absent") is None
        assert file.arch_value("absent", 7) == 7
        scalars = {key: value for key, value in file.metadata.items() if key.startswith("x.") and key != "x.empty"}
        assert scalars == {
            "x.uint8": 200,
            "x.int8": -1,
            "x.uint16": 65535,
            "x.int16": -2,
            "x.int32": -3,
            "x.float32": 0.5,
            "x.bool": True,
            "x.uint64": 1 << 63,
            "x.int64": -1 << 62,
            "x.float64": 0.1,
        }
        assert "x.uint8" in file.metadata
        assert "nothing" not in file.metadata


def test_arrays_are_decoded_when_asked_for(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path / "small.gguf", forge.small_file())) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, GGUFArray)
        assert (len(tokens), tokens.item_type) == (5, ValueType.STRING)
        assert tokens[2] == "Ġé"
        assert tokens[-1] == "a" * 300
        assert tokens[1:3] == ["", "Ġé"]
        assert tokens.tolist() == list(tokens) == ["<s>", "", "Ġé", "\udcff\udcfe", "a" * 300]
        with pytest.raises(IndexError):
            tokens[5]
        scores = file.metadata["tokenizer.ggml.scores"]
        assert scores.tolist() == [0.0, -1.0, -2.0, -3.0, -4.0]
        assert (scores[3], scores[-5], scores[::2]) == (-3.0, 0.0, [0.0, -2.0, -4.0])
        assert file.metadata["tokenizer.ggml.flags"].tolist() == [True, False, True]
        assert file.metadata["x.empty"].tolist() == []


def test_text_that_is_not_utf_8_gives_its_bytes_back(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path / "small.gguf", forge.small_file())) as file:
        token = file.metadata["tokenizer.ggml.tokens"][3]
    assert token.encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_tensors_have_row_major_shapes_and_their_bytes(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path / "small.gguf", forge.small_file())) as file:
        assert [(t.name, t.shape, t.type, t.nbytes, t.n_elements) for t in file.tensors.values()] == [
            ("token_embd.weight", (2, 64), GGMLType.Q8_0, 136, 128),
            ("blk.0.attn_q.weight", (2, 3), GGMLType.F32, 24, 6),
            ("rope.factors", (5,), GGMLType.F16, 10, 5),
            ("blk.0.ffn_up_exps.weight", (2, 2, 256), GGMLType.Q4_K, 576, 1024),
        ]
        assert bytes(file.read("token_embd.weight")) == bytes(range(136))
        assert b"".join(file.iter_chunks("token_embd.weight", 50)) == bytes(range(136))
        file.release("token_embd.weight")
        assert bytes(file.read("token_embd.weight")) == bytes(range(136))
        assert np.frombuffer(file.read("blk.0.attn_q.weight"), np.float32).tolist() == [0, 1, 2, 3, 4, 5]
        assert file.read("rope.factors").readonly
        with pytest.raises(NotFoundError, match=r"nope\.weight"):
            file.read("nope.weight")


def test_an_array_in_use_outlives_the_file(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path / "small.gguf", forge.small_file())) as file:
        tokens, rows = file.metadata["tokenizer.ggml.tokens"], file.read("rope.factors")
    assert tokens[0] == "<s>"
    assert rows.nbytes == 10


def test_a_file_of_gguf_py_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_custom_alignment(64)
    writer.add_block_count(3)
    writer.add_rope_freq_base(1e6)
    writer.add_token_list([f"token {i}" * (i % 9) for i in range(5000)])
    writer.add_token_scores([float(-i) for i in range(5000)])
    writer.add_chat_template("{{ messages }}")
    weights = np.arange(4 * 3 * 32, dtype=np.float32).reshape(4, 3, 32)
    writer.add_tensor("a", weights)
    writer.add_tensor("b", weights[0].astype(np.float16))
    writer.add_tensor("c", gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        assert (file.architecture, file.alignment, file.arch_value("block_count")) == ("qwen2", 64, 3)
        assert file.arch_value("rope.freq_base") == 1e6
        assert file.metadata["tokenizer.ggml.tokens"].tolist() == [f"token {i}" * (i % 9) for i in range(5000)]
        assert file.metadata["tokenizer.ggml.tokens"][4321] == "token 4321"
        assert file.metadata["tokenizer.ggml.scores"][4999] == -4999.0
        assert [(t.shape, t.type.name, t.offset % 64) for t in file.tensors.values()] == [
            ((4, 3, 32), "F32", 0),
            ((3, 32), "F16", 0),
            ((4, 3, 32), "Q8_0", 0),
        ]
        assert bytes(file.read("a")) == weights.tobytes()
        assert bytes(file.read("c")) == gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_long_runs_of_strings_end_where_they_end(tmp_path: Path) -> None:
    # Lengths around every border of the fast path: 63 and 64, a run of 100, empty strings, strings with zeros in them.
    words = [bytes([65 + i % 26]) * (i % 70) for i in range(2345)] + [b"", b"\0" * 40, b"x" * 70000] + [b"ab"] * 2100
    fields = [forge.ARCHITECTURE, forge.strings_field("words", words), forge.uint32_field("after", 42)]
    with open_gguf(write(tmp_path / "words.gguf", forge.gguf(fields))) as file:
        assert file.metadata["after"] == 42
        assert [word.encode() for word in file.metadata["words"]] == words


def test_a_file_without_tensors_or_final_padding_is_sound(tmp_path: Path) -> None:
    content = forge.gguf([forge.ARCHITECTURE], alignment=1)
    with open_gguf(write(tmp_path / "vocab.gguf", content)) as file:
        assert dict(file.tensors) == {}
    content = forge.gguf([forge.ARCHITECTURE], [forge.tensor("t", (3,), forge.F32, 0)], bytes(12))
    with open_gguf(write(tmp_path / "unpadded.gguf", content)) as file:
        assert len(file.read("t")) == 12


def test_an_imatrix_needs_no_architecture(tmp_path: Path) -> None:
    content = forge.gguf([forge.string_field("general.type", "imatrix")])
    with open_gguf(write(tmp_path / "imatrix.gguf", content)) as file:
        assert file.architecture == ""


def test_opening_a_file_does_not_import_numpy(tmp_path: Path) -> None:
    path = write(tmp_path / "small.gguf", forge.small_file())
    code = (
        "import sys, pathlib; from ollama_forge.gguf.reader import open_gguf; import ollama_forge.gguf.writer;"
        "print(open_gguf(pathlib.Path(sys.argv[1])).metadata['tokenizer.ggml.scores'].tolist(), 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0.0, -1.0, -2.0, -3.0, -4.0] False"


SAFETENSORS_HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes"),
        (b"GGUF", "has 4 bytes"),
        (struct.pack("<Q", len(SAFETENSORS_HEADER)) + SAFETENSORS_HEADER + bytes(4), "safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404 Not Found", "web page"),
        (b"\n  <html><body>Please log in, then try again", "web page"),
        (b"tjgg" + bytes(60), "GGJT"),
        (b"lmgg" + bytes(60), "before GGUF"),
        (gzip.compress(bytes(range(256))), "gunzip"),
        (bytes(4096), "zeros"),
        (b"hello, this is a plain text file", "begins with b'hello, t'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 77, 0, 0) + bytes(40), "version 77"),
    ],
)
def test_what_is_not_gguf_is_told_apart(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(GGUFError) as caught:
        open_gguf(write(tmp_path / "model.gguf", content))
    assert words in str(caught.value)
    assert caught.value.next


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00" + bytes(60)])
def test_a_pickle_is_refused_as_unsafe(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UnsafeFileError, match="safetensors or GGUF"):
        open_gguf(write(tmp_path / "model.gguf", content))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"absent\.gguf"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(GGUFError, match="is a folder"):
        open_gguf(tmp_path)


def shard(number: int, count: int, total: int, names: list[str], *, first_fields: bool = True) -> bytes:
    fields = [forge.ARCHITECTURE, forge.string_field("general.name", "set")] if number == 0 and first_fields else []
    fields += [
        forge.field("split.no", forge.UINT16, struct.pack("<H", number)),
        forge.field("split.count", forge.UINT16, struct.pack("<H", count)),
        forge.field("split.tensors.count", forge.INT32, struct.pack("<i", total)),
    ]
    tensors = [forge.tensor(name, (4,), forge.F32, 32 * i) for i, name in enumerate(names)]
    content = b"".join(struct.pack("<4f", *[float(ord(name))] * 4) + bytes(16) for name in names)
    return forge.gguf(fields, tensors, content)


def write_set(folder: Path, shards: list[bytes], count: int = 3) -> list[Path]:
    return [write(folder / f"m-{i:05}-of-{count:05}.gguf", content) for i, content in enumerate(shards, 1)]


@pytest.mark.parametrize("named", [0, 1, 2])
def test_a_set_of_shards_opens_as_one_file_whichever_is_named(tmp_path: Path, named: int) -> None:
    paths = write_set(tmp_path, [shard(0, 3, 3, ["a"]), shard(1, 3, 3, ["b"]), shard(2, 3, 3, ["c"])])
    with open_gguf(paths[named]) as file:
        assert file.paths == tuple(paths)
        assert file.metadata["general.name"] == "set"
        assert list(file.tensors) == ["a", "b", "c"]
        assert [t.shard for t in file.tensors.values()] == [0, 1, 2]
        assert [np.frombuffer(file.read(name), np.float32)[0] for name in "abc"] == [97, 98, 99]
        assert file.size_bytes == sum(path.stat().st_size for path in paths)


SOUND = [shard(0, 3, 3, ["a"]), shard(1, 3, 3, ["b"]), shard(2, 3, 3, ["c"])]


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ([SOUND[0], SOUND[2], SOUND[1]], r"'split.no' is 2, and the set needs 1"),
        ([SOUND[0], SOUND[1], shard(2, 4, 3, ["c"])], r"'split.count' is 4, and the set needs 3"),
        ([SOUND[0], SOUND[1], shard(2, 3, 3, ["c", "d"])], r"'split.tensors.count' is 3, and the 3 shards hold 4"),
        ([SOUND[0], SOUND[1], shard(2, 3, 3, ["a"])], r"'a' is in two shards"),
        ([shard(0, 2, 3, ["a"]), *SOUND[1:]], r"counts 3 shards in its name and 2"),
        ([shard(1, 3, 3, ["a"]), *SOUND[1:]], r"'general.architecture' is missing"),
        ([SOUND[0], forge.gguf(), SOUND[2]], r"'split.no' is None"),
        ([SOUND[0], SOUND[1][:-40], SOUND[2]], r"00002-of-00003.*ends at byte"),
    ],
)
def test_shards_that_disagree_are_refused(tmp_path: Path, shards: list[bytes], words: str) -> None:
    paths = write_set(tmp_path, shards)
    with pytest.raises(GGUFError, match=words):
        open_gguf(paths[0])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_set(tmp_path, SOUND)
    paths[1].unlink()
    with pytest.raises(NotFoundError, match="m-00002-of-00003"):
        open_gguf(paths[0])
    paths[0].unlink()
    with pytest.raises(NotFoundError, match="m-00001-of-00003"):
        open_gguf(paths[2])


def test_a_renamed_first_shard_says_what_it_must_be_called(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"-00001-of-00003\.gguf"):
        open_gguf(write(tmp_path / "sha256-abc", SOUND[0]))

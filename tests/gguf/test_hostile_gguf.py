"""Files that lie: each is refused with the offset and the numbers that disagree, or opens and stays readable."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf_forge as forge
import pytest

from ollama_forge.errors import GGUFError
from ollama_forge.gguf.reader import open_gguf

HUGE = (1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
A = forge.ARCHITECTURE


def one_tensor(
    ne: tuple[int, ...] = (4,),
    type: int = forge.F32,
    offset: int = 0,
    name: str | bytes = "w",
    content: bytes = bytes(64),
    fields: tuple[bytes, ...] = (A,),
) -> bytes:
    return forge.gguf(fields, [forge.tensor(name, ne, type, offset)], content)


def aligned(alignment: bytes, value_type: int = forge.UINT32) -> bytes:
    return one_tensor(fields=(A, forge.field("general.alignment", value_type, alignment)))


def forged() -> dict[str, tuple[bytes, str]]:
    """Name -> (file, what the error must say)."""
    u32, u64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
    f32 = forge.tensor("w", (4,), forge.F32, 0)
    cases = {
        "field count": (
            forge.gguf([A], n_fields=9, alignment=1),
            r"at byte 16, 9 metadata keys need at least 126 .* 45",
        ),
        "tensor count": (forge.gguf([A], n_tensors=9, alignment=1), r"at byte 8, 9 tensors need at least 225 bytes"),
        "key length": (forge.gguf([u64(99) + b"abc" + bytes(40)]), r"a metadata key needs 99 bytes and"),
        "empty key": (forge.gguf([A, forge.uint32_field("", 1)]), r"a metadata key has 0 bytes"),
        "key too long": (forge.gguf([A, forge.uint32_field("k" * 65536, 1)]), r"has 65536 bytes; 1 to 65535"),
        "key not text": (forge.gguf([A, forge.field(b"a\xff", 0, b"\0")]), r"b'a\\xff' is not valid UTF-8"),
        "key twice": (forge.gguf([A, A]), r"'general.architecture' appears twice"),
        "value type": (forge.gguf([A, forge.field("x", 13, bytes(16))]), r"'x' has value type 13; 0 to 12"),
        "item type": (forge.gguf([A, forge.array_field("x", 99, 1, bytes(16))]), r"value type 99"),
        "nested array": (forge.gguf([A, forge.array_field("x", 9, 1, bytes(16))]), r"an array of arrays"),
        "string value": (forge.gguf([A, forge.field("x", 8, u64(77) + b"abc")], alignment=1), r"needs 77 bytes and 3"),
        "cut scalar": (forge.gguf([A, forge.field("xy", 10, b"abc")], alignment=1), r"value of 'xy' needs 8 .* and 3"),
        "string in array": (
            forge.gguf([A, forge.array_field("x", 8, 2, forge.text("ab") + u64(50) + b"cd")], alignment=1),
            r"a string of 'x' needs 50 bytes and 2 are left",
        ),
        "strings that end early": (
            forge.gguf([A, forge.array_field("x", 8, 2, forge.text("a" * 20))], alignment=1),
            r"a string of 'x' needs 8 bytes and 0 are left",
        ),
        "last of many strings": (
            forge.gguf([A, forge.array_field("x", 8, 5000, forge.text("ab") * 4999 + u64(1 << 56))], alignment=1),
            rf"a string of 'x' needs {1 << 56} bytes and 0 are left",
        ),
        "many strings, one with high bits": (
            forge.gguf(
                [A, forge.array_field("x", 8, 5000, forge.text("ab") * 3000 + u64(2 + (1 << 33)) + b"ab" * 9999)]
            ),
            rf"a string of 'x' needs {2 + (1 << 33)} bytes and",
        ),
        "no architecture": (forge.gguf([forge.uint32_field("x", 1)]), r"'general.architecture' is missing"),
        "architecture is a number": (
            forge.gguf([forge.uint32_field("general.architecture", 1)]),
            r"STRING is required",
        ),
        "architecture is a list": (
            forge.gguf([forge.strings_field("general.architecture", ["a"])]),
            r"ARRAY, and STRING",
        ),
        "alignment 0": (aligned(u32(0)), r"general.alignment is 0"),
        "alignment 48": (aligned(u32(48)), r"general.alignment is 48; it must be a power of two up to 1048576"),
        "alignment 2**31": (aligned(u32(1 << 31)), r"general.alignment is 2147483648"),
        "alignment is 64 bits": (aligned(u64(32), forge.UINT64), r"general.alignment is UINT64"),
        "alignment is text": (aligned(forge.text("32"), forge.STRING), r"general.alignment is STRING"),
        "name length": (forge.gguf([A], [u64(1 << 50) + bytes(40)]), r"a tensor name has 1125899906842624 bytes"),
        "empty name": (one_tensor(name=""), r"a tensor name has 0 bytes"),
        "name not text": (one_tensor(name=b"\xc3\x28"), r"a tensor name b'\\xc3\(' is not valid UTF-8"),
        "name twice": (
            forge.gguf([A], [f32, forge.tensor("w", (4,), 0, 32)], bytes(64)),
            r"the tensor name 'w' appears",
        ),
        "five dimensions": (one_tensor((1, 1, 1, 1, 1)), r"has 5 dimensions; at most 4"),
        "many dimensions": (
            forge.gguf([A], [forge.text("w") + u32((1 << 32) - 1) + bytes(64)]),
            r"'w' has 4294967295 dimensions",
        ),
        "product overflows": (one_tensor((1 << 32, 1 << 32)), rf"has {1 << 64} elements, and 2\*\*63"),
        "bytes overflow": (one_tensor(((1 << 62),), forge.F32), r"2\*\*63 is the limit"),
        "rows and blocks": (one_tensor((33,), forge.Q8_0), r"rows of 33 elements, not a multiple of Q8_0's 32"),
        "type 4": (one_tensor(type=4), r"type 4; llama.cpp has removed it"),
        "type 31": (one_tensor(type=31), r"type 31; llama.cpp has removed it"),
        "type 99": (one_tensor(type=99), r"type 99; the last one known is 42"),
        "offset not aligned": (one_tensor(offset=8), r"has offset 8, not a multiple of the alignment 32"),
        "past the end": (one_tensor((32,)), r"'w' ends at byte 256 and the file ends at byte 192"),
        "far past the end": (one_tensor(offset=1 << 63), rf"ends at byte {(1 << 63) + 144} and"),
        "no data": (one_tensor(content=b""), r"ends at byte 144 and the file ends at byte 128"),
        "overlap": (
            forge.gguf([A], [forge.tensor("a", (16,), 0, 0), forge.tensor("b", (8,), 0, 32)], bytes(128)),
            r"'b' starts at 192, inside 'a', which ends at 224",
        ),
        "same place": (
            forge.gguf([A], [forge.tensor("a", (8,), 0, 32), forge.tensor("b", (8,), 0, 32)], bytes(128)),
            r"starts at \d+, inside 'a'",
        ),
        "split without a set": (
            forge.gguf([A, forge.field("split.count", forge.UINT16, struct.pack("<H", 3))]),
            r"does not end in -00001-of-00003",
        ),
        "split of billions": (
            forge.gguf([A, forge.uint32_field("split.count", (1 << 32) - 1)]),
            r"first of 4294967295",
        ),
    }
    for number in HUGE:
        cases |= {
            f"{number} fields": (forge.gguf([A], n_fields=number), rf"at byte 16, {number} metadata keys need"),
            f"{number} tensors": (forge.gguf([A], n_tensors=number), rf"at byte 8, {number} tensors need"),
            f"{number} bytes of key": (forge.gguf([u64(number) + bytes(60)]), rf"metadata key has {number} bytes"),
            f"{number} bytes of text": (
                forge.gguf([A, forge.field("x", 8, u64(number))]),
                rf"'x' needs {number} bytes",
            ),
            f"{number} bytes of name": (forge.gguf([A], [u64(number) + bytes(60)]), rf"name has {number} bytes"),
            f"a dimension of {number}": (one_tensor((number,)), r"ends at byte|2\*\*63 is the limit"),
            f"two dimensions of {number}": (one_tensor((number, number)), r"2\*\*63 is the limit|ends at byte"),
            f"offset of {number}": (one_tensor(offset=number & ~31), r"ends at byte \d+ and the file ends at byte 192"),
        }
        for item_type in range(13):
            words = "array of arrays" if item_type == 9 else rf"'x' has {number} items of at least \d+ bytes and"
            cases[f"{number} items of type {item_type}"] = (
                forge.gguf([A, forge.array_field("x", item_type, number, bytes(24))]),
                words,
            )
            # 43 bytes: the header and one array key, all that gguf-py's reader needs to loop for ever.
            tiny = forge.gguf([forge.array_field("xyz", item_type, number, b"")], alignment=1)[:43]
            cases[f"43 bytes, {number} items of type {item_type}"] = (tiny, r"at byte \d+, .* needs? .* left|arrays")
    return cases


FORGED = forged()


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_refused_with_the_numbers_that_disagree(tmp_path: Path, name: str) -> None:
    content, words = FORGED[name]
    path = tmp_path / "forged.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=words) as caught:
        open_gguf(path)
    assert str(path) in caught.value.what
    assert caught.value.next


def mutated() -> dict[str, bytes]:
    """Sound files with a bit turned, a number replaced, a piece cut out or the end missing; always the same ones."""
    sound = forge.small_file()
    header_bytes = sound.index(b"blk.0.ffn_up_exps.weight") + 60
    chance = random.Random(20240607)
    cases = {f"cut at {size}": sound[:size] for size in range(0, len(sound), 13)}
    for bit in sorted(chance.sample(range(8 * header_bytes), 600)):
        changed = bytearray(sound)
        changed[bit // 8] ^= 1 << bit % 8
        cases[f"bit {bit}"] = bytes(changed)
    for number in range(300):
        at, size = chance.randrange(4, header_bytes), chance.choice((1, 4, 8))
        value = chance.choice((b"\xff" * size, bytes(size), chance.randbytes(size), b"\x80".rjust(size, b"\0")))
        cases[f"number {number} at {at}"] = sound[:at] + value + sound[at + size :]
    for number in range(150):
        start, stop = sorted(chance.sample(range(4, header_bytes), 2))
        cases[f"hole {number}"] = sound[:start] + sound[stop:]
        cases[f"echo {number}"] = sound[:stop] + sound[start:]
    for number in range(100):
        cases[f"noise {number}"] = sound[:24] + chance.randbytes(chance.randrange(400))
    return cases


READ_ALL = """
import faulthandler, json, sys
from pathlib import Path
from ollama_forge.errors import FormatError, NotFoundError
from ollama_forge.gguf.reader import GGUFArray, open_gguf

folder, growth_bytes, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if sys.platform.startswith("linux"):
    import resource
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + growth_bytes, now + growth_bytes))
outcomes = {}
for path in sorted(folder.iterdir()):
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        with open_gguf(path) as file:
            for key, value in file.metadata.items():
                if isinstance(value, GGUFArray):
                    value = value.tolist() == [value[i] for i in range(len(value))] or repr(value)
                assert file.fields[key].raw is not None
            read = sum(len(bytes(file.read(name))) for name in file.tensors)
            outcomes[path.name] = f"opened {len(file.fields)} {len(file.tensors)} {read}"
    except (FormatError, NotFoundError) as exc:
        outcomes[path.name] = f"refused: {exc.what}"
faulthandler.cancel_dump_traceback_later()
print(json.dumps(outcomes))
"""


def test_hundreds_of_hostile_files_neither_crash_hang_nor_fill_the_memory(tmp_path: Path) -> None:
    cases = {**{name: content for name, (content, _) in FORGED.items()}, **mutated()}
    names = {}
    for number, (name, content) in enumerate(cases.items()):
        (tmp_path / f"{number:05}.gguf").write_bytes(content)
        names[f"{number:05}.gguf"] = name
    command = [sys.executable, "-c", READ_ALL, str(tmp_path), str(200 << 20), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = {names[file]: outcome for file, outcome in json.loads(done.stdout).items()}
    assert len(outcomes) == len(cases) > 1000
    refused = {name for name, outcome in outcomes.items() if outcome.startswith("refused")}
    assert refused >= set(FORGED)
    assert len(refused) > 800
    # A turned bit in a key's name or in a value is a different file, not a lie: it must open.
    assert len(refused) < len(cases)


def test_long_lists_of_hostile_strings_are_refused_at_the_first_lie(tmp_path: Path) -> None:
    # Headers of three megabytes that pretend to hold as many strings as fit, with the lie at the very end.
    strings = forge.text("") * 400_000 + struct.pack("<Q", 1 << 62)
    path = tmp_path / "long.gguf"
    path.write_bytes(forge.gguf([A, forge.array_field("x", forge.STRING, 400_001, strings)], alignment=1))
    with pytest.raises(GGUFError, match=rf"needs {1 << 62} bytes and 0 are left"):
        open_gguf(path)


def test_thousands_of_tensors_in_one_place_are_refused(tmp_path: Path) -> None:
    tensors = [forge.tensor(f"t{i}", (8,), forge.F32, 0) for i in range(5000)]
    path = tmp_path / "same.gguf"
    path.write_bytes(forge.gguf([A], tensors, bytes(32)))
    with pytest.raises(GGUFError, match=r"'t1' starts at \d+, inside 't0'"):
        open_gguf(path)


def test_more_tensors_or_keys_than_any_model_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(forge.gguf([A], n_tensors=131073, content=bytes(25 * 131073)))
    with pytest.raises(GGUFError, match=r"131073 tensors are more than the 131072"):
        open_gguf(path)
    path.write_bytes(forge.gguf([A], n_fields=65537, content=bytes(14 * 65537)))
    with pytest.raises(GGUFError, match=r"65537 metadata keys are more than the 65536"):
        open_gguf(path)

"""What a newcomer gets wrong: each mistake ends before any work, names the thing, and says what to type next."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash

from ollama_forge.engine_sampling import loading_from_parameters
from ollama_forge.errors import UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, plan_layout, string, uint32, write_gguf


def assert_refused(*argv: object, code: int, says: str) -> None:
    ended = forge(*argv)
    assert ended.code == code, ended.out + ended.err
    assert says in ended.err
    assert "next:" in ended.err
    assert "Traceback" not in ended.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, copy)
    return copy


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    forge_json("convert", DEMO_MODEL, "-o", path)
    return path


def test_unknown_types_and_parameters_are_refused_before_the_source_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    assert_refused("quantize", "nothing.gguf", "-o", out, "--type", "Q4_K_X", code=2, says="Q4_K_X")
    assert_refused("convert", "nothing", "-o", out, "--quant", "Q9", code=2, says="Q9")
    assert_refused("import", "nothing", "--name", "x", "--param", "temprature=1", code=2, says="temprature")
    assert_refused("quantize", "x", "-o", out, "--type", "Q8_0", "--tensor-type", "ffn", code=2, says="REGEX=TYPE")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a b", "x:", "a/b/c/d/e", "x" * 90, "x\0y", "x:cloud"])
def test_a_name_that_ollama_refuses_is_refused_before_any_path_is_made(tmp_path: Path, name: str) -> None:
    store = tmp_path / "store"
    assert_refused("import", DEMO_MODEL, "--name", name, "--store", store, code=1, says=repr(name)[1:6])
    assert not store.exists()


def test_convert_looks_at_the_name_before_it_writes_and_plans_the_landing(tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "o.gguf"
    words = ("convert", DEMO_MODEL, "-o", out, "--store", store)
    for more in ((), ("--dry-run",)):
        assert_refused(*words, "--name", "../bad", *more, code=1, says="../bad")
        smaller = ("quantize", DEMO_MODEL, "-o", out, "--type", "Q8_0", "--store", store)
        assert_refused(*smaller, "--name", "../bad", *more, code=1, says="../bad")
    assert list(tmp_path.iterdir()) == []
    told = forge_json(*words, "--name", "good", "--dry-run")
    assert (told["name"], told["dry_run"], told["converted"]["dry_run"]) == ("good:latest", True, True)
    assert told["written_bytes"] == told["converted"]["bytes"]
    seen = forge(*words, "--name", "good", "--dry-run").out
    assert "good:latest would be made" in seen and "o.gguf" in seen and list(tmp_path.iterdir()) == []
    forge_json(*words, "--name", "good", "--no-check")
    out.unlink()
    assert_refused(*words, "--name", "good", "--dry-run", code=1, says="good:latest")


def test_a_folder_without_config_names_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert_refused("import", folder, "--name", "x", "--store", tmp_path / "s", code=1, says="config.json")
    assert not (tmp_path / "s").exists()


def test_a_truncated_shard_names_the_file(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused("convert", folder, "-o", tmp_path / "o.gguf", code=1, says="model.safetensors")
    assert not (tmp_path / "o.gguf").exists()


def test_a_shard_outside_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused("convert", folder, "-o", tmp_path / "o.gguf", code=1, says="../x.safetensors")


def test_an_unknown_family_lists_the_known_ones_and_the_other_converter(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"], config["model_type"] = ["NovelForCausalLM"], "novel"
    (folder / "config.json").write_text(json.dumps(config))
    ended = forge("convert", folder, "-o", tmp_path / "o.gguf")
    assert ended.code == 1
    assert all(word in ended.err for word in ("NovelForCausalLM", "gemma3", "--converter llama.cpp"))


def test_an_f16_file_called_q4_is_known_by_its_bytes(gguf: Path, tmp_path: Path) -> None:
    liar = tmp_path / "model-Q4_K_M.gguf"
    gguf.rename(liar)
    assert forge_json("show", liar)["quantization"] == "BF16"
    assert forge_json("quantize", liar, "-o", tmp_path / "o.gguf", "--type", "Q4_K_M")["types"]["Q4_K"] > 0


def test_what_is_not_gguf_says_what_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"<!DOCTYPE html><html>")
    assert_refused("convert", "--gguf", path, "--name", "x", "--store", tmp_path / "s", code=1, says="m.gguf")
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"PK\x03\x04")
    assert_refused("show", pickle, code=1, says="pickle")


def test_a_model_is_not_replaced_without_force(gguf: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    forge_json("convert", "--gguf", gguf, "--name", "m", "--no-check", "--store", store)
    before = tree_hash(store)
    for argv in (
        ("import", DEMO_MODEL, "--name", "m", "--quant", "Q8_0", "--store", store),
        ("create-from-base", "--base", "m", "--name", "M", "--system", "x", "--store", store),
    ):
        assert forge(*argv).code in (1, 2)
        assert tree_hash(store) == before
    assert_refused("convert", DEMO_MODEL, "-o", gguf, code=1, says="--force")
    forced = forge_json("convert", "--gguf", gguf, "--name", "m", "--system", "x", "--force", "--store", store)
    assert forced["replaced"]


def test_a_source_is_never_its_own_target(gguf: Path) -> None:
    before = gguf.read_bytes()
    assert_refused("quantize", gguf, "-o", gguf, "--type", "Q8_0", "--force", code=1, says="source itself")
    assert gguf.read_bytes() == before


def test_quantizing_twice_must_be_asked_for(gguf: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    forge_json("quantize", gguf, "-o", small, "--type", "Q8_0")
    assert_refused("quantize", small, "-o", tmp_path / "o.gguf", "--type", "Q4_K_M", code=2, says="--allow-requantize")
    forge_json("quantize", small, "-o", tmp_path / "o.gguf", "--type", "Q4_K_M", "--allow-requantize")


def test_a_store_that_cannot_be_written_is_named(gguf: Path) -> None:
    ended = forge("convert", "--gguf", gguf, "--name", "x", "--store", "/proc/ollama-models")
    assert ended.code == 1 and "/proc/ollama-models" in ended.err and "next:" in ended.err


def test_a_disk_without_room_says_how_much_is_missing_before_the_work_starts(tmp_path: Path) -> None:
    """A sparse file of 4 TB stands for a model that no disk here can hold a second time."""
    shape = (1 << 20, 1 << 21)
    entry = TensorEntry("token_embd.weight", shape, GGMLType.F16, lambda: [])
    fields = [string("general.architecture", "llama"), uint32("general.file_type", 1), uint32("llama.block_count", 1)]
    layout = plan_layout(fields, [entry])
    source = tmp_path / "huge.gguf"
    one = TensorEntry("token_embd.weight", shape, GGMLType.F16, lambda: iter(()))
    with source.open("wb") as stream:
        stream.write(layout.header)
        stream.truncate(layout.size_bytes)
    assert one.nbytes == 4 << 40
    ended = forge("quantize", source, "-o", tmp_path / "o.gguf", "--type", "Q8_0")
    assert ended.code == 1 and "bytes are missing" in ended.err
    assert not (tmp_path / "o.gguf").exists()


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_behind(gguf: Path, tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from ollama_forge.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "out" / "o.gguf"
    argv = [sys.executable, "-c", script, "quantize", str(gguf), "-o", str(target), "--type", "Q8_0"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "o.gguf" in ended.stderr and "next:" in ended.stderr
    assert list(target.parent.iterdir()) == []


def test_a_folder_and_an_empty_file_in_place_of_a_recipe_are_called_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert_refused("build", tmp_path, code=1, says="is a folder, not a recipe")
    assert_refused("auto", tmp_path / "empty.txt", code=2, says="It is empty")


def test_a_go_template_that_is_not_closed_is_refused(gguf: Path, tmp_path: Path) -> None:
    words = ("convert", "--gguf", gguf, "--name", "m", "--store", tmp_path / "store", "--template")
    assert_refused(*words, "{{ .System }} {{ .Prompt", code=2, says="'{{ .Prompt'")
    assert not (tmp_path / "store").exists()


def test_a_name_that_no_model_has_is_not_an_empty_store(gguf: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert forge("list", "x", "--store", store).out.startswith("No models here yet")
    forge_json("convert", "--gguf", gguf, "--name", "mine", "--store", store, "--no-check")
    assert "begins with 'x'" in forge("list", "x", "--store", store).out


def test_a_mistyped_command_is_told_its_neighbours() -> None:
    ended = forge("quantise")
    assert ended.code == 2 and "quantize" in ended.err


def test_atomic_output_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_output(target, overwrite=True) as sink:
        sink.write(b"new")
        _ = 1 / 0
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with atomic_output(target, overwrite=True) as sink:
        write_gguf(sink, [string("general.architecture", "x")], [])
    assert target.read_bytes()[:4] == b"GGUF"


FINETUNE = ("finetune", "--data", "absent.jsonl", "--base", "absent.gguf", "--name", "r")
DISTILL = ("downsize", "distill", "--teacher", "a.gguf", "--student", "b.gguf", "--data", "d.jsonl", "--name", "r")
PIPELINE = ("downsize", "pipeline", "absent.gguf", "--name", "r", "--target", "60%", "--data", "absent.jsonl")
APPLY = ("abliterate", "apply", "absent.gguf", "--directions", str(DEMO_MODEL / "config.json"), "--name", "r")
OPTIMIZE = ("abliterate", "optimize", "--model", "absent.gguf", "--harmful", "a.txt", "--harmless", "b.txt")
MERGE = ("merge", "absent.gguf", "./adapter", "--name", "r")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((FINETUNE, option) for option in ("--lr", "--epochs", "--warmup", "--dropout", "--alpha", "--val-split")),
        *((DISTILL, option) for option in ("--lr", "--epochs", "--beta", "--kd-temperature", "--ce-weight")),
        *((DISTILL, option) for option in ("--on-policy", "--weight-decay")),
        *((PIPELINE, option) for option in ("--lr", "--epochs")),
        *((APPLY, option) for option in ("--strength", "--layer", "--kernel-center-frac", "--kernel-width-frac")),
        (OPTIMIZE, "--timeout"),
        (MERGE, "--weight"),
    ],
)
def test_a_number_that_is_none_or_infinite_is_a_wrong_use_before_anything_is_opened(
    command: tuple[str, ...], option: str
) -> None:
    assert_refused(*command, option, "nan", code=2, says=f"Invalid value for '{option}': nan is not a finite number")
    assert_refused(*command, option, "inf", code=2, says=f"Invalid value for '{option}': inf is not")


def test_a_config_file_cannot_say_such_a_number_either(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("lr: .nan\n")
    assert_refused(*FINETUNE, "--config", config, code=2, says="Invalid value for '--lr': nan is not a finite number")


def test_an_alpha_that_would_turn_the_adapter_round_is_refused() -> None:
    assert_refused(*FINETUNE, "--alpha", "-5", code=2, says="'--alpha': -5.0 is not in the range x>0")


def test_the_example_of_an_error_is_one_that_can_be_typed(gguf: Path, tmp_path: Path) -> None:
    base = ("create-from-base", "--base", gguf, "--name", "n", "--store", tmp_path / "store")
    assert_refused(*base, "--message", "foo", code=2, says="Example: --message user='Hello!'")
    assert_refused(*base, "--param", "foo", code=2, says="Example: --param temperature=0.7")
    width = ("downsize", "prune", gguf, "--dry-run", "--width")
    for amount in ("-1", "200%"):
        assert_refused(*width, f"ffn={amount}", code=2, says="Example: --width ffn=70%")


def test_a_context_in_which_nothing_can_run_is_refused(gguf: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for tokens in (0, 1, -5):
        ended = forge("run", gguf, "Hi", "--param", f"num_ctx={tokens}")
        assert ended.code != 0 and "too small" in ended.err and "num_ctx=4096" in ended.err
        assert "SIGABRT" not in ended.err
        words = ("create-from-base", "--base", gguf, "--name", "n", "--store", store)
        assert forge(*words, "--param", f"num_ctx={tokens}").code != 0
        assert forge(*words, "--num-ctx", tokens).code != 0
    assert not store.exists()


def test_a_stored_context_of_one_token_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="too small a context"):
        loading_from_parameters({"num_ctx": 1})
    assert loading_from_parameters({"num_ctx": 0}) == {}  # Ollama's "choose for me"


def test_notes_about_training_data_are_sentences(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"instruction": "Say hi.", "output": "Hi."}) + "\n")
    words = ("finetune", "--base", folder, "--data", data, "--name", "n", "--workdir", tmp_path / "work")
    ended = forge(*words, "--store", tmp_path / "s", "--dry-run")
    assert "! 1 example: the model has no chat template" in ended.err, ended.err


def test_a_path_of_several_parts_needs_no_dot_before_it(
    gguf: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    deep = Path("one/two/three/four/five")
    shutil.copytree(folder, tmp_path / deep)
    shutil.copy(gguf, tmp_path / deep.parent / "weights")
    assert forge("show", deep.parent / "weights", "--store", "s").code == 0
    quantize = ("quantize", deep.parent / "weights", "-o", "o.gguf", "--type", "Q8_0")
    assert forge("plan", *quantize).code == 0 and forge(*quantize).code == 0
    assert_refused("quantize", deep, "-o", "p.gguf", "--type", "Q8_0", code=2, says="is a Hugging Face folder")
    assert_refused("show", "one/two/three/four/six", "--store", "s", code=1, says="six")


def test_a_folder_that_is_no_model_says_where_one_is(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    empty = tmp_path / "my folder"
    empty.mkdir()
    assert_refused("convert", empty, "-o", out, code=1, says="ollama-forge list")
    snapshot = empty / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    for command in (("convert", empty), ("quantize", empty, "--type", "Q8_0")):
        assert_refused(*command, "-o", out, code=1, says=f"'{snapshot}'")
    (empty / "adapter_config.json").write_text("{}")
    assert_refused(
        "quantize", empty, "-o", out, "--type", "Q8_0", code=2, says=f"retrain --base BASE --adapter '{empty}'"
    )
    assert not out.exists()

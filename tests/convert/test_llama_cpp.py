"""Families without rows of ours go through llama.cpp's own converter, which learns and reaches nothing else."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import forge
from tiny_models import build_model, change_config
from tiny_tokenizers import build_tokenizer

from ollama_forge.convert.llama_cpp import child_environment, convert_with_llama_cpp, network_barrier
from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import FormatError, NotFoundError, UnsafeFileError, UnsupportedError
from ollama_forge.gguf.reader import open_gguf


@pytest.fixture
def unknown_family(tmp_path: Path) -> Path:
    """A first-generation Gemma, for which we have no rows, that brings code of its own."""
    import torch
    import transformers

    folder = tmp_path / "gemma-one"
    folder.mkdir()
    n_tokens = build_tokenizer("gemma-spm", folder)
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=n_tokens,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
    )
    transformers.GemmaForCausalLM(config).save_pretrained(folder)
    marker = tmp_path / "the code ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    change_config(folder, {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    return folder


def test_our_refusal_names_the_other_way(unknown_family: Path) -> None:
    with pytest.raises(UnsupportedError, match="GemmaForCausalLM") as caught:
        plan_conversion(unknown_family)
    assert "qwen3_moe" in caught.value.why and "gpt2" in caught.value.why
    assert "--converter llama.cpp" in caught.value.next and "llama-cpp-converter" in caught.value.next


def test_the_other_way_converts_and_runs_no_code_of_the_model(unknown_family: Path, tmp_path: Path) -> None:
    options = ConvertOptions(outtype="f16", name="--a name that looks like an option")
    with convert_with_llama_cpp(unknown_family, tmp_path, options) as path, open_gguf(path) as file:
        assert file.architecture == "gemma"
        assert file.metadata["general.name"] == options.name
        assert len(file.tensors) == 11
    assert not path.exists()
    assert not (tmp_path / "the code ran").exists()


def test_the_command_takes_a_relative_output(
    unknown_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for output in ("rel.gguf", "below/rel.gguf"):
        ended = forge("convert", unknown_family.name, "-o", output, "--converter", "llama.cpp")
        assert ended.code == 0, ended.err
        with open_gguf(tmp_path / output) as file:
            assert file.architecture == "gemma"


def test_its_last_words_reach_the_user(tmp_path: Path) -> None:
    build_model("llama2", tmp_path / "model")
    change_config(tmp_path / "model", {"architectures": ["NobodyKnowsThisModel"]})
    refused = pytest.raises(FormatError, match="could not convert")
    with refused as caught, convert_with_llama_cpp(tmp_path / "model", tmp_path, ConvertOptions()):
        pass
    assert "NobodyKnowsThisModel" in caught.value.why


def test_pickles_and_links_are_not_given_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    refused = pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin")
    with refused, convert_with_llama_cpp(folder, tmp_path, ConvertOptions()):
        pass
    (tmp_path / "secret").write_text("secret")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    refused = pytest.raises(UnsafeFileError, match="leads out")
    with refused, convert_with_llama_cpp(folder, tmp_path, ConvertOptions()):
        pass


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError), convert_with_llama_cpp(tmp_path / "absent", tmp_path, ConvertOptions()):
        pass


def test_the_child_knows_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "PYTHONPATH", "HF_HOME", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    environment = child_environment(tmp_path)
    assert "secret" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["PATH"] == os.environ["PATH"]


def test_where_the_system_allows_it_the_child_has_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempt = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        child = subprocess.run([*network_barrier(), sys.executable, "-c", attempt], capture_output=True, check=False)
    assert (child.returncode == 0) == (network_barrier() == ())

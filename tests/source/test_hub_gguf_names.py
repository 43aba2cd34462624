"""Which GGUF file of a repo is taken: names are parsed, memory decides, nothing is taken by mistake."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ollama_forge.errors import ForgeError, HubError, NotFoundError, UsageError
from ollama_forge.source.gguf_names import (
    is_imatrix,
    is_projector,
    list_choices,
    list_projectors,
    parse_quant,
    pick_gguf,
)
from ollama_forge.source.hub_files import HubFile, RepoListing, RepoName, parse_repo

GB = 1_000_000_000
PLAIN = {"m-Q8_0.gguf": 8 * GB, "m-Q6_K.gguf": 6 * GB, "m-Q4_K_M.gguf": 5 * GB, "m-Q2_K.gguf": 3 * GB}


def listing(files: Mapping[str, int]) -> RepoListing:
    return RepoListing(
        "org/m-GGUF", "main", "0" * 40, tuple(HubFile(path, size, sha256="1" * 64) for path, size in files.items())
    )


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("llama-3.2-1b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("model.Q4_K_S.gguf", "Q4_K_S"),
        ("model_iq3_xxs.gguf", "IQ3_XXS"),
        ("gemma-3-4b-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("UD-IQ1_S/DeepSeek-UD-IQ1_S-00001-of-00004.gguf", "UD-IQ1_S"),
        ("BF16/model-00001-of-00002.gguf", "BF16"),
        ("Q4_0_4_4/model.gguf", "Q4_0_4_4"),
        ("model-Q4_0_8_8.gguf", "Q4_0_8_8"),
        ("model-fp16.gguf", "F16"),
        ("model-Q4_K_M-imat.gguf", "Q4_K_M"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Q8Bert-base.gguf", ""),
        ("XQ4_K_M.gguf", ""),
        ("model.gguf", ""),
        ("bf16-trained-model-Q5_K_M.gguf", "Q5_K_M"),
        ("model-Q6_K_L.gguf", "Q6_K_L"),
        ("qwen-TQ1_0.gguf", "TQ1_0"),
    ],
)
def test_a_quantization_is_a_word_of_the_name(path: str, quant: str) -> None:
    assert parse_quant(path) == quant


def test_projectors_and_importance_matrices_are_told_from_models() -> None:
    assert is_projector("mmproj-model-f16.gguf") and is_projector("model.mmproj-Q8_0.gguf")
    assert is_projector("sub/mmproj-BF16.gguf") and not is_projector("summproject-Q4_0.gguf")
    assert is_imatrix("imatrix_unsloth.gguf") and is_imatrix("Model.imatrix.gguf") and is_imatrix("imatrix-f16.gguf")
    assert not is_imatrix("Model-imatrix-Q4_K_M.gguf")
    files = listing(
        {"mmproj-F32.gguf": 1, "mmproj-f16.gguf": 1, "imatrix.gguf": 1, "m-Q4_0.gguf": 9, "m.safetensors": 1}
    )
    assert [choice.path for choice in list_choices(files.files)] == ["m-Q4_0.gguf"]
    assert [file.path for file in list_projectors(files.files)] == ["mmproj-f16.gguf", "mmproj-F32.gguf"]
    assert pick_gguf(files).projector == HubFile("mmproj-f16.gguf", 1, sha256="1" * 64)


def test_parts_are_one_model_in_order_and_a_missing_part_is_named() -> None:
    parts = {f"Q4_K_M/m-Q4_K_M-0000{n}-of-00003.gguf": n for n in (3, 1, 2)}
    (choice,) = list_choices(listing(parts).files)
    assert [file.size_bytes for file in choice.files] == [1, 2, 3] and choice.size_bytes == 6
    del parts["Q4_K_M/m-Q4_K_M-00002-of-00003.gguf"]
    with pytest.raises(HubError, match="Part 2 of 3"):
        list_choices(listing(parts).files)


def test_the_quantization_that_was_asked_for_is_taken_exactly() -> None:
    files = listing({**PLAIN, "m-UD-Q4_K_XL.gguf": 5 * GB, "m-Q4_K_S.gguf": 4 * GB})
    assert pick_gguf(files, quant="q4_k_m").choice.path == "m-Q4_K_M.gguf"
    assert pick_gguf(files, quant="UD-Q4_K_XL").choice.path == "m-UD-Q4_K_XL.gguf"
    for absent in ("Q4_K", "Q4", "Q5_K_M", "Q4_K_XL", "F16"):
        with pytest.raises(NotFoundError) as caught:
            pick_gguf(files, quant=absent)
        assert f"has no {absent}" in caught.value.what
        assert caught.value.why == "It has Q8_0, Q6_K, UD-Q4_K_XL, Q4_K_M, Q4_K_S, Q2_K."


def test_a_file_can_be_named() -> None:
    files = listing({**PLAIN, "mmproj-f16.gguf": 1, "a/x-00001-of-00002.gguf": 1, "a/x-00002-of-00002.gguf": 1})
    assert pick_gguf(files, file="m-Q6_K.gguf").choice.quant == "Q6_K"
    assert len(pick_gguf(files, file="a/x-00001-of-00002.gguf").choice.files) == 2
    assert len(pick_gguf(files, file="x-00002-of-00002.gguf").choice.files) == 2
    with pytest.raises(UsageError, match="is a projector"):
        pick_gguf(files, file="mmproj-f16.gguf")
    with pytest.raises(NotFoundError) as caught:
        pick_gguf(files, file="m-Q6_k.gguf")
    assert "m-Q6_K.gguf" in caught.value.why


@pytest.mark.parametrize(
    ("memory", "path", "words"),
    [
        (64 * GB, "m-Q8_0.gguf", "the best of 4 that fits"),
        (13 * GB, "m-Q6_K.gguf", "runs in about 7.2 GB, and 70% of this machine's memory is 9.1 GB"),
        (9 * GB, "m-Q4_K_M.gguf", "the best of 4"),
        (4 * GB, "m-Q2_K.gguf", "even this one"),
        (None, "m-Q4_K_M.gguf", "does not say how much memory"),
    ],
)
def test_without_a_wish_the_best_that_fits_is_taken_and_says_why(memory: int | None, path: str, words: str) -> None:
    pick = pick_gguf(listing(PLAIN), memory_bytes=memory)
    assert pick.choice.path == path and words in pick.why


def test_sixteen_bits_are_taken_only_when_there_is_nothing_else() -> None:
    assert pick_gguf(listing({"m-BF16.gguf": GB, **PLAIN}), memory_bytes=99 * GB).choice.quant == "Q8_0"
    assert pick_gguf(listing({"m-BF16.gguf": GB}), memory_bytes=99 * GB).choice.quant == "BF16"
    assert pick_gguf(listing({"m-F32.gguf": 2 * GB, "m-F16.gguf": GB}), memory_bytes=99 * GB).choice.quant == "F16"


def test_two_models_in_one_repo_are_not_guessed_between() -> None:
    files = listing({"small-Q4_0.gguf": GB, "large-Q4_0.gguf": 3 * GB})
    for quant in ("", "Q4_0"):
        with pytest.raises(UsageError, match="2 models that this could mean"):
            pick_gguf(files, quant=quant, memory_bytes=99 * GB)


def test_a_repo_without_gguf_points_to_import() -> None:
    with pytest.raises(NotFoundError, match="no GGUF model") as caught:
        pick_gguf(listing({"config.json": 1, "model.safetensors": 1}))
    assert "ollama-forge import" in caught.value.next


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("org/repo", RepoName("org/repo")),
        ("hf:org/repo@v1:sub/m.gguf", RepoName("org/repo", "v1", "sub/m.gguf")),
        ("hf:org/repo:Q4_K_M", RepoName("org/repo", quant="Q4_K_M")),
        ("hf.co/org/repo:Q4_K_M", RepoName("org/repo", quant="Q4_K_M")),
        ("https://huggingface.co/org/repo", RepoName("org/repo")),
        ("https://huggingface.co/org/repo/tree/v2", RepoName("org/repo", "v2")),
        ("https://huggingface.co/org/repo/blob/main/m-Q4_0.gguf", RepoName("org/repo", "", "m-Q4_0.gguf")),
        ("https://huggingface.co/org/repo/resolve/v2/a/m.gguf?download=true", RepoName("org/repo", "v2", "a/m.gguf")),
    ],
)
def test_a_repo_can_be_typed_in_every_usual_way(text: str, named: RepoName) -> None:
    assert parse_repo(text) == named


@pytest.mark.parametrize(
    "text", ["", "repo", "a/b/c", "https://evil.com/org/repo", "https://x@huggingface.co/o/r", "../a", "org/re po"]
)
def test_what_is_no_repo_is_refused(text: str) -> None:
    with pytest.raises(ForgeError):
        parse_repo(text)

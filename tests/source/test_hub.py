"""Repos listed, downloaded, resumed and verified against a Hub on the loopback."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_fixtures import hub as hub
from loopback_hub import Cut, LoopbackHub, Status, Tampered, WholeInstead, sha256

from ollama_forge.errors import DiskError, ForgeError, HubError, UnsafeFileError
from ollama_forge.source import hub_download
from ollama_forge.source.hub import fetch_files, list_repo, search_repos
from ollama_forge.source.hub_files import choose_model_files

WEIGHTS = bytes(range(256)) * 4000
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "empty.json": b""}


def fetch(repo: str = "org/model", revision: str = "") -> Path:
    listing = list_repo(repo, revision)
    return fetch_files(listing, listing.files).folder


def incomplete(tmp_path: Path) -> Path:
    return tmp_path / "hf/hub/models--org--model/blobs" / f"{sha256(WEIGHTS)}.incomplete"


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_files_are_pinned_to_a_commit_and_lie_where_other_tools_find_them(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.add("org/model", FILES, tags=("license:mit", "base_model:finetune:org/base"))
    listing = list_repo("org/model")
    assert (listing.commit, listing.licence, listing.base_models) == (commit, "mit", ("org/base",))
    done = fetch_files(listing, listing.files)
    assert done.downloaded_bytes == sum(map(len, FILES.values()))
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == FILES
    found = huggingface_hub.try_to_load_from_cache("org/model", "config.json", cache_dir=tmp_path / "hf/hub")
    assert found == str(done.folder / "config.json")
    assert huggingface_hub.snapshot_download("org/model", cache_dir=tmp_path / "hf/hub", local_files_only=True)


def test_what_is_here_is_not_downloaded_again(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    fetch()
    before = hub.count("GET /cdn/")
    listing = list_repo("org/model")
    assert fetch_files(listing, listing.files).downloaded_bytes == 0 and hub.count("GET /cdn/") == before


def test_a_new_commit_shares_the_bytes_that_did_not_change(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    old = fetch()
    hub.add("org/model", {**FILES, "config.json": b'{"a": 2}'})
    new = fetch()
    assert hub.count("GET /cdn/") == 1 and new != old
    assert (old / "config.json").read_bytes() == FILES["config.json"]
    assert (new / "config.json").read_bytes() == b'{"a": 2}'


def test_a_branch_and_a_tag_are_other_revisions(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    commit = hub.add("org/model", {"config.json": b"v1"}, ref="v1.0")
    assert fetch(revision="v1.0").name == commit
    assert fetch(revision=commit).joinpath("config.json").read_bytes() == b"v1"


@pytest.mark.parametrize("cuts", [(0,), (1,), (999_999,), (500_000, 7, 100_000), (len(WEIGHTS) - 1,)])
def test_a_cut_download_goes_on_where_it_ended(hub: LoopbackHub, cuts: tuple[int, ...]) -> None:
    hub.add("org/model", FILES)
    hub.fail("GET /cdn/", *(Cut(after_bytes) for after_bytes in cuts))
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    asked = [request.range for request in hub.requests if request.route.startswith("GET /cdn/")]
    expected = [sum(cuts[:n]) for n in range(1, len(cuts) + 1)]
    assert asked == ["", *(f"bytes={offset}-" if offset else "" for offset in expected)]


def test_a_run_that_gave_up_leaves_what_came_to_the_next_one(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "_WAITS_SECONDS", (0.0,))
    hub.add("org/model", FILES)
    hub.fail("GET /cdn/", Cut(300_000), Cut(0), Cut(0), Cut(0))
    with pytest.raises(HubError, match="out of reach") as caught:
        fetch()
    assert "kept" in caught.value.next
    assert incomplete(tmp_path).read_bytes() == WEIGHTS[:300_000]
    hub._failures.clear()
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.requests[-1].range == "bytes=300000-" or any(r.range == "bytes=300000-" for r in hub.requests)
    assert not incomplete(tmp_path).exists()


@pytest.mark.parametrize("left", [b"rubbish" * 1000, WEIGHTS + b"more", WEIGHTS[:-1] + b"\0", WEIGHTS])
def test_what_an_earlier_run_left_is_believed_only_when_the_hash_agrees(
    hub: LoopbackHub, tmp_path: Path, left: bytes
) -> None:
    hub.add("org/model", FILES)
    incomplete(tmp_path).parent.mkdir(parents=True)
    incomplete(tmp_path).write_bytes(left)
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.count("GET /cdn/") == (0 if left == WEIGHTS else 1 if len(left) >= len(WEIGHTS) else 2)


def test_a_server_that_ignores_ranges_costs_a_second_download_only(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    hub.fail("GET /cdn/", Cut(1000), WholeInstead())
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_range_that_the_server_refuses_begins_anew(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    hub.fail("GET /cdn/", Cut(1000), Status(416))
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_bytes_that_are_not_the_listed_ones_are_thrown_away(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    hub.fail("GET /cdn/", Tampered())
    with pytest.raises(HubError, match="not what the Hub listed"):
        fetch()
    assert not list((tmp_path / "hf/hub/models--org--model/blobs").glob(f"{sha256(WEIGHTS)}*"))
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_small_files_are_verified_too(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    hub.fail("GET /api/resolve-cache/", Tampered())
    with pytest.raises(HubError, match="not what the Hub listed"):
        fetch()


def test_a_file_that_changed_under_a_pinned_commit_is_refused(hub: LoopbackHub) -> None:
    commit = hub.add("org/model", FILES)
    fetch(revision=commit)
    hub.change("org/model", "model.safetensors", WEIGHTS[::-1])
    with pytest.raises(HubError, match="is not the file that it was"):
        fetch(revision=commit)


def test_a_file_that_changes_between_the_list_and_the_download_is_refused(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    listing = list_repo("org/model")
    hub.change("org/model", "model.safetensors", WEIGHTS[::-1])
    with pytest.raises(HubError, match="changed while it was read"):
        fetch_files(listing, listing.files)


def test_a_damaged_file_of_the_cache_is_downloaded_anew(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    path = fetch() / "model.safetensors"
    path.write_bytes(b"\1" + WEIGHTS[1:])
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_without_a_network_the_cache_answers(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/model", FILES)
    fetch()
    go_offline(monkeypatch)
    before = len(hub.requests)
    listing = list_repo("org/model")
    assert listing.is_offline and listing.commit == commit
    assert (fetch_files(listing, listing.files).folder / "model.safetensors").read_bytes() == WEIGHTS
    assert fetch(revision=commit[:10]).name == commit and len(hub.requests) == before
    with pytest.raises(HubError, match="not in this machine's cache"):
        list_repo("org/other")


def test_a_hub_that_does_not_answer_is_named_so(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="out of reach"):
        list_repo("org/model")


def test_an_offline_cache_that_is_damaged_is_named(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", FILES)
    (fetch() / "model.safetensors").write_bytes(b"\1" + WEIGHTS[1:])
    go_offline(monkeypatch)
    with pytest.raises(HubError, match="damaged in the cache"):
        fetch()


@pytest.mark.parametrize(
    ("token", "facts", "words"),
    [
        (None, {"is_gated": True}, ("is gated", "No token is set", "Accept its terms")),
        ("hf_stranger", {"is_gated": True}, ("is gated", "not on its list", "Ask for access")),
        (None, {"is_private": True}, ("no repo 'org/model' that you may see", "no token is set")),
        ("hf_stranger", {"is_private": True}, ("no repo 'org/model' that you may see", "does not open it")),
        ("hf_wrong", {}, ("does not accept your token", "hf auth login")),
    ],
)
def test_each_refusal_has_words_of_its_own_and_never_shows_the_token(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, token: str | None, facts: dict[str, bool], words: tuple[str, ...]
) -> None:
    hub.add("org/model", FILES, **facts)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        fetch()
    assert all(word in str(caught.value) for word in words) and "hf_" not in str(caught.value)


def test_a_good_token_opens_a_gated_repo_and_goes_to_the_hub_only(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", FILES, is_gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    to_cdn = [request for request in hub.requests if " /cdn/" in request.route]
    assert to_cdn and not any(request.is_authorized for request in to_cdn)
    assert any(request.is_authorized for request in hub.requests)


def test_a_missing_repo_and_a_missing_revision_are_told_apart(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    with pytest.raises(HubError, match="no repo 'org/nothing'"):
        list_repo("org/nothing")
    with pytest.raises(HubError, match="'org/model' has no revision 'v9'"):
        list_repo("org/model", "v9")


def test_a_busy_hub_is_asked_again_and_then_named(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollama_forge.source.hub._WAITS_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(hub_download, "_WAITS_SECONDS", (0.0, 0.0))
    hub.add("org/model", FILES)
    hub.fail("GET /api/models", Status(429), Status(500))
    hub.fail("HEAD /org/model", Status(503), Status(429))
    hub.fail("GET /cdn/", Status(500))
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    hub.fail("GET /api/models", *[Status(429)] * 3)
    with pytest.raises(HubError, match="asked too often"):
        list_repo("org/other")
    hub.fail("GET /api/models", *[Status(500)] * 3)
    with pytest.raises(HubError, match="failure of its own"):
        list_repo("org/other")


def test_a_full_disk_is_said_before_anything_is_downloaded(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", FILES)
    monkeypatch.setattr("ollama_forge.files.free_bytes", lambda _folder: 1000)
    with pytest.raises(DiskError, match="No room for the files of org/model"):
        fetch()
    assert hub.count("GET /cdn/") == 0


@pytest.mark.parametrize("path", ["../evil.json", "a/../../b.json", "/etc/passwd", "a\\b.json", "a//b", "c:evil"])
def test_a_name_that_leads_out_of_the_folder_is_refused(hub: LoopbackHub, path: str) -> None:
    hub.add("org/model", {path: b"{}"})
    with pytest.raises(UnsafeFileError, match="lists a file named"):
        list_repo("org/model")


def test_an_answer_without_hashes_or_commit_is_refused(hub: LoopbackHub) -> None:
    hub.add("org/model", FILES)
    hub.repos["org/model"].refs["main"] = "not-a-commit"
    hub.repos["org/model"].commits["not-a-commit"] = {}
    with pytest.raises(HubError, match="makes no sense"):
        list_repo("org/model")


def test_a_search_finds_by_words_and_tags(hub: LoopbackHub) -> None:
    hub.add("org/tiny-lora", {"adapter_config.json": b"{}"}, tags=("peft", "base_model:adapter:org/base"), downloads=5)
    hub.add("org/tiny-model", FILES, downloads=9)
    assert [found.repo for found in search_repos("tiny")] == ["org/tiny-model", "org/tiny-lora"]
    (found,) = search_repos("tiny", tags=["peft"])
    assert (found.repo, found.downloads, found.files) == ("org/tiny-lora", 5, ("adapter_config.json",))


def test_only_what_a_model_needs_is_chosen(hub: LoopbackHub) -> None:
    hub.add(
        "org/model",
        {
            **dict.fromkeys(
                ("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE"), b"x"
            ),
            **dict.fromkeys(("model.safetensors", "pytorch_model.bin", "modeling_x.py", "tokenization_x.py"), b"y"),
            **dict.fromkeys(("consolidated.safetensors", "model.fp16.safetensors", "x/m.onnx", "m.gguf"), b"z"),
            **dict.fromkeys(("README.md", "pytorch_model.bin.index.json", "a/params.json", "merges.txt"), b"w"),
            "LICENSE": b"MIT",
        },
    )
    assert {file.path for file in choose_model_files(list_repo("org/model"))} == {
        *("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "merges.txt"),
        *("model.safetensors", "README.md"),
    }


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"", "pytorch_model.bin": b""}, "pickles only"),
        ({"adapter_config.json": b"", "adapter_model.safetensors": b""}, "fetch-adapter"),
        ({"m-Q4_0.gguf": b""}, "ollama-forge fetch org/model"),
        ({"model.safetensors": b""}, "no config.json"),
        ({"config.json": b"", "model-00001-of-00002.safetensors": b""}, "1 of 2 files"),
        ({"README.md": b""}, "no weights"),
    ],
)
def test_a_repo_that_is_no_whole_model_says_what_it_is(hub: LoopbackHub, files: dict[str, bytes], words: str) -> None:
    hub.add("org/model", files)
    with pytest.raises(ForgeError) as caught:
        choose_model_files(list_repo("org/model"))
    assert words in str(caught.value)

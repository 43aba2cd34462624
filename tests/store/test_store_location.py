"""Where the store is: Ollama's own rules, word for word."""

import sys
from pathlib import Path

import pytest

from ollama_forge.errors import StoreError
from ollama_forge.store.catalog import open_store
from ollama_forge.store.location import find_store_locations


def make_store(folder: Path) -> Path:
    (folder / "manifests").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("text", ["{}", "  {} ", '"{}"', "'{}'", " \"'{}'\" "])
def test_spaces_and_quotes_around_ollama_models_do_not_count(text: str, tmp_path: Path) -> None:
    chosen = open_store(environ={"OLLAMA_MODELS": text.format(tmp_path / "m"), "HOME": "/home/x"}, system_root=tmp_path)
    assert chosen.models_dir == tmp_path / "m"


def test_a_tilde_is_a_name_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = open_store(environ={"OLLAMA_MODELS": "~/models", "HOME": "/home/x"}, system_root=tmp_path)
    assert chosen.models_dir == tmp_path / "~" / "models"


@pytest.mark.parametrize("text", ["", "  ", '""'])
def test_an_empty_setting_means_home(text: str, tmp_path: Path) -> None:
    environ = {"OLLAMA_MODELS": text, "HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    assert open_store(environ=environ, system_root=tmp_path).models_dir == tmp_path / "home" / ".ollama" / "models"


def home_environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("at_home", [False, True])
def test_the_services_store_is_used_when_only_it_is_there(tmp_path: Path, at_home: bool) -> None:
    service = make_store(tmp_path / "usr/share/ollama/.ollama/models")
    home = tmp_path / "home/.ollama/models"
    if at_home:
        make_store(home)
    chosen = open_store(environ=home_environ(tmp_path), system_root=tmp_path).models_dir
    assert chosen == (home if at_home or not sys.platform.startswith("linux") else service)


def test_the_services_settings_are_read_where_a_shell_cannot_see_them(tmp_path: Path) -> None:
    make_store(tmp_path / "usr/share/ollama/.ollama/models")
    big = make_store(tmp_path / "big disk")
    overrides = tmp_path / "etc/systemd/system/ollama.service.d"
    overrides.mkdir(parents=True)
    (overrides / "override.conf").write_text(
        f'[Service]\nEnvironment="OLLAMA_HOST=0.0.0.0"\nEnvironment="OLLAMA_MODELS={big}"\n'
    )
    locations = find_store_locations(home_environ(tmp_path), tmp_path)
    if sys.platform.startswith("linux"):
        assert locations[0].models_dir == big
        assert "settings" in locations[0].reason


def test_a_service_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    assert open_store(environ=home_environ(tmp_path), system_root=tmp_path).models_dir.is_relative_to(tmp_path / "home")


def test_no_home_and_no_setting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(StoreError) as refused:
        open_store(environ={}, system_root=tmp_path)
    assert "OLLAMA_MODELS" in refused.value.next

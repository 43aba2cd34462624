"""What is installed: the manifests of a store as values, and the questions that are asked of them.

In: a folder. Out: `Store`, `InstalledModel`. It only reads. Tolerant as the server is, and a little more: one bad
manifest or dangling link is reported beside the good ones and hides none of them.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ollama_forge.errors import ManifestError, NameInvalidError, NotFoundError, StoreError
from ollama_forge.store.blobs import BlobStore
from ollama_forge.store.digest import Digest, find_mentions
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.location import find_store_locations
from ollama_forge.store.manifest import MANIFEST_LIMIT_BYTES, ConfigBlob, parse_config, parse_manifest
from ollama_forge.store.name import MANIFEST_DEPTH, ModelName, name_from_parts, parse_name
from ollama_forge.store.stage import store_error

_BEING_WRITTEN_SECONDS = 5.0
_RETRY_SECONDS = 0.05
_MANIFEST_TREES = ("manifests", "manifests-v2")


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it should be.

    Attributes:
        kind: a stable word: `manifest`, `name`, `dangling`, `config`, and those of `verify`.
    """

    kind: str
    path: Path
    what: str


@dataclass(frozen=True)
class Catalog:
    """All that a store holds, newest first, and what of it could not be understood."""

    models: tuple[InstalledModel, ...]
    problems: tuple[Problem, ...]


class Store:
    """One models folder. It may be missing: then it is an empty store.

    Args:
        models_dir: the folder that holds `blobs/` and `manifests/`.
    """

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir
        self.manifests_dir = models_dir / "manifests"
        self.blobs = BlobStore(models_dir)

    def manifest_path(self, name: ModelName) -> Path:
        """Where the manifest of exactly this spelling lies, or would."""
        return self.manifests_dir.joinpath(*name.manifest_parts)

    def models(self) -> list[InstalledModel]:
        """Every model that can be understood, newest first.

        Raises:
            DiskError: the store may not be read.
        """
        return list(self.read_catalog().models)

    def read_catalog(self) -> Catalog:
        """Every model, and every file among the manifests that is none.

        Raises:
            DiskError: the store may not be read.
        """
        models, problems = [], []
        for path in self._manifest_files():
            found = self._read_entry(path)
            if isinstance(found, InstalledModel):
                models.append(found)
            elif found:
                problems.append(found)
        models.sort(key=lambda model: (-model.modified_at.timestamp(), model.name))
        return Catalog(tuple(models), tuple(problems))

    def names(self) -> list[ModelName]:
        """The names that are taken, sorted, whether their manifests are good or not."""
        names = []
        for path in self._manifest_files():
            with contextlib.suppress(NameInvalidError):
                names.append(name_from_parts(path.relative_to(self.manifests_dir).parts))
        return sorted(names)

    def canonical(self, name: ModelName | str) -> ModelName:
        """The spelling that Ollama would use: each part as an existing name has it, when only the case differs.

        Of several existing spellings the exact one wins, then the first in the alphabet (Ollama takes any).

        Raises:
            NameInvalidError: not a name.
        """
        wanted = parse_name(name) if isinstance(name, str) else name
        names = self.names()
        same = [existing for existing in names if existing.folded == wanted.folded]
        if same:
            return wanted if wanted in same else same[0]
        parts = []
        for index, part in enumerate(wanted.manifest_parts):
            spellings = [n.manifest_parts[index] for n in names if n.folded[index] == wanted.folded[index]]
            parts.append(part if part in spellings or not spellings else spellings[0])
        return ModelName(*parts)

    def find(self, name: ModelName | str) -> InstalledModel:
        """The model of that name; case does not matter, as in Ollama.

        Raises:
            NameInvalidError: not a name.
            NotFoundError: no such model here, with names that are alike.
            ManifestError: it is there and its manifest is broken.
        """
        wanted = self.canonical(name)
        path = self.manifest_path(wanted)
        try:
            return self._open(path, wanted)
        except FileNotFoundError:
            raise self.not_found(wanted) from None
        except ManifestError as exc:
            raise ManifestError(
                f"{wanted.display!r} cannot be read from {str(path)!r}: {exc.what}",
                why=exc.why,
                next=f"Get the model again (ollama pull {wanted.display}), or see what is broken: "
                f"ollama-forge verify --store {self.models_dir}",
            ) from exc
        except OSError as exc:
            raise store_error(exc, path, "read the manifest") from exc

    def read_manifest_bytes(self, name: ModelName) -> bytes | None:
        """The manifest's file as it is; None when there is none of exactly this spelling.

        Raises:
            DiskError: it may not be read.
        """
        path = self.manifest_path(name)
        try:
            return _read_bounded(path)[0]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise store_error(exc, path, "read the manifest") from exc

    def mentions(self) -> dict[Digest, tuple[Path, ...]]:
        """Every digest that any file of the manifests names, and the files that name it. For whoever deletes blobs.

        Raises:
            DiskError: a file may not be read, so that nothing can be said about what is unused.
        """
        found: dict[Digest, list[Path]] = {}
        for tree in _MANIFEST_TREES:
            for path in _files_below(self.models_dir / tree):
                try:
                    raw, _ = _read_bounded(path)
                except FileNotFoundError:
                    continue
                except OSError as exc:
                    raise store_error(exc, path, "read the manifest") from exc
                for digest in find_mentions(raw):
                    found.setdefault(digest, []).append(path)
        return {digest: tuple(paths) for digest, paths in found.items()}

    def references(self, digest: Digest) -> tuple[ModelName, ...]:
        """The models that use a blob."""
        names = []
        for path in self.mentions().get(digest, ()):
            with contextlib.suppress(NameInvalidError, ValueError):
                names.append(name_from_parts(path.relative_to(self.manifests_dir).parts))
        return tuple(sorted(names))

    def orphans(self) -> list[Path]:
        """Blobs that no manifest names."""
        used = {digest.blob_filename for digest in self.mentions()}
        return [path for path in self.blob_files() if path.name.startswith("sha256-") and path.name not in used]

    def blob_files(self) -> list[Path]:
        """Everything in `blobs/` that is not a folder, sorted.

        Raises:
            DiskError: it may not be read.
        """
        try:
            return sorted(path for path in self.blobs.blobs_dir.iterdir() if not path.is_dir())
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise store_error(exc, self.blobs.blobs_dir, "list") from exc

    def _manifest_files(self) -> Iterator[Path]:
        folders = [self.manifests_dir]
        for _ in range(MANIFEST_DEPTH):
            entries: list[Path] = []
            for folder in folders:
                try:
                    with os.scandir(folder) as found:
                        entries += [Path(entry.path) for entry in found]
                except (FileNotFoundError, NotADirectoryError):
                    continue  # gone since its parent was listed: another process pruned it
                except OSError as exc:
                    raise store_error(exc, folder, "list the models in") from exc
            folders = sorted(entries)
        yield from folders

    def _read_entry(self, path: Path) -> InstalledModel | Problem | None:
        parts = path.relative_to(self.manifests_dir).parts
        try:
            if stat.S_ISDIR(path.stat().st_mode):
                return None
            return self._open(path, name_from_parts(parts))
        except FileNotFoundError:
            if path.is_symlink():
                return Problem("dangling", path, "a link to a manifest that is not there; Ollama's listing fails on it")
            return None
        except NameInvalidError as exc:
            return Problem("name", path, f"not a model's name ({exc.why}); Ollama stops its clean-up because of it")
        except ManifestError as exc:
            return Problem("manifest", path, exc.what)
        except StoreError as exc:
            return Problem("config", path, exc.what)
        except OSError as exc:
            return Problem("manifest", path, os.strerror(exc.errno or 0))

    def _open(self, path: Path, name: ModelName) -> InstalledModel:
        try:
            return self._open_once(path, name)
        except ManifestError:
            # Ollama truncates and rewrites a manifest in place, so a young broken one may be whole in a moment.
            if time.time() - path.stat().st_mtime > _BEING_WRITTEN_SECONDS:
                raise
            time.sleep(_RETRY_SECONDS)
            return self._open_once(path, name)

    def _open_once(self, path: Path, name: ModelName) -> InstalledModel:
        raw, status = _read_bounded(path)
        manifest = parse_manifest(raw)
        config = ConfigBlob()
        if manifest.config:
            try:
                config = parse_config(self.blobs.read_bytes(manifest.config.digest))
            except ManifestError as exc:
                blob = self.blobs.path(manifest.config.digest)
                raise ManifestError(f"{exc.what} ({str(blob)!r})", why=exc.why, next=exc.next) from exc
        return InstalledModel(
            name=name,
            digest=hashlib.sha256(raw).hexdigest(),
            manifest=manifest,
            config=config,
            modified_at=datetime.fromtimestamp(status.st_mtime, timezone.utc),
            blobs=self.blobs,
        )

    def not_found(self, name: ModelName) -> NotFoundError:
        # without the tag that most have: `:latest` alone would make every short name look like every other
        names = {existing.display.removesuffix(":latest"): existing.display for existing in self.names()}
        near = difflib.get_close_matches(name.display.removesuffix(":latest"), names, 3)
        alike = [names[word] for word in near]
        if not names:
            why = f"There are no models in the store {str(self.models_dir)!r}."
        else:
            why = f"Like it: {', '.join(alike)}." if alike else f"The store is {str(self.models_dir)!r}."
        return NotFoundError(
            f"There is no model {name.display!r}",
            why=why,
            next=f"Run `ollama-forge list` to see what is here, or `ollama pull {name.display}` to get it.",
        )


def open_store(
    path: Path | None = None, *, environ: Mapping[str, str] | None = None, system_root: Path = Path("/")
) -> Store:
    """The store to work on: `path`, else as Ollama chooses (see `location`). Nothing is created.

    Raises:
        StoreError: there is no place for a store, or the place is not a folder.
    """
    models_dir = (
        path.absolute()
        if path
        else find_store_locations(os.environ if environ is None else environ, system_root)[0].models_dir
    )
    with contextlib.suppress(OSError):
        if models_dir.exists() and not models_dir.is_dir():
            raise StoreError(
                f"The store {str(models_dir)!r} is a file, not a folder",
                next="Name Ollama's models folder, or leave --store and OLLAMA_MODELS out.",
            )
    return Store(models_dir)


def _read_bounded(path: Path) -> tuple[bytes, os.stat_result]:
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        return stream.read(MANIFEST_LIMIT_BYTES + 1), status


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file, through links too, each folder once. An unreadable folder raises: it could name anything."""
    folders, seen = [folder], set()
    while folders:
        current = folders.pop()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(current.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            raise store_error(exc, current, "list the models in") from exc
        for entry in entries:
            if _is_folder(entry):
                folders.append(entry)
            else:
                yield entry


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False

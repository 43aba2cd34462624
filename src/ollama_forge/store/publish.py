"""Putting a manifest under its name: the last step of every change to a store, and the only one that others see.

In: a name and the manifest's bytes. Out: the file, whole. Made in a stage and renamed, so that a server that lists
the store never meets half a manifest or a name that is none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ollama_forge.errors import ExistsError, StoreError
from ollama_forge.files import fsync_folder
from ollama_forge.store.name import ModelName
from ollama_forge.store.stage import find_owner, give_to_owner, make_store_folder, open_stage, store_error

if TYPE_CHECKING:
    from ollama_forge.store.catalog import Store

_MANIFEST_MODE = 0o644
_ATTEMPTS = 5
_RETRY_SECONDS = 0.2


def publish_manifest(store: Store, name: ModelName, raw: bytes, *, overwrite: bool) -> Path:
    """Write the manifest of `name`.

    Args:
        overwrite: replace one that says something else; the same bytes are always taken.

    Raises:
        ExistsError: another manifest is there and `overwrite` is false.
        DiskError: the store cannot be written.
    """
    target = store.manifest_path(name)
    owner = find_owner(store.models_dir)
    with open_stage(store.models_dir, store.manifests_dir, owner) as stage:
        temp = stage / "manifest"
        try:
            with temp.open("xb") as stream:
                stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
            temp.chmod(_MANIFEST_MODE)
            give_to_owner(temp, owner)
        except OSError as exc:
            raise store_error(exc, temp, "write the manifest") from exc
        for _ in range(_ATTEMPTS):
            make_store_folder(target.parent, owner)
            try:
                _place(temp, target, raw, overwrite=overwrite)
                fsync_folder(target.parent)
                return target
            except FileNotFoundError:
                continue  # `ollama rm` of a neighbour pruned the empty folder
            except PermissionError as exc:
                if sys.platform != "win32":
                    raise store_error(exc, target, "write the manifest") from exc
                time.sleep(_RETRY_SECONDS)  # Windows refuses while a server has the old manifest open
            except OSError as exc:
                raise store_error(exc, target, "write the manifest") from exc
    raise StoreError(
        f"The manifest {str(target)!r} could not be written: {_ATTEMPTS} attempts failed",
        why="Another program removes models from this store, or has the old manifest open.",
        next="Run the command again.",
    )


def _place(temp: Path, target: Path, raw: bytes, *, overwrite: bool) -> None:
    if overwrite:
        temp.replace(target)
        return
    try:
        os.link(temp, target)  # unlike a rename, it fails when another process was faster
    except FileExistsError:
        if target.read_bytes() != raw:
            raise ExistsError(
                f"There is already a model at {str(target)!r}",
                why="Nothing is overwritten unless you ask for it.",
                next="Add --force to replace it, or choose another name.",
            ) from None
        temp.replace(target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        if target.exists() and target.read_bytes() != raw:
            raise
        temp.replace(target)
    else:
        with contextlib.suppress(OSError):
            temp.unlink()

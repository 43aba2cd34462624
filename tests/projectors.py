"""A projector, as models that see have one beside their weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import land_gguf
from ollama_forge.store.modelfile import Modelfile


def write_projector(path: Path) -> bytes:
    """A GGUF that says that it is an mmproj, with one tensor."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_tensor("v.patch_embd.weight", np.ones((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def land_with_projector(weights: Path, name: str, store: Path, work: Path) -> bytes:
    """An Ollama model that says that it sees; gives the projector's bytes."""
    projector = work / f"{name}-mmproj.gguf"
    content = write_projector(projector)
    land_gguf(weights, name, Modelfile(), LandOptions(store_path=store, check=False), projector=projector)
    return content

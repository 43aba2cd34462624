"""Adapters as whole jobs: what one is in the other format, and which file of it can be landed on a base.

In: a path as typed, and a base on this disk. Out: a `ConvertedAdapter`, or the path of a LoRA GGUF that fits. Whether
and why one fits is `jobs.adapter_check`'s, merging is `jobs.merging`'s; landing is `jobs.landing`'s.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.errors import UnsupportedError, UsageError
from ollama_forge.files import atomic_output, refuse_existing, require_free_space
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import is_quantized
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.jobs.resolve import ResolvedModel, resolve_stored
from ollama_forge.transform.folder import atomic_folder
from ollama_forge.transform.lora_gguf import plan_lora_gguf, require_expressible
from ollama_forge.transform.lora_peft import plan_peft, write_safetensors
from ollama_forge.transform.places import relative_difference
from ollama_forge.weights.adapter import Adapter, AdapterKind, open_adapter
from ollama_forge.weights.adapter_base import LoraBase, describe_base
from ollama_forge.weights.adapter_config import CONFIG_NAME
from ollama_forge.weights.adapter_fit import FittedAdapter, FittedReplacement, fit_adapter
from ollama_forge.weights.adapter_peft import SAFE_NAME
from ollama_forge.weights.checkpoint import Layout, TensorKey, open_checkpoint

OUTTYPES = ("f32", "f16", "bf16")
_SAME_FLOATS = 0.02  # what rounding to 16 bits may change
_SAME_BLOCKS = 0.5  # what the smallest quantizations change; an unrelated matrix differs by 1.4


@dataclass(frozen=True)
class ConvertedAdapter:
    """An adapter in its other form, on disk or with `is_dry_run` planned.

    Attributes:
        folded: tensors whose scale was multiplied into B, because one alpha serves a whole GGUF file.
    """

    output: Path
    kind: str
    pairs: int
    ranks: tuple[int, ...]
    alpha: float
    size_bytes: int
    sha256: str
    folded: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    is_dry_run: bool

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.output),
            "kind": self.kind,
            "pairs": self.pairs,
            "ranks": list(self.ranks),
            "alpha": self.alpha,
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            "folded": list(self.folded),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
        }


def base_path(model: ResolvedModel) -> Path:
    """The file or folder that holds a model's weights."""
    path = model.gguf_path or model.folder
    assert path is not None
    return path


def convert_adapter(
    path: Path,
    output: Path,
    base: ResolvedModel | None,
    *,
    outtype: str = "f32",
    store_path: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ConvertedAdapter:
    """PEFT to LoRA GGUF (an output that ends with .gguf), or a LoRA file to a PEFT folder (any other output).

    Args:
        base: None: the one that the adapter names; a name that our own training wrote is looked up in `store_path`.

    Raises:
        NotFoundError: the store does not have the base that the adapter names.
        AdapterError: it does not fit the base, or cannot be expressed in the other form; the tensor is named.
        UsageError: a base is needed, or the output's name means the form that the adapter has already.
    """
    started = time.monotonic()
    wants_gguf = output.suffix.lower() == ".gguf"
    with open_adapter(path) as adapter:
        if adapter.kind is AdapterKind.PEFT and not wants_gguf:
            raise UsageError(
                f"{str(output)!r} would be a PEFT folder, and {str(path)!r} is one already",
                next=f"For the GGUF form: ollama-forge adapters convert {path} -o {output}.gguf",
            )
        if base is None and adapter.base_names:
            base = resolve_stored(adapter.base_names[0], store_path)
        fitted, warnings = _settled(fit_adapter(adapter, _find_base(adapter, base)), base)
        if wants_gguf:
            done = _write_gguf(fitted, output, outtype, overwrite=overwrite, dry_run=dry_run)
        else:
            done = _write_peft(fitted, output, overwrite=overwrite, dry_run=dry_run)
        return replace(done, warnings=warnings, seconds=time.monotonic() - started)


def prepare_adapter(path: Path, base: ResolvedModel, scratch_dir: Path) -> Path:
    """The path of a LoRA GGUF that fits the base: `path` itself where it is one, else a new file in `scratch_dir`.

    Raises:
        AdapterError: it does not fit, or only a merge could express it; the tensor is named.
        NotFoundError, GGUFError, SafetensorsError, UnsafeFileError, MissingExtraError: as the readers say.
    """
    with open_adapter(path) as adapter:
        fitted, _ = _settled(fit_adapter(adapter, describe_base(base_path(base))), base)
        return write_fitted(fitted, scratch_dir)


def write_fitted(fitted: FittedAdapter, scratch_dir: Path) -> Path:
    """`prepare_adapter` of an adapter that is open and fits.

    Raises:
        AdapterError: only a merge could express it; the tensor is named.
    """
    require_expressible(fitted)
    if fitted.adapter.kind is AdapterKind.GGUF:
        require_numbers(fitted.adapter)
        return fitted.adapter.path
    number = sum(1 for _ in scratch_dir.glob("adapter-*.gguf"))
    output = scratch_dir / f"adapter-{number}.gguf"
    _write_gguf(fitted, output, "auto", overwrite=False, dry_run=False)
    return output


def settle_base_copies(fitted: FittedAdapter, base: Path) -> FittedAdapter:
    """Decide about the base's own matrices that PEFT stores beside a LoRA on an embedding: those that equal the base's
    are let go, those that differ were trained and count as replacements."""
    different = [copy for copy in fitted.base_copies if not _is_same(copy, base)]
    return replace(fitted, replacements=(*fitted.replacements, *different), base_copies=())


def _settled(fitted: FittedAdapter, base: ResolvedModel | None) -> tuple[FittedAdapter, tuple[str, ...]]:
    if not fitted.base_copies:
        return fitted, ()
    if base is None or fitted.base.shapes is None:
        name = fitted.base_copies[0].replacement.tensor.name
        said = f"{name!r} was left out: it should be the base's own matrix; the base's weights are not here to compare."
        return replace(fitted, base_copies=()), (said,)
    return settle_base_copies(fitted, base_path(base)), ()


def _is_same(copy: FittedReplacement, base: Path) -> bool:
    values = copy.read()
    if not base.is_dir():
        with open_gguf(base) as file:
            tensor = file.tensors.get(copy.gguf_name) or file.find_tensor("token_embd.weight")
            limit = _SAME_BLOCKS if is_quantized(tensor.type) else _SAME_FLOATS
            return relative_difference(values, file, tensor.name) < limit
    with open_checkpoint(base) as checkpoint:
        row = copy.home.row
        assert row is not None
        stored = checkpoint.tensors.get(TensorKey(row.role, copy.home.layer, copy.home.expert, row.is_bias))
        if stored is None:
            return True  # a tied head: the matrix is the embedding, which has a copy of its own
        own = checkpoint.read_float32(stored, Layout.GGUF)
        difference = float(abs(own[: len(values)] - values).max(initial=0.0))
        return difference <= _SAME_FLOATS * float(abs(own).max(initial=0.0))


def require_numbers(adapter: Adapter) -> float:
    """Read everything once. Returns the largest absolute number in any B: 0 means that nothing would change."""
    largest = 0.0
    for pair in adapter.pairs:
        pair.a.read()
        largest = max(largest, float(abs(pair.b.read()).max(initial=0.0)))
        for vector in (pair.magnitude, pair.bias):
            if vector is not None:
                vector.read()
    for replacement in adapter.replacements:
        replacement.tensor.read()
    return largest


def _find_base(adapter: Adapter, base: ResolvedModel | None) -> LoraBase:
    if base is not None:
        return describe_base(base_path(base))
    if adapter.kind is AdapterKind.GGUF and adapter.architecture is not None:
        try:
            family = find_family_by_gguf(adapter.architecture)
        except UnsupportedError:
            family = None
        return LoraBase(str(adapter.path), adapter.architecture, family, None, None, None, ())
    named = adapter.base_names[0] if adapter.base_names else ""
    if named and (Path(named) / "config.json").is_file():
        return describe_base(Path(named))
    raise UsageError(
        f"The base model of {str(adapter.path)!r} is needed",
        why=f"The adapter says that it is {named!r}, which is no folder on this disk." if named else "",
        next="Add --base REF: an Ollama model, a GGUF file, or a folder with the base's config.json.",
    )


def _write_gguf(
    fitted: FittedAdapter, output: Path, outtype: str, *, overwrite: bool, dry_run: bool
) -> ConvertedAdapter:
    plan = plan_lora_gguf(fitted, outtype)
    refuse_existing(output, overwrite=overwrite)
    sha256 = ""
    if dry_run:
        require_free_space(output.parent, plan.size_bytes, output.name)
    else:
        with atomic_output(output, overwrite=overwrite, expected_bytes=plan.size_bytes) as sink:
            write_gguf(sink, plan.fields, plan.entries)
        sha256 = sink.sha256
    return ConvertedAdapter(
        output=output,
        kind=AdapterKind.GGUF.value,
        pairs=len(fitted.pairs),
        ranks=fitted.adapter.ranks,
        alpha=plan.alpha,
        size_bytes=plan.size_bytes,
        sha256=sha256,
        folded=plan.folded,
        warnings=(),
        seconds=0.0,
        is_dry_run=dry_run,
    )


def _write_peft(fitted: FittedAdapter, output: Path, *, overwrite: bool, dry_run: bool) -> ConvertedAdapter:
    plan = plan_peft(fitted)
    sha256 = ""
    if dry_run:
        require_free_space(output.parent, plan.size_bytes, output.name)
    else:
        with atomic_folder(output, overwrite=overwrite, expected_bytes=plan.size_bytes) as folder:
            with atomic_output(folder / SAFE_NAME) as sink:
                write_safetensors(sink, plan.tensors)
            sha256 = sink.sha256
            with atomic_output(folder / CONFIG_NAME) as sink:
                sink.write((json.dumps(plan.config, indent=2, sort_keys=True) + "\n").encode())
    return ConvertedAdapter(
        output=output,
        kind=AdapterKind.PEFT.value,
        pairs=len(fitted.pairs),
        ranks=fitted.adapter.ranks,
        alpha=float(plan.config["lora_alpha"]),
        size_bytes=plan.size_bytes,
        sha256=sha256,
        folded=(),
        warnings=(),
        seconds=0.0,
        is_dry_run=dry_run,
    )

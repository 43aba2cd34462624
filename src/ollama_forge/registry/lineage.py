"""Where a model came from: the recorded landings as a tree, as text and as one self-contained HTML page.

In: a `Document` and what is meant. Out: `Origin`, a tree by digests. What stands in it twice is opened
once, so that neither a loop nor a model that everything shares can make it endless.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import NotFoundError
from ollama_forge.registry.document import Document, Landing, Parent, RegistryEntry
from ollama_forge.registry.lifecycle import FieldChange, compare_entries, find_entries

MAX_DEPTH = 64
_MIN_DIGEST_DIGITS = 6


@dataclass(frozen=True)
class Origin:
    """A model, a file or data, and what it was made from.

    Attributes:
        role: what it was for whoever was made from it; `model` at the root.
        landing: how it was made; None where that is not recorded.
        is_seen: it stands further up already, and is not opened again.
    """

    role: str
    ref: str
    digest: str = ""
    commit: str = ""
    names: tuple[str, ...] = ()
    landing: Landing | None = None
    parents: tuple[Origin, ...] = ()
    is_seen: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "role": self.role,
            "ref": self.ref,
            "digest": self.digest,
            "commit": self.commit,
            "names": list(self.names),
            "landing": self.landing.model_dump(mode="json", exclude={"parents"}) if self.landing else None,
            "parents": [parent.document() for parent in self.parents],
        }

    @property
    def title(self) -> str:
        """One line for people."""
        spoken = self.names[0] if self.names else self.ref or "?"
        exact = self.digest.removeprefix("sha256:")[:12] or self.commit[:12]
        return f"{spoken}  {exact}".rstrip()


def trace_origin(document: Document, ref: str) -> Origin:
    """The tree of a model: by its name here, Ollama's name, or the start of a digest, also of one that is gone.

    Raises:
        NotFoundError: nothing is known under that name.
    """
    digest, name = _find_digest(document, ref)
    return _trace(document, _names_by_digest(document), Parent(role="model", ref=name, digest=digest), set(), 0)


def render_tree(origin: Origin) -> list[str]:
    """The tree as lines of text."""
    return [origin.title, *_facts(origin, ""), *_branches(origin, "")]


def render_page(origin: Origin) -> str:
    """The tree as one HTML page that loads nothing."""
    title = html.escape(origin.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title>\n<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:70rem}}"
        "ul{list-style:none;border-left:2px solid #ccc;padding-left:1.2rem}.role{color:#666}"
        "code{font-size:.85em;overflow-wrap:anywhere}table{border-collapse:collapse;font-size:.85em}"
        "td{padding:0 1rem 0 0;vertical-align:top;white-space:pre-wrap}</style></head>\n"
        f"<body><h1>{title}</h1>\n<ul>{_item(origin)}</ul></body></html>\n"
    )


def compare_models(document: Document, ref_a: str, ref_b: str) -> list[FieldChange]:
    """What is different between two models: fields of their entries, and of how they were made."""
    first, second = find_entries(document, [ref_a])[0], find_entries(document, [ref_b])[0]
    rows = [row for row in compare_entries(first, second) if row.field not in ("name", "identity")]
    rows += _identity_rows(first, second)
    one, two = (_made(document, entry.identity.manifest_digest) for entry in (first, second))
    for field in sorted({*one, *two}):
        if one.get(field) != two.get(field):
            rows.append(FieldChange(first.name, f"made.{field}", one.get(field), two.get(field)))
    return rows


def _find_digest(document: Document, ref: str) -> tuple[str, str]:
    try:
        entry = find_entries(document, [ref])[0]
    except NotFoundError:
        digits = ref.lower().removeprefix("sha256:")
        known = sorted(digest for digest in document.lineage if digest.removeprefix("sha256:").startswith(digits))
        if len(digits) < _MIN_DIGEST_DIGITS or len(known) != 1:
            raise
        return known[0], document.lineage[known[0]][-1].name
    return entry.identity.manifest_digest, entry.served_model_id or entry.name


def _trace(document: Document, names: dict[str, tuple[str, ...]], what: Parent, seen: set[str], depth: int) -> Origin:
    landings = document.lineage.get(what.digest, ()) if what.digest else ()
    known = names.get(what.digest, ()) if what.digest else ()
    if not landings or what.digest in seen or depth >= MAX_DEPTH:
        is_seen = bool(landings) and what.digest in seen
        return Origin(what.role, what.ref, what.digest, what.commit, known, is_seen=is_seen)
    seen.add(what.digest)
    landing = landings[-1]
    parents = tuple(_trace(document, names, parent, seen, depth + 1) for parent in landing.parents)
    return Origin(what.role, what.ref, what.digest, what.commit, known, landing, parents)


def _names_by_digest(document: Document) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for name, entry in sorted(document.models.items()):
        digest = entry.identity.manifest_digest
        if digest:
            names[digest] = (*names.get(digest, ()), entry.served_model_id or name)
    return names


def _facts(origin: Origin, indent: str) -> Iterator[str]:
    landing = origin.landing
    if landing is None:
        return
    when = f", {landing.landed_at}" if landing.landed_at else ""
    yield f"{indent}  {landing.step}, {landing.seconds:.1f} s{when}"
    for title, facts in (("", landing.parameters), ("score ", landing.scores)):
        for key, value in _flat(facts):
            text = str(value).strip().replace("\n", " | ")
            yield f"{indent}  {title}{key}: {text if len(text) <= 100 else text[:97] + '...'}"


def _branches(origin: Origin, indent: str) -> Iterator[str]:
    for number, parent in enumerate(origin.parents, 1):
        is_last = number == len(origin.parents)
        seen = " (see above)" if parent.is_seen else ""
        yield f"{indent}{'└' if is_last else '├'}─ {parent.role}: {parent.title}{seen}"
        inner = indent + ("   " if is_last else "│  ")
        yield from _facts(parent, inner)
        yield from _branches(parent, inner)


def _item(origin: Origin) -> str:
    facts = ""
    if origin.landing is not None:
        landing = origin.landing
        told = [("step", landing.step), ("seconds", landing.seconds), ("at", landing.landed_at)]
        for prefix, values in (("", landing.parameters), ("score ", landing.scores), ("version ", landing.versions)):
            told += [(prefix + key, value) for key, value in _flat(values)]
        cells = (f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>" for key, value in told)
        facts = f"<table>{''.join(cells)}</table>"
    below = f"<ul>{''.join(_item(parent) for parent in origin.parents)}</ul>" if origin.parents else ""
    names = ", ".join(origin.names) or origin.ref or "?"
    exact = html.escape(origin.digest or origin.commit)
    role = html.escape(origin.role)
    return f'<li><span class="role">{role}</span> <b>{html.escape(names)}</b> <code>{exact}</code>{facts}{below}</li>\n'


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(values.items()):
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _identity_rows(first: RegistryEntry, second: RegistryEntry) -> Iterator[FieldChange]:
    for field in ("manifest_digest", "metadata_hash"):
        before, after = getattr(first.identity, field), getattr(second.identity, field)
        if before != after:
            yield FieldChange(first.name, field, before, after)
    blobs = [[(blob.kind, blob.digest) for blob in entry.identity.blobs] for entry in (first, second)]
    for kind in sorted({kind for pairs in blobs for kind, _ in pairs}):
        before, after = ([digest for one, digest in pairs if one == kind] for pairs in blobs)
        if before != after:
            yield FieldChange(first.name, f"blobs.{kind}", before, after)


def _made(document: Document, digest: str) -> dict[str, Any]:
    landings = document.lineage.get(digest, ()) if digest else ()
    if not landings:
        return {}
    landing = landings[-1]
    made = dict(_flat({"parameters": landing.parameters, "scores": landing.scores}))
    made["step"] = landing.step
    made["parents"] = [f"{one.role}: {one.digest or one.commit or one.ref}" for one in landing.parents]
    return {**made, **{f"version.{key}": value for key, value in landing.versions.items()}}

"""The tree of everything that can go wrong and that a person can act on.

Each error carries facts in three parts: `what` happened (with the value), `why`, and the `next` command to type.
The library raises; only `cli/` prints. An error outside this tree is a defect and keeps its traceback.
"""

from __future__ import annotations


class ForgeError(Exception):
    """The root. `kind` is the stable word that `--json` prints.

    Args:
        what: what happened, with the value (`repr` for text that came from outside).
        why: the reason, where it is known.
        next: what to type or to do now.
    """

    kind = "error"
    exit_code = 1

    def __init__(self, what: str, *, why: str = "", next: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next = next

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.next) if part)


class UsageError(ForgeError):
    """The words of the command are wrong: an unknown type, an option that does not fit another."""

    kind = "usage"
    exit_code = 2


class MissingExtraError(ForgeError):
    """A command needs an optional part of the package that is not installed."""

    kind = "missing_extra"


class NotFoundError(ForgeError):
    """A file, a model, a repo or a tensor that was named is not there."""

    kind = "not_found"


class ExistsError(ForgeError):
    """The target is there already and `--force` was not given."""

    kind = "exists"


class DiskError(ForgeError):
    """No room, no permission, or a file system that failed."""

    kind = "disk"


class FormatError(ForgeError):
    """A file is not what it claims to be."""

    kind = "format"


class GGUFError(FormatError):
    """A GGUF file whose numbers do not agree with each other or with its size."""

    kind = "gguf"


class SafetensorsError(FormatError):
    """A safetensors file or index whose header does not agree with its bytes."""

    kind = "safetensors"


class UnsafeFileError(FormatError):
    """A file that can run code when it is read (pickle), or that leads outside its folder."""

    kind = "unsafe_file"


class TokenizerError(FormatError):
    """A tokenizer that cannot be read, or that GGUF cannot express."""

    kind = "tokenizer"


class TemplateError(FormatError):
    """A chat template that does not parse, breaks a limit, or refuses the conversation."""

    kind = "template"


class UnsupportedError(ForgeError):
    """A family, a tensor type or a feature that this tool does not know."""

    kind = "unsupported"


class NameInvalidError(ForgeError):
    """A model name that Ollama's rules refuse."""

    kind = "name"


class DigestError(ForgeError):
    """A digest that is not `sha256:` and 64 hexadecimal digits, or that does not match its bytes."""

    kind = "digest"


class StoreError(ForgeError):
    """Ollama's store cannot be read or written, or is not whole."""

    kind = "store"


class ManifestError(StoreError):
    """A manifest that does not parse or that names something impossible."""

    kind = "manifest"


class ModelfileError(ForgeError):
    """A Modelfile line that Ollama would refuse."""

    kind = "modelfile"


class ServerError(ForgeError):
    """A running Ollama that is not reachable, too old, too new, or that answered with an error."""

    kind = "server"


class EngineError(ForgeError):
    """llama.cpp could not load or run the model."""

    kind = "engine"


class CheckError(ForgeError):
    """A model was landed, did not pass its check, and was taken back."""

    kind = "check"


class HubError(ForgeError):
    """The Hugging Face Hub refused, is out of reach, or sent something else than it promised."""

    kind = "hub"


class DatasetError(ForgeError):
    """Training data that cannot be used."""

    kind = "dataset"


class AdapterError(ForgeError):
    """An adapter that is broken, or that does not fit its base."""

    kind = "adapter"


class TrainingError(ForgeError):
    """Training that could not run, or that did nothing."""

    kind = "training"


class RecipeError(ForgeError):
    """A recipe or a plan that cannot be used."""

    kind = "recipe"


class RegistryError(ForgeError):
    """The registry file cannot be read or written."""

    kind = "registry"


class InterruptedRunError(ForgeError):
    """Somebody pressed Ctrl-C; what was done so far is kept and can be resumed."""

    kind = "interrupted"
    exit_code = 130

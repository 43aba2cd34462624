"""What a recipe may say: its keys, their types, and what each step takes. Texts in, frozen values out.

Every value arrives as the text that was written, so a number may be quoted or not. An unknown key is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ollama_forge.errors import ForgeError
from ollama_forge.gguf.types import parse_file_type, parse_type
from ollama_forge.store.name import parse_name, validate_writable
from ollama_forge.store.parameters import PARAMETERS, parse_parameter
from ollama_forge.transform.cut_request import parse_amount, parse_share

SOURCES = ("base", "gguf", "hf_repo", "checkpoint")
FLAT_PARAMETERS = ("temperature", "num_ctx", "top_p", "repeat_penalty")


def _listed(value: Any) -> Any:
    """One text where a list is expected is a list of one."""
    return [value] if isinstance(value, str) else value


def _words(value: Any) -> Any:
    """`a, b` where a list of words is expected."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _known_type(text: str) -> str:
    return _or_value_error(lambda: parse_file_type(text), text)


def _known_tensor_type(text: str) -> str:
    return _or_value_error(lambda: parse_type(text), text)


def _writable_name(text: str) -> str:
    return _or_value_error(lambda: validate_writable(parse_name(text)), text)


def _or_value_error(check: Any, text: str) -> str:
    try:
        check()
    except ForgeError as exc:
        raise ValueError(". ".join(part for part in (exc.what, exc.why) if part)) from exc
    return text


def _known_goal(text: str) -> str:
    from ollama_forge.jobs.downsizing_plan import parse_goal

    return _or_value_error(lambda: parse_goal(text), text)


def _known_amounts(values: dict[str, str]) -> dict[str, str]:
    for name, text in values.items():
        _or_value_error(lambda name=name, text=text: parse_amount(text, name), text)
    return values


def _known_size(text: str) -> str:
    from ollama_forge.jobs.fit_result import parse_limit

    return _or_value_error(lambda: parse_limit(text), text)


def _known_parameters(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        for text in value if isinstance(value, list) else (value,):
            if isinstance(value, list) and name != "stop":
                raise ValueError(f"{name} takes one value")
            _or_value_error(lambda name=name, text=text: parse_parameter(name, text), text)
    return values


def _turn(value: Any) -> Any:
    """`user: Hello` is `role: user, content: Hello`."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("system", "user", "assistant"):
        role, content = next(iter(value.items()))
        return {"role": role, "content": content}
    return value


def _pairs(value: Any) -> Any:
    """`REGEX: TYPE` lines, or the command line's `REGEX=TYPE`."""
    if isinstance(value, dict):
        return [f"{pattern}={name}" for pattern, name in value.items()]
    return _listed(value)


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
FileTypeName = Annotated[str, AfterValidator(_known_type)]
TensorTypeName = Annotated[str, AfterValidator(_known_tensor_type)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """What all parts of a recipe share."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    shorthand: ClassVar[str] = ""
    """The key that a bare text (or list) in a step's place stands for."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Keys that name files or folders, counted from the recipe's own folder."""


class Turn(Part):
    """An example turn that the model begins with."""

    role: Literal["system", "user", "assistant"]
    content: str


class Wishes(Part):
    """Everything that a Modelfile can say beside its weights. `@FILE` reads a text from a file."""

    system: str | None = None
    template: str | None = None
    template_from: str | None = None
    temperature: str | None = None
    num_ctx: str | None = None
    top_p: str | None = None
    repeat_penalty: str | None = None
    parameters: Annotated[dict[str, str | list[str]], AfterValidator(_known_parameters)] = {}
    messages: tuple[Annotated[Turn, BeforeValidator(_turn)], ...] = ()
    license: Texts = ()
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None


class QuantizeStep(Part):
    """Make the weights smaller; as `ollama-forge quantize`."""

    shorthand: ClassVar[str] = "type"
    paths: ClassVar[tuple[str, ...]] = ("imatrix",)
    kind: Literal["quantize"] = "quantize"
    type: FileTypeName
    imatrix: str | None = None
    tensor_types: Annotated[tuple[str, ...], BeforeValidator(_pairs)] = ()
    output_tensor_type: TensorTypeName | None = None
    token_embedding_type: TensorTypeName | None = None
    pure: bool = False
    allow_requantize: bool = False


class FitStep(Part):
    """Find the mix of types that loses least within a size; as `ollama-forge quantize --fit`."""

    shorthand: ClassVar[str] = "size"
    paths: ClassVar[tuple[str, ...]] = ("imatrix", "text")
    kind: Literal["fit"] = "fit"
    size: Annotated[str, AfterValidator(_known_size)]
    context: Positive | None = None
    text: str | None = None
    passes: Positive | None = None
    imatrix: str | None = None
    allow_requantize: bool = False


class AdapterStep(Part):
    """Put an adapter on top, as a layer of its own."""

    shorthand: ClassVar[str] = "path"
    paths: ClassVar[tuple[str, ...]] = ("path",)
    kind: Literal["adapter"] = "adapter"
    path: str
    revision: str | None = None
    file: str | None = None


class MergeStep(Part):
    """Merge adapters (and the layers that are there) into the weights; as `ollama-forge merge`."""

    shorthand: ClassVar[str] = "adapters"
    paths: ClassVar[tuple[str, ...]] = ("adapters", "imatrix")
    kind: Literal["merge"] = "merge"
    adapters: Texts = ()
    weights: Annotated[tuple[float, ...], BeforeValidator(_listed)] = ()
    untie: bool = False
    imatrix: str | None = None


class FinetuneStep(Part):
    """Train an adapter on the weights; as `ollama-forge finetune`."""

    shorthand: ClassVar[str] = "data"
    paths: ClassVar[tuple[str, ...]] = ("data",)
    kind: Literal["finetune"] = "finetune"
    data: Annotated[Texts, Field(min_length=1)]
    include: Texts = ()
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Count = 0
    lr: Annotated[float, Field(gt=0)] = 2e-4
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Share = 0.0
    target_modules: Words = ()
    max_length: Annotated[int, Field(ge=2)] = 1024
    overlong: Literal["truncate", "drop"] = "truncate"
    learn: Literal["assistant", "all"] = "assistant"
    batch_size: Positive = 1
    grad_accum: Count = 0
    warmup: Annotated[float, Field(ge=0)] = 0.03
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    seed: int = 0
    val_split: Share = 0.0
    early_stop: Count = 0
    checkpoint_every: Count = 0
    checkpointing: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    merge: bool = False


class AbliterateStep(Part):
    """Take the refusal direction out of the weights; as `ollama-forge abliterate run`."""

    paths: ClassVar[tuple[str, ...]] = ("harmful", "harmless", "directions", "markers", "imatrix")
    kind: Literal["abliterate"] = "abliterate"
    harmful: Annotated[Texts, Field(min_length=1)]
    harmless: Annotated[Texts, Field(min_length=1)]
    directions: str | None = None
    markers: str | None = None
    imatrix: str | None = None
    num_prompts: Annotated[int, Field(ge=2)] | None = None
    num_instructions: Annotated[int, Field(ge=2)] = 128
    num_eval_prompts: Annotated[int, Field(ge=2)] = 32
    method: Literal["mean", "median"] = "mean"
    positions: Annotated[tuple[int, ...], BeforeValidator(_listed)] = (-1,)
    layer_fracs: Annotated[tuple[Share, ...], BeforeValidator(_words)] = ()
    layer: float | None = None
    per_layer: bool = False
    strength: float = 1.0
    attention_strength: float | None = None
    mlp_strength: float | None = None
    num_directions: Positive = 1
    strength_kernel: Literal["constant", "linear_peak", "gaussian"] = "constant"
    kernel_center: float = 0.5
    kernel_width: float = 0.4
    skip_begin_layers: Count = 0
    skip_end_layers: Count = 0
    norm_preserving: bool = False
    projected: bool = False
    embedding: bool = True
    quant: FileTypeName | None = None
    max_tokens: Positive = 256
    trial_tokens: Annotated[int, Field(ge=4)] = 40
    seed: int = 0
    verify: bool = True
    accept: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


class DownsizeStep(Part):
    """Cut parts of the model away, and heal it by distillation; as `ollama-forge downsize`.

    `target` with `data` is the whole pipeline; `keep`, `layers`, `drop_layers` and `width` cut once; `data` heals what
    was cut, with the weights before the cut as teacher, or `teacher` teaches it.
    """

    paths: ClassVar[tuple[str, ...]] = ("data", "text")
    kind: Literal["downsize"] = "downsize"
    target: Annotated[str, AfterValidator(_known_goal)] | None = None
    keep: str | None = None
    layers: Positive | None = None
    drop_layers: Annotated[tuple[Count, ...], BeforeValidator(_words)] = ()
    width: Annotated[dict[Literal["ffn", "heads", "hidden", "experts"], str], AfterValidator(_known_amounts)] = {}
    by: Literal["distance", "influence"] = "distance"
    text: str | None = None
    tokens: Annotated[int, Field(ge=2)] = 8192
    teacher: str | None = None
    data: Texts = ()
    include: Texts = ()
    loss: Literal["forward-kl", "reverse-kl", "jsd"] = "forward-kl"
    full: bool = False
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Count = 0
    lr: Annotated[float, Field(gt=0)] = 2e-4
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    max_length: Annotated[int, Field(ge=2)] = 1024
    learn: Literal["assistant", "all"] = "all"
    batch_size: Positive = 1
    grad_accum: Count = 0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def cuts(self) -> bool:
        """Whether something is cut away."""
        return bool(self.keep or self.layers or self.drop_layers or self.width)

    @model_validator(mode="after")
    def _says_what(self) -> DownsizeStep:
        if self.keep is not None:
            _or_value_error(lambda: parse_share(self.keep or "", "keep"), self.keep)
        if self.target and (self.cuts or self.teacher):
            raise ValueError("'target' is the whole pipeline: keep, layers, width and teacher do not go with it")
        if self.target and not self.data:
            raise ValueError("'target' needs 'data': what was cut is damaged until it is healed")
        if self.teacher and not self.data:
            raise ValueError("'teacher' needs 'data'")
        if not (self.target or self.cuts or self.teacher):
            raise ValueError(
                "'downsize' needs 'target', or what to cut (keep, layers, width), or 'teacher' with 'data'"
            )
        return self


class CreateStep(Wishes):
    """What the model says beside its weights; the same keys may stand at the top of the recipe."""

    paths: ClassVar[tuple[str, ...]] = ()
    kind: Literal["create"] = "create"


STEPS: dict[str, type[Part]] = {
    "quantize": QuantizeStep,
    "fit": FitStep,
    "adapter": AdapterStep,
    "merge": MergeStep,
    "finetune": FinetuneStep,
    "abliterate": AbliterateStep,
    "downsize": DownsizeStep,
    "create": CreateStep,
}

ALIASES = {"licence": "license", "licenses": "license", "licences": "license", "finetuning": "finetune"}
"""Other spellings of keys; they mean the same."""


MEANT = {
    **{"learning_rate": "lr", "num_epochs": "epochs", "max_seq_length": "max_length", "lora_rank": "rank"},
    **{"lora_alpha": "alpha", "dataset": "data", "model": "base", "from": "base", "repo": "hf_repo"},
    **{"repo_id": "hf_repo", "prompt": "system", "system_prompt": "system", "adapters": "adapter", "path": "gguf"},
}
"""Words of other tools for what is called otherwise here; they are not accepted, but understood."""


class RecipeKeys(Wishes):
    """The top of a recipe."""

    name: Annotated[str, AfterValidator(_writable_name)]
    description: str | None = None
    base: str | None = None
    gguf: str | None = None
    hf_repo: str | None = None
    checkpoint: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    quant: str | None = None
    quantize: FileTypeName | None = None
    allow_requantize: bool = False
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"
    adapter: Texts = ()
    variables: dict[str, str | None] = {}
    steps: tuple[Any, ...] = ()


def parameter_texts(wishes: Wishes) -> list[tuple[str, str]]:
    """Every parameter as name and text, the flat ones first; `stop` may come several times."""
    pairs = [(name, text) for name in FLAT_PARAMETERS if (text := getattr(wishes, name)) is not None]
    for name, value in wishes.parameters.items():
        pairs += [(name, text) for text in (value if isinstance(value, list) else [value])]
    return pairs


def is_parameter(name: str) -> bool:
    """Whether a word is one of Ollama's parameters."""
    return name in PARAMETERS

"""How much smaller a model should become, as people type it: `70%`, `ffn=50%,heads=8`.

In: text. Out: amounts, and with the sizes of a model the `Target` in whole layers, channels, heads and experts. What
cannot be met is refused here, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ollama_forge.errors import UsageError
from ollama_forge.gguf.types import block_elements, is_quantized
from ollama_forge.transform.cut import ModelSizes
from ollama_forge.transform.ranking import Target
from ollama_forge.weights.checkpoint import Checkpoint

WIDTHS = ("ffn", "heads", "hidden", "experts")
MOST_PER_STEP = 1 / 3
"""NVIDIA's advice for pruning with healing afterwards (https://arxiv.org/abs/2407.14679): no more at once."""

_LAYER = re.compile(r"(?:^|\.)(?:blk|layers|h)\.(\d+)\.")
# A share is rounded to a multiple of one of these, the largest that moves it by no more than this part of the whole.
_UNITS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_TOLERANCE = 0.05 + 1e-9


@dataclass(frozen=True)
class Amount:
    """How much stays: a share of what there is (above 0, below 1), or a number."""

    share: float | None = None
    count: int | None = None

    def __str__(self) -> str:
        return f"{100 * self.share:g}%" if self.share is not None else str(self.count)


def parse_share(text: str, option: str = "--keep") -> float:
    """`70%` or `0.7` -> 0.7.

    Raises:
        UsageError: no number, or one that leaves nothing or everything.
    """
    amount = parse_amount(text, option)
    if amount.share is None:
        raise UsageError(
            f"{option} {text!r} is not a share",
            why="It says how much of the model stays.",
            next=f"Example: {option} 70%; a number of layers is --layers N",
        )
    return amount.share


def parse_amount(text: str, option: str, part: str = "") -> Amount:
    """`50%`, `0.5` or `4096`.

    Args:
        option, part: how the errors spell what was typed before it, for example `--width` and `ffn=`.

    Raises:
        UsageError: something else, or a share that leaves nothing or everything.
    """
    words = text.strip()
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", words)
    if match is None:
        raise UsageError(
            f"{option} {part + text!r} is neither a share nor a number", next=f"Example: {option} {part}70%"
        )
    number = float(match[1])
    if not match[2] and "." not in match[1] and number >= 1:
        return Amount(count=int(match[1]))
    share = number / 100 if match[2] else number
    if not 0 < share < 1:
        raise UsageError(
            f"{option} {part + text!r} keeps {'nothing' if share <= 0 else 'everything, or more than there is'}",
            why="A share of what stays lies between 0% and 100%.",
            next=f"Example: {option} {part}70%",
        )
    return Amount(share=share)


def parse_width(text: str) -> Mapping[str, Amount]:
    """`ffn=50%,heads=8,hidden=75%,experts=64`.

    Raises:
        UsageError: a part that is not there, comes twice, or has no amount.
    """
    widths: dict[str, Amount] = {}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        name = name.strip()
        if not sign or name not in WIDTHS or name in widths:
            raise UsageError(
                f"--width {text!r}: {part.strip()!r} is not one of {', '.join(f'{known}=AMOUNT' for known in WIDTHS)}"
                + (" a first time" if name in widths else ""),
                next="Example: --width ffn=50%,heads=75%",
            )
        widths[name] = parse_amount(value, "--width", f"{name}=")
    return widths


def settle_width(widths: Mapping[str, Amount], sizes: ModelSizes, unit: int) -> Target:
    """Amounts -> whole numbers of channels, key-value heads and experts.

    Args:
        unit: elements of the largest block of the model's tensors; channels are rounded to it where that is near.

    Raises:
        UsageError: more than there is, nothing at all, heads that do not divide, or no experts.
    """
    ffn = hidden = n_kv_heads = n_experts = None
    if (amount := widths.get("ffn")) is not None:
        if sizes.n_experts:
            raise UsageError(
                "The channels of single experts are not cut",
                why="Whole experts that matter least go instead; that costs less.",
                next="Example: --width experts=75%",
            )
        ffn = _channels(amount, sizes.ffn, unit, "ffn")
    if (amount := widths.get("hidden")) is not None:
        hidden = _channels(amount, sizes.hidden, unit, "hidden")
    if (amount := widths.get("heads")) is not None:
        n_kv_heads = _key_value_heads(amount, sizes)
    if (amount := widths.get("experts")) is not None:
        n_experts = _experts(amount, sizes)
    return Target(ffn=ffn, n_kv_heads=n_kv_heads, hidden=hidden, n_experts=n_experts)


def _channels(amount: Amount, total: int, unit: int, name: str) -> int:
    if amount.count is not None:
        return _within(amount.count, total, f"{name} channels", f"--width {name}=")
    assert amount.share is not None
    for step in _UNITS:
        count = round(amount.share * total / step) * step
        if step <= max(unit, 32) and 0 < count < total and abs(count / total - amount.share) <= _TOLERANCE:
            return count
    return max(1, round(amount.share * total))


def _key_value_heads(amount: Amount, sizes: ModelSizes) -> int:
    if amount.share is not None:
        return max(1, round(amount.share * sizes.n_kv_heads))
    heads = _within(amount.count or 0, sizes.n_heads, "query heads", "--width heads=")
    if heads % sizes.group:
        below = heads // sizes.group * sizes.group
        choices = [count for count in (below, below + sizes.group) if 0 < count < sizes.n_heads]
        raise UsageError(
            f"{heads} of {sizes.n_heads} query heads cannot be kept",
            why=f"{sizes.group} of them share each key-value head, and stay or go together.",
            next="Keep " + " or ".join(f"--width heads={count}" for count in choices or [sizes.group]),
        )
    return heads // sizes.group


def _experts(amount: Amount, sizes: ModelSizes) -> int:
    if not sizes.n_experts:
        raise UsageError("This model has no experts", next="Cut its channels: --width ffn=70%")
    if amount.count is not None:
        return _within(amount.count, sizes.n_experts, "experts", "--width experts=")
    assert amount.share is not None
    return max(1, round(amount.share * sizes.n_experts))


def _within(count: int, total: int, what: str, option: str) -> int:
    if not 0 < count <= total:
        raise UsageError(
            f"{option}{count}: the model has {total:,} {what}",
            why="More cannot be kept than there are." if count else "Nothing would be left.",
            next=f"Example: {option}50%",
        )
    return count


def settle_layers(share: float, checkpoint: Checkpoint, sizes: ModelSizes) -> int:
    """How many layers keep that share of the model's bytes, as near as whole layers come.

    Raises:
        UsageError: even one layer is more, or the share keeps every layer.
    """
    total, in_layers = weigh_layers(checkpoint)
    each = in_layers / sizes.n_layers
    outside = total - in_layers
    n_dropped = round((1 - share) * total / each / sizes.period) * sizes.period
    least = (outside + each * sizes.period) / total
    if n_dropped >= sizes.n_layers:
        raise UsageError(
            f"--keep {share:.0%} cannot be reached by cutting layers",
            why=f"What lies outside of the layers (embedding, head) and one layer are {least:.0%} of this model.",
            next=f"Keep at least {least:.0%}, or cut its width too: --layers N --width hidden=50%",
        )
    if n_dropped < 1:
        raise UsageError(
            f"--keep {share:.0%} keeps every layer",
            why=f"One of {sizes.n_layers} layers is {each / total:.1%} of this model.",
            next=f"Keep less: --layers {sizes.n_layers - sizes.period}",
        )
    return sizes.n_layers - n_dropped


def weigh_layers(checkpoint: Checkpoint) -> tuple[int, int]:
    """(bytes of all tensors, bytes of those in layers)."""
    file = checkpoint.gguf or checkpoint.folder
    assert file is not None
    tensors = [(tensor.name, tensor.nbytes) for tensor in file.tensors.values()]
    return sum(nbytes for _, nbytes in tensors), sum(nbytes for name, nbytes in tensors if _LAYER.search(name))


def largest_block(checkpoint: Checkpoint) -> int:
    """Elements in the largest block of the model's tensors; 1 where nothing is packed."""
    if checkpoint.gguf is None:
        return 1
    return max((block_elements(t.type) for t in checkpoint.gguf.tensors.values() if is_quantized(t.type)), default=1)


UNHEALED = (
    "A pruned model is damaged until it is healed: distil the original into it on diverse data "
    "(ollama-forge downsize distill), and compare it with a lower quantization of the original."
)


def limit_warnings(kept_share: float) -> tuple[str, ...]:
    """What NVIDIA's measurements say about cutting so much, in plain words."""
    warnings = []
    if kept_share < 1 - MOST_PER_STEP:
        warnings.append(
            f"This takes away {1 - kept_share:.0%} at once. NVIDIA's advice is at most a third in one step, then "
            "healing, then the next step; beyond half, even healing seldom brings a model back."
        )
    warnings.append(UNHEALED)
    return tuple(warnings)

"""Landing a GGUF in a store on the same file system, against one `sha256sum` of the file."""

from __future__ import annotations

import shutil

from conversion import ready_bf16
from harness import Command, Job, Row, Workshop, run_side_by_side, show

TOLERANCE = 1.1


def measure_landing(shop: Workshop) -> list[Row]:
    """Landing without the check of the result, and the whole command, which also loads the model and runs it."""
    model = ready_bf16(shop)
    store = shop.folder / "landing-store"

    def clean() -> None:
        shutil.rmtree(store, ignore_errors=True)

    whole = shop.forge("convert", "--gguf", str(model), "--name", "bench", "--store", str(store), "--quiet")
    unchecked = (*whole, "--no-check")
    measured = run_side_by_side(
        [
            Command("convert --gguf --no-check", unchecked, clean=clean),
            Command("sha256sum", ("sha256sum", str(model))),
            Command("convert --gguf --name", whole, clean=clean),
        ],
        shop.repeats,
    )
    landed, hashed, command = measured
    clean()
    size = f"{model.stat().st_size / 1e9:.2f} GB, same file system"
    ratio = landed.seconds / hashed.seconds
    target = f"one read for its hash ({TOLERANCE}x sha256sum, start-up included)"
    spread = f"ours {landed.spread}, sha256sum {hashed.spread}"
    checked = f"{command.seconds / hashed.seconds:.2f}x the time"
    return [
        Row(
            f"land a GGUF ({size})",
            show(landed),
            show(hashed),
            f"{ratio:.2f}x the time",
            target,
            ratio <= TOLERANCE,
            spread,
        ),
        Row(
            f"the whole command ({size})",
            show(command),
            show(hashed),
            checked,
            "",
            None,
            "loads and runs the result too",
        ),
    ]


JOBS = (Job("landing", measure_landing),)

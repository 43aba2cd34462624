"""Landing a GGUF in a store on the same file system, against one `sha256sum` of the file."""

from __future__ import annotations

import shutil

from conversion import ready_bf16
from harness import Command, Job, Row, Workshop, run_side_by_side, show

TOLERANCE = 1.1


def measure_landing(shop: Workshop) -> list[Row]:
    """Landing without the check of the result: a random model never ends its answer, so its check says nothing."""
    model = ready_bf16(shop)
    store = shop.folder / "landing-store"

    def clean() -> None:
        shutil.rmtree(store, ignore_errors=True)

    land = ("convert", "--gguf", str(model), "--name", "bench", "--store", str(store), "--no-check", "--quiet")
    ours = Command("convert --gguf --no-check", shop.forge(*land), clean=clean)
    landed, hashed = run_side_by_side([ours, Command("sha256sum", ("sha256sum", str(model)))], shop.repeats)
    clean()
    ratio = landed.seconds / hashed.seconds
    return [
        Row(
            f"land a GGUF ({model.stat().st_size / 1e9:.2f} GB, same file system)",
            show(landed),
            show(hashed),
            f"{ratio:.2f}x the time",
            f"one read for its hash ({TOLERANCE}x sha256sum, start-up included)",
            ratio <= TOLERANCE,
            f"ours {landed.spread}, sha256sum {hashed.spread}",
        )
    ]


JOBS = (Job("landing", measure_landing),)

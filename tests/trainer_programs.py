"""Stand-ins for programs that train: they speak the true command lines, and write files of the true formats.

Each is an executable script in a folder for PATH. `HELP_OLD` lists the options of llama.cpp's finetune as it was until
July 2024, `HELP_NEW` those of today's llama-finetune; a stand-in refuses, as the programs do, what is not listed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command import SCRIPT_START

TESTS = Path(__file__).parent
HELP_OLD = (
    "usage: finetune [options]\n\noptions:\n  -h, --help  show this help message and exit\n"
    "  --model-base FNAME  model path\n  --lora-out FNAME  path to save llama lora\n"
    "  --lora-alpha N  LORA alpha\n  --lora-r N  LORA r\n  --rank-wq N  rank for wq\n"
    "  --train-data FNAME  training data\n  --checkpoint-in FNAME  checkpoint\n  --checkpoint-out FNAME  checkpoint\n"
    "  -s SEED, --seed SEED  RNG seed\n  -c N, --ctx N  context size\n  -b N, --batch N  batch size\n"
    "  -t N, --threads N  number of threads\n"
    "  --grad-acc N  accumulation\n  --sample-start STR  starting point for samples\n"
    "  --epochs N  maximum number epochs\n  --adam-iter N  iterations\n  --adam-alpha N  learning rate\n"
)
HELP_NEW = (
    "----- common params -----\n-h,    --help, --usage  print usage and exit\n-m,    --model FNAME  model path\n"
    "-f,    --file FNAME  a file containing the prompt\n-c,    --ctx-size N  context\n-b,    --batch-size N  batch\n"
    "-ub,   --ubatch-size N  ubatch\n----- example-specific params -----\n"
    "-o,    --output, --output-file FNAME  output\n"
    "-lr,   --learning-rate ALPHA  alpha\n-val-split, --val-split FRACTION  validation\n-epochs, --epochs N  epochs\n"
    "-opt,  --optimizer sgd|adamw  optimizer\n"
)

_START = """import json, os, pathlib, re, sys
sys.path.insert(0, {tests!r})
HELP = {help!r}
here = pathlib.Path(__file__).parent
if "--help" in sys.argv:
    sys.stderr.write(HELP)
    sys.exit(0)
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
for flag in given:
    if HELP and not re.search(r"(?<![\\w-])" + re.escape(flag) + r"(?![\\w-])", HELP):
        sys.stderr.write("error: unknown argument: " + flag + "\\n")
        sys.exit(1)
(here / "argv.json").write_text(json.dumps(sys.argv))
(here / "env.json").write_text(json.dumps(dict(os.environ)))
"""
_OLD = """
import numpy as np
from tiny_adapters import build_ggla
from ollama_forge.gguf.reader import open_gguf
text = pathlib.Path(given["--train-data"]).read_text()
samples = text.split(given["--sample-start"])[1:]
print(f"main: number of training samples: {len(samples)}", flush=True)
with open_gguf(pathlib.Path(given["--model-base"])) as base:
    shapes = {name: base.tensors[name].shape for name in TARGETS}
random = np.random.default_rng(0)
pairs = {}
for name, shape in shapes.items():
    rows, columns = (shape[0], 1) if len(shape) == 1 else shape
    if len(shape) == 1:
        rows, columns = 1, shape[0]
    a = random.normal(size=(2, columns)).astype("float32")
    b = (random.normal(size=(rows, 2)) * STRENGTH).astype("float32")
    pairs[name] = (a, b)
build_ggla(pathlib.Path(given["--lora-out"]), pairs, rank=2, alpha=2)
print("train_opt_callback: iter= 1 sample=1/1 loss=0.5", flush=True)
"""
_NEW = """
from ollama_forge.gguf.reader import open_gguf
source = pathlib.Path(given["--model"])
with open_gguf(source) as base:
    assert {tensor.type.name for tensor in base.tensors.values()} == {"F32"}
assert given["-c"] == given["-b"] == given["-ub"]
content = bytearray(source.read_bytes())
content[-400:] = bytes(400)
pathlib.Path(given["--output"]).write_bytes(content)
"""
_AXOLOTL = """
import yaml
from tiny_adapters import build_adapter
assert sys.argv[1] == "train"
config = yaml.safe_load(pathlib.Path(sys.argv[2]).read_text())
(data,) = config["datasets"]
rows = [json.loads(line) for line in pathlib.Path(data["path"]).read_text().splitlines()]
assert all(row[data["field_messages"]] for row in rows)
build_adapter(pathlib.Path(config["base_model"]), pathlib.Path(config["output_dir"]), r=config["lora_r"],
              lora_alpha=config["lora_alpha"], target_modules=["q_proj", "v_proj"], spread=0.5)
print("trained", flush=True)
"""
_UNSLOTH = '''
"""The two calls of Unsloth that the script makes, over transformers and peft."""
import json, os, pathlib
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, get_peft_model

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit):
        assert not load_in_4bit
        return AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, bias, use_gradient_checkpointing, random_state,
                       target_modules=("q_proj", "v_proj")):
        config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias,
                            target_modules=list(target_modules), task_type="CAUSAL_LM")
        return get_peft_model(model, config)
'''


def write_program(folder: Path, name: str, body: str, *, help_text: str = "") -> Path:
    """An executable script `name` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(SCRIPT_START + _START.format(tests=str(TESTS), help=help_text) + body)
    path.chmod(0o755)
    return path


def write_old_finetune(
    folder: Path, *, targets: tuple[str, ...] = ("blk.0.attn_q.weight",), strength: float = 0.3, help_text: str = ""
) -> Path:
    """llama.cpp's finetune of 2023-2024: trains a LoRA, writes ggla."""
    body = f"TARGETS = {targets!r}\nSTRENGTH = {strength!r}\n{_OLD}"
    return write_program(folder, "finetune", body, help_text=help_text or HELP_OLD)


def write_new_finetune(folder: Path) -> Path:
    """Today's llama-finetune: trains all weights of a float32 GGUF."""
    return write_program(folder, "llama-finetune", _NEW, help_text=HELP_NEW)


def write_axolotl(folder: Path) -> Path:
    """`axolotl train CONFIG`."""
    return write_program(folder, "axolotl", _AXOLOTL)


def write_unsloth(folder: Path) -> Path:
    """A package `unsloth` to be found by PYTHONPATH."""
    package = folder / "unsloth"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_UNSLOTH)
    return folder


def argv_of(folder: Path) -> list[str]:
    """What the program was called with, without its own name."""
    argv: list[str] = json.loads((folder / "argv.json").read_text())
    return argv[1:]


def environment_of(folder: Path) -> dict[str, Any]:
    """What the program saw."""
    seen: dict[str, Any] = json.loads((folder / "env.json").read_text())
    return seen

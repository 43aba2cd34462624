"""The command line: a table of names, and the one place where an error becomes words and an exit code.

Nothing heavy is imported here: a command's module is imported when it is called, so `--help` stays fast.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from ollama_forge.cli.interrupts import interruptible
from ollama_forge.errors import ForgeError

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "begin": {
        "demo": ("demo", "See the whole way once: import, quantize, land, customise, run."),
        "start": ("quickstart", "A small current model, chosen for this machine, in Ollama: one command."),
        "quickstart": ("quickstart", "The same as start."),
        "auto": ("auto", "Whatever you have - recipe, GGUF, folder, repo, model, adapter: the right thing is done."),
        "check": ("check", "What is here: engine, store, server, extras, disk; and the next step for each."),
        "doctor": ("doctor", "A deep look at all that is here; mends what a command can mend, with --fix."),
        "wizard": ("wizard", "One sitting: choose a model, a name and a job; see whether it fits; run it."),
        "setup-llama-cpp": ("setup_llama_cpp", "llama.cpp's own programs, built from a pinned tag; never needed."),
    },
    "get": {
        "fetch": ("fetch", "A GGUF of the Hugging Face Hub becomes a model in Ollama: the best that fits, verified."),
        "import": ("import_model", "A Hugging Face folder or repo becomes a quantized model in Ollama, in one pass."),
        "convert": ("convert", "A Hugging Face folder becomes a GGUF file; or a GGUF file becomes an Ollama model."),
        "fetch-adapter": ("fetch_adapter", "A LoRA of the Hugging Face Hub, on a base of yours, in Ollama."),
        "hf-cache": ("hf_cache", "What the Hugging Face cache holds, and how to make room in it."),
        "adapters": (
            "adapters",
            "Find a LoRA (search, recommend), see whether it fits (check), change its format (convert).",
        ),
    },
    "make": {
        "create-from-base": (
            "create_from_base",
            "A new model from one you have: prompt, parameters, template, adapter.",
        ),
        "build": ("build", "One file says what the model is; only what is not done yet is done."),
        "validate-recipe": ("validate_recipe", "Everything that is wrong with a recipe, each with its line."),
        "plan": ("plan", "What a command would do, with disk, memory and time; kept in a file, and run from it."),
        "merge": ("merge", "Merge adapters into a model, back into the same quantization."),
        "quantize": ("quantize", "Make a GGUF or an Ollama model smaller, equal to llama-quantize's result."),
        "imatrix": ("imatrix", "Which weights matter on a text of yours, so that few bits cost less."),
    },
    "train": {
        "finetune": ("finetune", "Fine-tune the model that Ollama runs: data in, a trained and checked model out."),
        "train-run": ("finetune", "The same as finetune."),
        "retrain": ("retrain", "A base and a trained adapter become an Ollama model, as a layer or merged."),
        "train-resolve-base": (
            "train_resolve_base",
            "The weights behind a name, whether they can be trained, and where they come from.",
        ),
        "train": ("train", "The same as finetune; or with --write-script a bash script that does it step by step."),
        "train-data": ("train_data", "A sample of training data to begin with; what your data is like to a model."),
        "validate-training-data": ("validate_training_data", "Is every line fit to train on?"),
        "prepare-training-data": ("prepare_training_data", "Training data in the form that another trainer takes."),
        "convert-training-data-format": ("convert_training_data_format", "Training data: Alpaca to messages and back."),
    },
    "edit": {
        "downsize": ("downsize", "A smaller model from a larger one: prune, and heal by distillation."),
        "abliterate": (
            "abliterate",
            "Take a direction, such as that of refusals, out of a model; and measure what is left.",
        ),
    },
    "look": {
        "list": ("list_models", "Models in Ollama's store."),
        "show": ("show", "What a model is: family, sizes, quantization mix, context, template, parameters."),
        "run": ("run", "Ask a model once, or chat with it in the terminal; no server needed."),
        "measure": ("measure", "What a step cost: perplexity and KL divergence of one model beside another."),
        "verify": ("verify", "Re-hash blobs, check manifests, list orphans and what is missing."),
        "export": ("export", "Take a model out of Ollama's store: a GGUF file, or a folder for transformers."),
    },
    "keep": {
        "rm": ("rm", "Take a model out of Ollama's store, as `ollama rm` does; no server needed."),
        "registry": ("registry", "Every model known by what it is, where it came from, and what it is for."),
    },
}
"""Group -> command -> (module under `ollama_forge.cli`, one line of help)."""

_FLAT = {name: row for group in COMMANDS.values() for name, row in group.items()}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps, and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_FLAT)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _FLAT:
            return None
        module = importlib.import_module(f"ollama_forge.cli.{_FLAT[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _FLAT and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], _FLAT, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " `ollama-forge --help` lists them all."
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in COMMANDS.items():
            with formatter.section(title.capitalize()):
                formatter.write_dl([(name, words) for name, (_, words) in group.items()])


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import importlib.metadata  # a third of the time that --help takes

        click.echo(f"ollama-forge {importlib.metadata.version('ollama-forge')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: ollama-forge demo",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Version.")
def root() -> None:
    """Take any model you have, make it the one you want, and land it in Ollama."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    prog = "ollama-forge"
    try:
        with interruptible():
            code = root.main(args=args, prog_name=prog, standalone_mode=False)
    except ForgeError as error:
        _print_error(error.kind, error.what, error.why, error.next, as_json=as_json)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.UsageError as error:
        _print_error("usage", error.format_message(), "", _usage_hint(error.ctx, prog), as_json=as_json)
        return 2
    except click.ClickException as error:
        _print_error("error", error.format_message(), "", "", as_json=as_json)
        return 1
    except (KeyboardInterrupt, click.Abort):
        _print_error(
            "interrupted",
            "Interrupted.",
            "Nothing half written is left under a final name.",
            "Run the same command again to go on.",
            as_json=as_json,
        )
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return code if isinstance(code, int) else 0


def _usage_hint(context: click.Context | None, prog: str) -> str:
    """The command's own first example, and where the rest is."""
    if context is None or isinstance(context.command, click.Group):
        return f"{context.command_path if context else prog} --help"
    epilog = context.command.epilog or ""
    example = epilog.partition("|")[0].partition("   (")[0].partition(":")[2].strip()
    more = f"{context.command_path} --help"
    return f"{example}   (all options: {more})" if example.startswith(prog) else more


def _print_error(kind: str, what: str, why: str, next_step: str, *, as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps({"error": {"kind": kind, "what": what, "why": why, "next": next_step}}))
        return
    click.secho(f"✗ {what}", fg="red", err=True)
    if why:
        click.echo(f"  why:  {why}", err=True)
    if next_step:
        click.echo(f"  next: {next_step}", err=True)

"""The command `hrt`: one file a command. Only the standard library is imported until a command runs, so that help is
printed at once; importing `hf_residual_transformer` would import torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType

from . import compress, distill, evaluate, export, finetune, push, report
from .options import expand, explain, no_empty_folder, parse

COMMANDS: dict[str, ModuleType] = {
    "compress": compress,
    "distill": distill,
    "finetune": finetune,
    "evaluate": evaluate,
    "export": export,
    "push": push,
    "report": report,
}
DESCRIPTION = """Makes trained speech models smaller, and trains and measures the result.

    hrt compress openai/whisper-base --audio my-recordings --out compact
    hrt evaluate compact --audio my-recordings --split test --language en
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status, which is 2 for what the user can correct."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        overview_parser().parse_args(words or ["--help"])
        return 0
    name, *words = words
    parser = command_parser(name)
    try:
        args = parse(COMMANDS[name], parser, expand(parser, words))
        with no_empty_folder(args):
            COMMANDS[name].run(args)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HRT_DEBUG") == "1":
            raise
        print(f"hrt {name}: error: {explain(error, words)}", file=sys.stderr)
        return 2
    return 0


def overview_parser() -> argparse.ArgumentParser:
    """The parser of `hrt` without a command."""
    parser = argparse.ArgumentParser(
        prog="hrt",
        description=DESCRIPTION,
        epilog="`hrt COMMAND --help` shows the options of a command. HRT_DEBUG=1 shows where an error arises.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        commands.add_parser(name, help=module.HELP, add_help=False)
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with all options that are not the Trainer's."""
    module = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"hrt {name}",
        usage=module.USAGE,
        description=module.__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=34),
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser

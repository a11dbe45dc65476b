"""Prints the sizes of a compact model:

    hrt report compact

Its bytes and parameters are compared with those of the dense model that it was made from.
"""

from __future__ import annotations

import argparse

HELP = "print the sizes of a compact model"
USAGE = "hrt report MODEL"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("model", metavar="MODEL", help="folder or id of a model as from `hrt compress`")


def run(args: argparse.Namespace) -> None:
    from hf_residual_transformer import size_report
    from hf_residual_transformer.api import load_compact

    print(size_report(load_compact(args.model)))

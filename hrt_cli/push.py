"""Uploads a compact model with its processor, its card and, if you like, its code to the Hugging Face Hub:

    hrt push compact my-name/whisper-base-compact --with-code --license mit --language en \\
        --evaluation results/evaluation.json

Log in first, with `hf auth login`. If the folder has a README.md, it is the card. Otherwise the card is made from
compression.json and the options below; without these options, a card that the repository has already stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "share a compact model on the Hub"
USAGE = "hrt push MODEL ID [options]"
REPORT = "compression.json"
CARD_OPTIONS = ("base_model", "license", "language", "datasets", "evaluation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("model", metavar="MODEL", help="folder of a model as from `hrt compress`")
    what.add_argument("repo_id", metavar="ID", help="such as my-name/model")
    what.add_argument(
        "--with-code",
        action="store_true",
        help="add the code, so that trust_remote_code=True opens it without this package",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--private", action="store_true", help="make a new repository private")
    where.add_argument("--revision", metavar="NAME", help="branch to commit to (default: main)")
    where.add_argument("--create-pr", action="store_true", help="open a pull request")
    where.add_argument("--message", metavar="TEXT", help="of the commit")
    card = parser.add_argument_group("card")
    card.add_argument("--license", metavar="NAME", help="of the base model's weights, such as mit")
    card.add_argument("--language", nargs="+", metavar="CODE", help="languages that it was measured on")
    card.add_argument("--evaluation", metavar="FILE", help="evaluation.json of `hrt evaluate` on this model")
    card.add_argument(
        "--base-model", metavar="ID", help="(default: what compression.json names, unless a folder)"
    )
    card.add_argument("--datasets", nargs="+", metavar="ID", help="data sets on the Hub that it learnt from")


def run(args: argparse.Namespace) -> None:
    from transformers import AutoProcessor

    from hf_residual_transformer.api import load_compact
    from hf_residual_transformer.hub import model_card, push

    folder = Path(args.model)
    card = folder / "README.md"
    given = [name for name in CARD_OPTIONS if getattr(args, name) is not None]
    if card.is_file() and given:
        raise ValueError(
            f"--{given[0].replace('_', '-')} must not be given where {card} is the card; edit or remove that file"
        )
    model = load_compact(folder)
    model.processor = AutoProcessor.from_pretrained(folder)
    if args.with_code:
        model.config.carry_code(True)  # a card says so
    report = folder / REPORT
    about = {} if card.is_file() else _about(args, report)
    made = card if card.is_file() else model_card(model, repo_id=args.repo_id, **about) if given else None
    info = push(
        model,
        args.repo_id,
        card=made,
        about=about,
        files=[report] if report.is_file() else [],
        private=True if args.private else None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    print(f"the model is at {info.pr_url or info.repo_url}")


def _about(args: argparse.Namespace, report: Path) -> dict[str, Any]:
    """What the options and the report of the compression say, for the card."""
    from hf_residual_transformer.hub import Figures

    names = (args.model, str(Path(args.model).resolve()), args.repo_id)
    known = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    data = known.get("data")
    of_report = None if known.get("model_is_path") else known.get("model")
    return {
        "base_model": args.base_model or of_report,
        "data": data and f"recordings of {data['dataset']}, split {data['split']}",
        "figures": args.evaluation and Figures.from_evaluation(args.evaluation, names),
        "details": known if "command" in known else None,
        "license": args.license,
        "language": args.language,
        "datasets": args.datasets,
    }

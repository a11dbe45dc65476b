"""The table of docs/families.md, written from the code: `python tests/family_table.py`."""

from __future__ import annotations

from hf_residual_transformer import classes
from hf_residual_transformer.families import FAMILIES, Family

NAMES = {
    "AutoModel": "base model",
    "AutoModelForSpeechSeq2Seq": "sequence to sequence",
    "AutoModelForCTC": "CTC",
    "AutoModelForRNNT": "RNN-T",
    "AutoModelForTDT": "TDT",
    "AutoModelForPreTraining": "pre-training",
    "AutoModelForAudioClassification": "audio classification",
    "AutoModelForAudioFrameClassification": "frame classification",
    "AutoModelForAudioXVector": "speaker vectors",
}


def shared_of(family: Family) -> str:
    """What becomes compact in each stack, in words."""
    found = []
    for stack in family.stacks:
        names = "attention" + (", positions" if any(block.positions for block in stack.blocks) else "")
        feed_forwards = sum(len(block.readers) == 1 and not block.memory for block in stack.blocks)
        convolutions = sum("pointwise_conv" in block.writer for block in stack.blocks)
        feed_forwards -= convolutions
        names += ", two feed-forwards" if feed_forwards == 2 else ", feed-forward"
        names += ", point-wise convolutions" if convolutions else ""
        found.append(f"{stack.name}: {names}")
    return "; ".join(found) + ("; token embedding" if family.decoder else "")


def table() -> list[str]:
    """The lines of the table."""
    lines = ["| `model_type` | Auto classes | matrices |", "|---|---|---|"]
    for family in FAMILIES.values():
        heads = ", ".join(NAMES[auto.__name__] for auto in classes.dense_names(family))
        lines.append(f"| `{family.name}` | {heads} | {shared_of(family)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))

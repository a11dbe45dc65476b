"""What the fuzzing suites share: random changes of bytes, and counts of what came of the cases."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from hf_residual_transformer.provenance import provenance

SEED = int(os.environ.get("HRT_FUZZ_SEED", "19"))
MANY = int(os.environ.get("HRT_FUZZ_CASES", "3000"))
SECONDS = 10  # of the CPU that a case may take; one that hangs takes longer


def changed(  # noqa: PLR0911
    random: random.Random, content: bytes, limit: int | None = None
) -> tuple[str, bytes]:
    """One change, its name, and the result; `limit` is the number of first bytes that may change in place."""
    kind = random.choice(("cut", "flip", "byte", "four bytes", "delete", "insert", "double", "append"))
    if limit is not None and kind in ("delete", "insert", "double"):
        kind = "cut"
    position = random.randrange(min(limit or len(content), len(content)))
    if kind == "cut":
        return kind, content[: random.randrange(len(content))]
    if kind == "flip":
        return kind, splice(content, position, bytes([content[position] ^ 1 << random.randrange(8)]))
    if kind == "byte":
        return kind, splice(
            content, position, bytes([random.choice((0, 0x22, 0x2C, 0x7F, 0x80, 0xFF, 10, 9))])
        )
    if kind == "four bytes":
        position = min(position, (limit or len(content)) - 4)
        value = random.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, random.randrange(2**32)))
        return kind, splice(content, position, value.to_bytes(4, random.choice(("little", "big"))))[
            : len(content)
        ]
    length = random.randrange(1, 64)
    part = content[position : position + length]
    if kind == "delete":
        return kind, content[:position] + content[position + length :]
    if kind == "insert":
        return kind, content[:position] + random.randbytes(length) + content[position:]
    if kind == "double":
        return kind, content[:position] + part + content[position:]
    return kind, content + random.randbytes(length)


def splice(content: bytes, position: int, new: bytes) -> bytes:
    return content[:position] + new + content[position + len(new) :]


class Counts:
    """What came of the cases of one kind of input, and every case that must not be."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest = 0.0

    def note(self, outcome: str, case: str, seconds: float, *, fault: bool = False) -> None:
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, seconds)
        if fault or seconds > SECONDS:
            self.faults.append(f"{case}: {outcome}, {seconds:.1f} s")


def write_results(variable: str, counts: dict[str, Counts]) -> None:
    """Writes the counts into the file that an environment variable names, and fails if a case must not be."""
    report = {
        name: {**found.outcomes, "slowest_seconds": round(found.slowest, 2)}
        for name, found in sorted(counts.items())
    }
    faults = [fault for found in counts.values() for fault in found.faults]
    if path := os.environ.get(variable):
        cases = sum(sum(found.outcomes.values()) for found in counts.values())
        result = {"seed": SEED, "cases": cases, "faults": len(faults), "outcomes": report, **provenance()}
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1), file=sys.stderr)
    assert not faults, "\n".join(faults)


def table_of(path: Path) -> str:
    """The counts of a file of results as a table in Markdown, as docs/fuzzing.md has it."""
    outcomes: dict[str, Counter[str]] = {}
    for kind, found in json.loads(path.read_text(encoding="utf-8"))["outcomes"].items():
        counts = outcomes.setdefault(kind, Counter())
        for name, number in found.items():
            counts["fault" if ":" in name or name.startswith("silently") else name] += number
    totals: Counter[str] = Counter()
    for found in outcomes.values():
        totals.update({name: number for name, number in found.items() if name != "slowest_seconds"})
    columns = [name for name, _ in totals.most_common()]
    lines = ["| input | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {kind} | " + " | ".join(str(found.get(name, 0)) for name in columns) + " |"
        for kind, found in sorted(outcomes.items())
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_of(Path(sys.argv[1])))

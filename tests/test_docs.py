"""The Python code of README.md, of the guide and of the notebook runs, and every link of the docs leads to a file.

The code runs on a tiny random Whisper instead of `openai/whisper-base`, and on clips of noise instead of `sample`.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
from conftest import SAMPLING_RATE, speech
from fuzz_counts import table_of

ROOT = Path(__file__).parents[1]
REPOSITORY = re.compile(
    r"https://(?:github\.com/hf-residual-transformer/hf-residual-transformer/(?:blob|tree)/main"
    r"|raw\.githubusercontent\.com/hf-residual-transformer/hf-residual-transformer/main)/"
)
# A wheel's tests run in a folder that has no documents.
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="documents are not here")


def python_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def tiny_sample(tmp_path_factory) -> Path:
    """Eight clips to train on and two to test on, shorter than the tiny model's window of one second."""
    folder = tmp_path_factory.mktemp("recordings")
    names = [f"audio/train/en/{i}.ogg" for i in range(8)]
    names += [f"audio/test/en/{name}.ogg" for name in ("agent-incorrect", "added")]
    rows = []
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, speech(0.8, seed).numpy(), SAMPLING_RATE, format="OGG", subtype="VORBIS")
        rows.append({"file_name": name, "text": "Added.", "language": "en", "split": name.split("/")[1]})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_the_code_of_a_document_runs(document, dense_whisper, tiny_sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(document)
    assert blocks
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        code = block.replace('"openai/whisper-base"', repr(str(dense_whisper)))
        code = re.sub(r'"sample(/[^"]*)?"', lambda found: repr(f"{tiny_sample}{found[1] or ''}"), code)
        code = re.sub(r"steps=\d+", "steps=2", code)
        exec(compile(code, f"{document}, block {number}", "exec"), namespace)
    assert (tmp_path / "compact" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.fixture
def heard(monkeypatch) -> list[tuple[int, int]]:
    """Samples and rate of what the notebook plays. IPython's player is replaced, since tests do without IPython."""
    played: list[tuple[int, int]] = []
    display = ModuleType("IPython.display")
    display.Audio = lambda samples, rate: played.append((len(samples), rate))
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return played


@pytest.mark.parametrize("start_in", [".", "examples"])
def test_the_cells_of_the_notebook_run(
    start_in, dense_whisper, tiny_sample, tmp_path, monkeypatch, capsys, heard
):
    (tmp_path / "sample").symlink_to(tiny_sample, target_is_directory=True)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / start_in)
    cells = json.loads((ROOT / "examples" / "compress_whisper.ipynb").read_text())["cells"]
    namespace: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace('"openai/whisper-tiny.en"', repr(str(dense_whisper)))
            exec(compile(code, f"the notebook, cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    for part in ("bytes when saved", "relative error of the outputs", "% WER, compact", " MB\n"):
        assert part in printed
    assert namespace["model_id"] == str(dense_whisper)
    assert heard == [(int(0.8 * SAMPLING_RATE), SAMPLING_RATE)]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")
)])  # fmt: skip
def test_links_of_a_document_lead_to_files(document):
    """In a checkout, files that are committed or added: others would be missing in a clone."""
    tracked = None
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
        tracked = set(listed.stdout.splitlines()) or None  # git may not trust the folder
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if REPOSITORY.match(path):
            linked = ROOT / REPOSITORY.sub("", path)
        elif "://" in path or not path:
            continue
        else:
            linked = (ROOT / document).parent / path
        assert linked.exists(), f"{document} links to {target}"
        if linked.is_file() and tracked is not None:
            name = linked.resolve().relative_to(ROOT.resolve()).as_posix()
            assert name in tracked, f"{document} links to {target}, which git does not have"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("fuzz-*.json")), ids=str)
def test_the_counts_of_fuzzing_are_those_of_its_results(path):
    assert table_of(path) in (ROOT / "docs" / "fuzzing.md").read_text()

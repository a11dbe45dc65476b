"""Writes speech to train on without the Hub, for `research/paper.py --scale acted`: human telephone prompts and the
acted dialogue of two games, all from Debian, and for training alone also synthetic speech: strings of words
(`sample/words`) and sentences.

    apt-get install ffmpeg asterisk-core-sounds-{en,es,fr,it,ru}{,-g722} fillets-ng-data{,-cs,-nl} \
        flight-of-the-amazon-queen wordnet-base espeak-ng
    python research/make_sentences.py --out outputs/acted/sentences
    python research/make_paper_data.py --out outputs/acted

The sentences are those that espeak-ng speaks, eight hours to recognise and ten to translate. They are left out if they
are not there.
`recognition.csv` has English with its transcripts. `translation.csv` has Spanish, French, Italian, Russian, Czech and
Dutch with English text. Texts are in lower case without punctuation. The splits are those of `make_sample.py` and
`make_actors.py`: characters of the actors' game and texts of prompts are in one split each. Validation and test are
human speech alone.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import make_actors
import make_sample
import soundfile
from make_sample import Clip
from words import SAMPLING_RATE, WordStrings

SYNTHETIC_SECONDS = 3.0
COLUMNS = ["file_name", "text", "split", "duration"]


def spell(text: str) -> str:
    """The text in lower case, with letters, digits and apostrophes alone."""
    return " ".join(
        re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower())
    )


def write_synthetic(folder: Path, number: int) -> Iterator[Clip]:
    """Writes so many strings of English words, and so many Spanish sentences with their translation, by the voices that
    are for training.
    """
    for language in ("en", "es"):
        strings = WordStrings(language, "train", number, SYNTHETIC_SECONDS)
        (folder / language).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            row = strings[index]
            path = folder / language / f"{row['audio']['path']}.flac"
            soundfile.write(path, row["audio"]["array"], SAMPLING_RATE)
            text, english = ("", row["text"]) if language == "es" else (row["text"], "")
            speaker = path.name.partition("-")[0]
            yield Clip(path, path.name, text, language, speaker, SYNTHETIC_SECONDS, english, "train")


def read_sentences(folder: Path) -> Iterator[Clip]:
    """The sentences for training that `make_sentences.py` has written; none if there is no such folder."""
    for task, language in (("recognition", "en"), ("translation", "es")) if folder.is_dir() else ():
        with open(folder / f"{task}.csv", encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table):
                if row["split"] == "train":
                    path = folder / row["file_name"]
                    text, english = (row["text"], "") if language == "en" else ("", row["text"])
                    seconds = float(row["duration"])
                    yield Clip(path, path.name, text, language, row["voice"], seconds, english, "train")


def write_tasks(folder: Path, clips: Iterable[Clip]) -> dict[str, int]:
    """Writes a table of each task beside the folders of the clips' audio; returns their numbers of clips.

    Raises:
        ValueError: for a task without clips.
    """
    rows: dict[str, list[dict[str, str]]] = {"recognition": [], "translation": []}
    for clip in clips:
        english = clip.language == "en"
        text = spell(clip.text if english else clip.translation)
        if text:
            row = {"file_name": clip.source.relative_to(folder).as_posix(), "text": text}
            row |= {"split": clip.split, "duration": f"{clip.duration:.2f}"}
            rows["recognition" if english else "translation"].append(row)
    for task, found in rows.items():
        if not found:
            raise ValueError(f"{task} must have clips, got none")
        with open(folder / f"{task}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    return {task: len(found) for task, found in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, without audio yet")
    parser.add_argument(
        "--synthetic", type=int, default=2000, help="synthetic strings to train on, for each task; 0 for none"
    )
    args = parser.parse_args()
    out = args.out
    clips = [
        *write_synthetic(out / "synthetic", args.synthetic),
        *read_sentences(out / "sentences"),
        *make_actors.write_actors(out / "actors")[0],
        *make_sample.write_full(out / "prompts"),
    ]
    print(write_tasks(out, clips))


if __name__ == "__main__":
    main()

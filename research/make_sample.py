"""Builds the speech sample in `sample/` from recorded telephone prompts that Debian packages, six minutes of acted
English by the characters of a game, to calibrate on more than one English voice, and a few sentences of an audiobook,
whose speaker is in no other split. Audio that is there already is kept.

    apt-get install ffmpeg asterisk-core-sounds-{en,es,fr,it,ru}{,-g722} pocketsphinx-testdata \
        flight-of-the-amazon-queen
    python research/make_sample.py

`--full OUT` writes all prompts of the five languages instead, and the Czech and Dutch dialogue of a game,
with English translations; about five hours of speech, for research outside the repository:

    apt-get install fillets-ng-data fillets-ng-data-cs fillets-ng-data-nl
    python research/make_sample.py --full /tmp/speech

`--actors OUT` writes the English dialogue of another game, without transcripts: four hours in dozens of voices, to
calibrate and distil on more than one:

    apt-get install flight-of-the-amazon-queen
    python research/make_sample.py --actors /tmp/actors
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import re
import struct
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

PROMPTS = Path("/usr/share/asterisk/sounds")
DOCUMENTATION = Path("/usr/share/doc")
AUDIOBOOK = Path("/usr/share/pocketsphinx/test/data/librivox")
GAME = Path("/usr/share/games/fillets-ng")
ADVENTURE = Path("/usr/share/scummvm/flight-of-the-amazon-queen/queen.1c")
VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
SOUND_EFFECTS = {"beep", "beeperr", "confbridge-join", "confbridge-leave", "tt-monkeys"}
SOUND_EFFECTS |= {"ascending-2tone", "descending-2tone"}

SAMPLING_RATE = 16_000
G722_BYTES_PER_SECOND = 8_000
OPUS = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.92}  # here about 28 kbit/s
FLAC = {"format": "FLAC", "subtype": "PCM_16"}
MIN_SECONDS, MAX_SECONDS = 0.6, 28.0
MIN_ACTED_SECONDS = 1.5  # shorter ones are mostly cries
MAX_CHARACTERS_PER_SECOND = 18.5  # letters and digits; faster than anyone speaks here, so the text differs
OTHER_TRAIN_SECONDS = 200.0
ACTED_SECONDS = 30.0  # of each character, at most
SHORTEST_ACTED, LONGEST_ACTED = 2.0, 12.0  # seconds of a clip
SPANISH_TEST_CLIPS = 25
SPLITS = ("train", "validation", "test", "test_other")
COLUMNS = ["file_name", "text", "language", "split", "duration", "speaker"]
README = """# Speech sample

Telephone prompts of the Asterisk PBX, read by one professional speaker a language: human speech for the
examples, the tests and the measurements of this repository. 16 kHz mono Ogg Opus, which `soundfile` reads;
the transcripts are in `metadata.csv`, whose columns are the file's name, text, language, split, duration in
seconds and speaker. The split `train` also has {acted} clips of acted English, `queen_*`, {acted_minutes:.1f} minutes
by {characters} characters of a game, so that a model that is calibrated on it hears more than one English voice. The
split `test_other` has {audiobook} sentences of a novel instead, read by a volunteer of LibriVox: a speaker and a style
that are in no other split.

{table}

English prompts are complete. The other languages have about {minutes:.1f} minutes of training clips each; Spanish
also has {spanish} test clips, of three words or more. The split is by a hash of the prompt's name: a prompt
is in the same split in every language, and so are prompts with the same text. Stock phrases such as
"followed by the pound key" still occur in every split, and some phrases of different splits differ by a word
or two.

Most Spanish transcripts lack their accents ("numero", "contrasena"): compare them without diacritics.

Of the prompts that have both a text and a recording, these were left out, by the rule that met them first:

{faults}

No test clip was left out because a model misheard it. The Spanish rule rests on `openai/whisper-base`
hearing "número" in such clips, and on recordings too long for their texts.

## Source and licence
Debian's `asterisk-core-sounds-{{en,es,fr,it,ru}}` (texts) and `asterisk-core-sounds-{{en,es,fr,it,ru}}-g722`
(audio), version {version}, decoded from G.722 and encoded anew as Opus by `research/make_sample.py`, whose
docstring holds the commands. Of the texts, only superfluous spaces and the dots that mark an unfinished
phrase were removed. A build keeps the audio that is there. One from nothing has the same clips and texts; the bytes of
an Ogg file differ by its random serial number.

**The acted clips are a modified version** of parts of "Flight of the Amazon Queen", (C) 1995 John Passfield and Steven
Stamatiadis, from Debian's `flight-of-the-amazon-queen`, version {game}: single lines of the dialogue, in 16 kHz and
encoded anew as Opus, with the texts that the game shows. They are of characters whom `research/make_actors.py` has in
its split `train`; the others are left for tests. Each has at most {seconds:.0f} seconds, in clips of {shortest:.0f} to
{longest:.0f}, chosen by a hash of the name. An actor may have lent the voice to several characters.

The sentences of the novel are from Debian's `pocketsphinx-testdata`, with the transcripts that it has.

| language | recorded by | licence |
|---|---|---|
| en, es | Allison Smith (theivrvoice.com), 2003-2010; financed by Digium, Inc. | CC BY-SA 3.0 |
| fr | June Wallack (junewallack.com), 2006-2008; translated by Clod Patry, Kristopher Lalletti and June \
Wallack; financed by Digium, Inc., Unlimitel and BGM Informatique | CC BY-SA 3.0 |
| it | Carlo Flora (carloflora.com, segreterietelefoniche.it), 2012; translated by Silvia Petrin | CC BY 3.0 |
| ru | provided by Maxim Topal (ivrvoice.ru), 2010 | CC BY 3.0 |
| en, `queen_*` | the actors of "Flight of the Amazon Queen" | that of the game: it may be given away with its readme, \
and not be sold by itself |
| en, split `test_other` | a volunteer of LibriVox (librivox.org), "Sense and Sensibility", chapter 1 | public domain |

`LICENSE` is the copyright file of the packages of prompts, and the game's readme, with the full terms. They hold for
this folder, not for the code.
"""
GAME_NOTICE = """
================================================================================

Files: audio/train/en/queen_*
These files are a modified version of parts of "Flight of the Amazon Queen":
single lines of its dialogue, encoded anew. The rest of this file is the game's
readme, with its licence, as it is distributed.

"""


@dataclass
class Clip:
    """A recording with its transcript; `duration` is in seconds."""

    source: Path
    name: str
    text: str
    language: str
    speaker: str
    duration: float
    translation: str = ""
    split: str = ""

    @property
    def spoken(self) -> str:
        """The letters and digits of the text in lower case. Two texts are compared by them."""
        return " ".join(re.findall(r"[^\W_]+", self.text.lower()))


def read_prompts(language: str) -> list[Clip]:
    """Reads the telephone prompts of a language from lines `name: text`. English texts serve as translations."""
    folder = PROMPTS / VOICES[language]
    texts, english = read_prompt_texts(language), read_prompt_texts("en")
    clips = []
    for name, text in texts.items():
        source = folder / f"{name}.g722"
        if source.is_file():
            seconds = source.stat().st_size / G722_BYTES_PER_SECOND
            translation = english.get(name, "") if language != "en" else ""
            clips.append(Clip(source, name, text, language, folder.name, seconds, translation))
    return clips


def read_prompt_texts(language: str) -> dict[str, str]:
    """Reads names and texts of a language's prompts, without the names that have two texts."""
    path = DOCUMENTATION / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
    if not path.is_file() or not (PROMPTS / VOICES[language]).is_dir():
        raise FileNotFoundError(
            f"apt-get install asterisk-core-sounds-{language} asterisk-core-sounds-{language}-g722"
        )
    texts = defaultdict(set)
    with gzip.open(path, "rt", encoding="utf-8-sig") as lines:
        for line in lines:
            name, colon, text = line.partition(":")
            if colon and not line.startswith(";"):
                texts[name].add(clean(text))
    return {name: found.pop() for name, found in texts.items() if len(found) == 1}


def read_audiobook() -> list[Clip]:
    """Reads the sentences of a novel from lines `<s> text </s> (name)`. All are for testing."""
    path = AUDIOBOOK / "transcription"
    if not path.is_file():
        raise FileNotFoundError("apt-get install pocketsphinx-testdata")
    entries = re.findall(r"<s>(.+)</s> \((.+)\)", path.read_text(encoding="utf-8"))
    clips = []
    for text, name in entries:
        source = AUDIOBOOK / f"{name}.wav"
        seconds = soundfile.info(source).duration
        clips.append(Clip(source, name, clean(text), "en", "en_librivox", seconds, split="test_other"))
    return clips


def read_actors(folder: Path) -> list[Clip]:
    """Writes the dialogue of the adventure game to the folder, and selects some of its training clips.

    Each character has clips in random order, up to `ACTED_SECONDS`.
    """
    from make_actors import write_actors  # which imports this module

    selected: list[Clip] = []
    seconds: defaultdict[str, float] = defaultdict(float)
    for clip in sorted(write_actors(folder)[0], key=lambda clip: hash_of(f"queen {clip.name}")):
        fits = seconds[clip.speaker] + clip.duration <= ACTED_SECONDS
        if clip.split == "train" and SHORTEST_ACTED <= clip.duration <= LONGEST_ACTED and fits:
            speaker = f"queen_{clip.speaker}"
            selected.append(replace(clip, name=f"{speaker}_{clip.name}", speaker=speaker))
            seconds[clip.speaker] += clip.duration
    return selected


def read_game(language: str) -> list[Clip]:
    """Reads the game's dialogue in `cs` or `nl` from `dialogId(name, font, English)` and `dialogStr(text)`."""
    string = r'"((?:[^"\\]|\\.)*)"'
    entry = re.compile(rf"dialogId\({string},\s*{string},\s*{string}\)\s*dialogStr\({string}\)")
    scripts = sorted(GAME.glob(f"script/*/*dialogs_{language}.lua"))
    if not scripts or not any(GAME.glob(f"sound/*/{language}")):
        raise FileNotFoundError(f"apt-get install fillets-ng-data fillets-ng-data-{language}")
    clips = []
    for script in scripts:
        level = script.parent.name
        for name, font, english, text in entry.findall(script.read_text(encoding="utf-8")):
            source = GAME / "sound" / level / language / f"{name}.ogg"
            if source.is_file():
                speaker = f"{language}_{font.removeprefix('font_')}"
                seconds = soundfile.info(source).duration
                clips.append(
                    Clip(source, f"{level}/{name}", clean(text), language, speaker, seconds, clean(english))
                )
    return clips


def read_adventure() -> dict[str, bytes]:
    """Reads the adventure's spoken lines, MP3 files by name, from its archive.

    The archive starts with "QTBL", 6 bytes of version, 2 bytes of platform, the kind of compression, and the number of
    entries. Each entry has a name, a disk, an offset and a size.
    """
    if not ADVENTURE.is_file():
        raise FileNotFoundError("apt-get install flight-of-the-amazon-queen")
    archive = ADVENTURE.read_bytes()
    header, entry = struct.Struct(">4s6s2sBH"), struct.Struct(">12sBII")
    magic, _, _, compression, number = header.unpack_from(archive)
    if (magic, compression) != (b"QTBL", 1):
        raise ValueError(f"{ADVENTURE} is not an archive with speech as MP3")
    lines = {}
    for index in range(number):
        field, _, offset, size = entry.unpack_from(archive, header.size + index * entry.size)
        name, _, suffix = field.rstrip(b"\0").decode("ascii").rpartition(".")
        if suffix == "SB" and "SSSS" not in name:  # those are no speech
            lines[name] = archive[offset : offset + size]
    return lines


def write_adventure(folder: Path) -> list[Clip]:
    """Writes the adventure's lines as they are, and `metadata.csv`; a fifth of the dialogues is for validation,
    whole but for some cut scenes.

    Raises:
        FileExistsError: the folder has audio already.
    """
    refuse_audio(folder)
    lines, clips = read_adventure(), []
    (folder / "audio").mkdir(parents=True)
    for name, mp3 in lines.items():
        seconds = soundfile.info(io.BytesIO(mp3)).duration
        if MIN_ACTED_SECONDS <= seconds <= MAX_SECONDS:
            source = folder / "audio" / f"{name}.mp3"
            source.write_bytes(mp3)
            dialogue = re.match(r"[A-Z]*\d?\d?", name)[0]  # type: ignore[index]  # of nothing, if need be
            split = "validation" if hash_of(dialogue) % 5 == 0 else "train"
            clips.append(Clip(source, name, "", "en", f"dialogue_{dialogue}", seconds, split=split))
    write_table(clips, folder, [column for column in COLUMNS if column != "text"])
    return clips


def clean(text: str) -> str:
    """Returns the text with single spaces, and without the dots that mark it as part of a longer phrase."""
    return " ".join(re.sub(r"\.{3,}|…", " ", text).split())


def find_fault(clip: Clip) -> str | None:
    """Says why the clip is not a pair of speech and transcript; None if it is one."""
    letters = len(clip.spoken.replace(" ", ""))
    rules = {
        "sound effect or silence": clip.name in SOUND_EFFECTS or clip.name.startswith("silence/"),
        "no transcript": letters == 0,
        "direction or unspoken symbol in the transcript": re.search(r"[\[\]()<>*#%\\]", clip.text),
        "Spanish 'marque 1', where the voice says 'marque el número 1'": (
            clip.language == "es" and re.search(r"\bmarque [1-9]", clip.text, re.IGNORECASE)
        ),
        f"shorter than {MIN_SECONDS} s or longer than {MAX_SECONDS:.0f} s": (
            not MIN_SECONDS <= clip.duration <= MAX_SECONDS
        ),
        "transcript too long for the recording": letters > MAX_CHARACTERS_PER_SECOND * clip.duration,
    }
    return next((fault for fault, applies in rules.items() if applies), None)


def assign_splits(clips: Iterable[Clip]) -> None:
    """Puts about 60 % of the names in train, 15 % in validation and 25 % in test, by their hash.

    A name goes with the same name in every language, and with each name that has the same text in some
    language, so that no split holds a text of another.
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    clips = list(clips)
    for clip in clips:
        first, second = sorted((find(f"name {clip.name}"), find(f"text {clip.language} {clip.spoken}")))
        parent[second] = first
    for clip in clips:
        draw = hash_of(find(f"name {clip.name}")) % 100
        clip.split = "train" if draw < 60 else "validation" if draw < 75 else "test"


def hash_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def select_sample(clips: list[Clip]) -> list[Clip]:
    """Selects all English clips, some minutes of training clips in each other language, and some Spanish test clips."""
    selected = [clip for clip in clips if clip.language == "en"]
    shuffled = sorted(clips, key=lambda clip: hash_of(f"{clip.language} {clip.name}"))
    for language in sorted(VOICES.keys() - {"en"}):
        seconds = 0.0
        for clip in shuffled:
            if clip.language == language and clip.split == "train" and seconds < OTHER_TRAIN_SECONDS:
                selected.append(clip)
                seconds += clip.duration
    spanish = [clip for clip in shuffled if clip.language == "es" and clip.split == "test"]
    phrases = [clip for clip in spanish if len(clip.spoken.split()) >= 3]
    return selected + phrases[:SPANISH_TEST_CLIPS]


def write_clips(clips: list[Clip], folder: Path, columns: list[str], coding: dict[str, Any]) -> list[Clip]:
    """Writes 16 kHz audio and `metadata.csv`, and returns the clips as written; `coding` is what `soundfile.write`
    takes. Audio that is there already is kept.

    Raises:
        RuntimeError: A file doesn't decode to its source's length.
    """
    encoded = []
    for clip in clips:
        name = f"{clip.name.replace('/', '_')}.{coding['format'].lower()}"
        target = folder / "audio" / clip.split / clip.language / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            soundfile.write(target, decode(clip.source), SAMPLING_RATE, **coding)
        written = soundfile.info(target)
        if written.samplerate != SAMPLING_RATE or abs(written.duration - clip.duration) > 0.05:
            raise RuntimeError(f"{target} has {written.duration:.2f} s, {clip.source} {clip.duration:.2f} s")
        encoded.append(replace(clip, source=target))
    write_table(encoded, folder, columns)
    return encoded


def refuse_audio(folder: Path) -> None:
    """Raises FileExistsError if the folder already has audio."""
    if (folder / "audio").exists():
        raise FileExistsError(f"{folder / 'audio'} exists; delete it to build it anew")


def write_table(clips: list[Clip], folder: Path, columns: list[str]) -> None:
    """Writes `metadata.csv` for the audio in the folder."""
    rows = [
        vars(clip)
        | {"file_name": clip.source.relative_to(folder).as_posix(), "duration": f"{clip.duration:.2f}"}
        for clip in clips
    ]
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=itemgetter("file_name")))


def decode(source: Path) -> np.ndarray:
    """Decodes the file into 16-bit mono samples of shape (num_samples,) at 16 kHz."""
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        str(source),
        "-f",
        "s16le",
        "-ac",
        "1",
        "-ar",
        str(SAMPLING_RATE),
        "-",
    ]
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.int16)


def count_table(clips: list[Clip]) -> str:
    """The number of clips and minutes of each language and split, as a Markdown table."""
    rows = ["| language | split | clips | minutes |", "|---|---|---:|---:|"]
    for language in sorted({clip.language for clip in clips}):
        for split in SPLITS:
            durations = [clip.duration for clip in clips if (clip.language, clip.split) == (language, split)]
            if durations:
                rows.append(f"| {language} | {split} | {len(durations)} | {sum(durations) / 60:.1f} |")
    return "\n".join(rows)


def write_readme(clips: list[Clip], faults: Counter[str], folder: Path) -> None:
    """Writes the sample's description, and the packages' copyright file and the game's readme as its licence."""
    prompts, game = "asterisk-core-sounds-en", "flight-of-the-amazon-queen"
    acted = [clip for clip in clips if clip.speaker.startswith("queen_")]
    text = README.format(
        version=versions_of(prompts, f"{prompts}-g722"),
        game=versions_of(game),
        table=count_table(clips),
        faults="\n".join(f"- {count}: {fault}" for fault, count in faults.most_common()),
        minutes=OTHER_TRAIN_SECONDS / 60,
        spanish=SPANISH_TEST_CLIPS,
        audiobook=sum(clip.split == "test_other" for clip in clips),
        acted=len(acted),
        acted_minutes=sum(clip.duration for clip in acted) / 60,
        characters=len({clip.speaker for clip in acted}),
        seconds=ACTED_SECONDS,
        shortest=SHORTEST_ACTED,
        longest=LONGEST_ACTED,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    licence = (DOCUMENTATION / prompts / "copyright").read_bytes()
    readme = gzip.decompress((DOCUMENTATION / game / "readme.txt.gz").read_bytes())
    (folder / "LICENSE").write_bytes(licence + GAME_NOTICE.encode() + readme)


def versions_of(*packages: str) -> str:
    """The versions of Debian's packages, each once."""
    command = ["dpkg-query", "--show", "--showformat", "${Version}\n", *packages]
    versions = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return " and ".join(sorted(set(versions)))


def write_full(folder: Path) -> list[Clip]:
    """Writes all prompts and the dialogue of a game, with translations; returns the clips as they are written.

    Raises:
        FileExistsError: the folder has audio already.
    """
    refuse_audio(folder)
    clips, faults = without_faults([*read_all_prompts(), *read_game("cs"), *read_game("nl")])
    print("\n".join(f"left out: {count}, {fault}" for fault, count in faults.most_common()))
    assign_splits(clips)
    return write_clips(clips, folder, [*COLUMNS, "translation"], FLAC)


def read_all_prompts() -> list[Clip]:
    """Reads the telephone prompts of all languages."""
    return [clip for language in VOICES for clip in read_prompts(language)]


def without_faults(clips: list[Clip]) -> tuple[list[Clip], Counter[str]]:
    """The clips that are pairs of speech and transcript, and how many others have which fault."""
    faults = Counter(fault for clip in clips if (fault := find_fault(clip)))
    return [clip for clip in clips if find_fault(clip) is None], faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "sample")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--full", type=Path, metavar="OUT", help="write everything there instead of the sample"
    )
    instead.add_argument(
        "--actors", type=Path, metavar="OUT", help="write the English dialogue of a game there instead"
    )
    arguments = parser.parse_args()

    if arguments.actors:
        print(count_table(write_adventure(arguments.actors)))
        return

    if arguments.full:
        print(count_table(write_full(arguments.full)))
        return

    clips, faults = without_faults(read_all_prompts())
    assign_splits(clips)
    clips = select_sample(clips) + read_audiobook()
    with tempfile.TemporaryDirectory() as actors:
        clips += read_actors(Path(actors))
        write_clips(clips, arguments.out, COLUMNS, OPUS)
    write_readme(clips, faults, arguments.out)
    print(count_table(clips))
    print("\n".join(f"left out: {count}, {fault}" for fault, count in faults.most_common()))


if __name__ == "__main__":
    main()

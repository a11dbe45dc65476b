"""The words of `sample/words/`, and the random strings that they are joined into as they are read: English words to
recognise, and Spanish sentences to translate into English.

Item `index` of a split depends on the seed and on nothing else, so that every cell of a grid reads the same strings,
and a run that was stopped goes on with the strings that it would have read.
"""

from __future__ import annotations

import csv
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch.utils.data import Dataset

FOLDER = Path(__file__).resolve().parent.parent / "sample" / "words"
SAMPLING_RATE = 16_000
SPLITS = ("train", "validation", "test")
TRAINING_SPEEDS = (0.9, 1.0, 1.1)  # by resampling, so that pitch moves too
MOST_WORDS = 3  # of a string that is to be recognised
MOST_DRAWS = 1000  # of sentences until one fits
EARLY = 0.2  # the part of the training strings, from the first on, that are single words: aligning is learnt later
GAP_SECONDS = (0.0, 0.12)
NOISE_DECIBELS = (10.0, 40.0)  # of the speech over the noise

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go",
    "bed", "bird", "cat", "dog", "happy", "house", "tree", "wow", "learn", "follow",
)  # fmt: skip

# Spanish, with the English that it becomes.
VERBS = {"abre": "open", "cierra": "close", "busca": "find", "mira": "see"}
NUMBERS = {
    "dos": "two", "tres": "three", "cuatro": "four", "cinco": "five", "seis": "six", "siete": "seven", "ocho": "eight",
    "nueve": "nine",
}  # fmt: skip
# Whether a noun is feminine decides the form of its adjective.
NOUNS = {
    "libros": ("books", False), "perros": ("dogs", False), "coches": ("cars", False), "barcos": ("ships", False),
    "puertas": ("doors", True), "casas": ("houses", True), "cajas": ("boxes", True), "mesas": ("tables", True),
}  # fmt: skip
ADJECTIVES = {
    ("rojos", "rojas"): "red", ("blancos", "blancas"): "white", ("negros", "negras"): "black",
    ("nuevos", "nuevas"): "new", ("viejos", "viejas"): "old",
}  # fmt: skip
AND = {"y": "and"}
SENTENCE_WORDS = (*VERBS, *NUMBERS, *NOUNS, *(form for forms in ADJECTIVES for form in forms))


class WordStrings(Dataset):
    """Random strings of one split, by voices that no other split has, in noise.

    Args:
        language: "en" for words with their transcript, "es" for sentences with their translation.
        split: one of `SPLITS`.
        size: number of strings.
        seconds: the longest string; words that do not fit are left out, and sentences that do not fit are not drawn.
        seed: of the strings.
        words: how many of `WORDS` are joined, from the first; the first ten are the digits.
        speeds: of the training voices. The other splits have the voices as they are.
        voices_seed: shuffles the voices of all splits, of which each split then gets as many as it has in the table. By
            default each has those of the table.
        folder: as `research/make_words.py` writes it.

    Raises:
        ValueError: for a split that is not one of `SPLITS`, or that has no voices; by a string, for `seconds` in which
            no sentence fits.
    """

    def __init__(
        self,
        language: str,
        split: str,
        size: int,
        seconds: float,
        seed: int = 0,
        words: int = len(WORDS),
        speeds: Sequence[float] = TRAINING_SPEEDS,
        voices_seed: int | None = None,
        folder: Path = FOLDER,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
        self.language, self.split, self.size, self.seconds, self.seed = language, split, size, seconds, seed
        self.words = WORDS[:words]
        self.speeds = tuple(speeds) if split == "train" else (1.0,)
        self.noises = noises(SPLITS.index(split))
        self.voices: dict[str, dict[str, list[np.ndarray]]] = defaultdict(dict)
        for voice, word, audio in _read(folder, language, _voices(folder, language, voices_seed)[split]):
            self.voices[voice][word] = [_at_speed(audio, speed) for speed in self.speeds]
        if not self.voices:
            raise ValueError(f"`split` must have voices in {folder}, got none for {language!r} and {split!r}")

    def __len__(self) -> int:
        return self.size

    def voice(self, index: int) -> str:
        """The voice that speaks an item, which is the first that is drawn for it."""
        return list(self.voices)[self._draws(index).integers(len(self.voices))]

    def _draws(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = self._draws(index)
        voice = list(self.voices)[rng.integers(len(self.voices))]
        clips = self.voices[voice]
        for _ in range(MOST_DRAWS):
            words, text = self._words(rng, index)
            speed = rng.integers(len(self.speeds))
            audio = np.zeros(round(self.seconds * SAMPLING_RATE), np.float32)
            position, said = 0, 0
            for word in words:
                clip = clips[word][speed]
                position += round(rng.uniform(*GAP_SECONDS) * SAMPLING_RATE)
                fits = position + len(clip) <= len(audio)
                if not fits and self.language == "es":
                    said = -1  # a sentence is whole, or another one is drawn
                    break
                if not fits and said:
                    break
                kept = clip[: len(audio) - position]
                audio[position : position + len(kept)] = kept
                position += len(clip)
                said += 1
            if said > 0:
                break
        else:
            raise ValueError(
                f"`seconds` must be long enough for sentences, got {self.seconds}; none of {MOST_DRAWS} by {voice} "
                "fitted"
            )
        if self.language == "en":
            text = " ".join(words[:said])
        path = f"{voice}-{self.split}-{index}"
        array = in_noise(rng, audio, audio[audio != 0], self.noises)
        return {"audio": {"array": array, "sampling_rate": SAMPLING_RATE, "path": path}, "text": text}

    def _words(self, rng: np.random.Generator, index: int) -> tuple[list[str], str]:
        if self.language == "en":
            is_early = self.split == "train" and index < EARLY * self.size
            return list(rng.choice(self.words, 1 if is_early else rng.integers(1, MOST_WORDS + 1))), ""
        while True:
            words, text = random_sentence(rng)
            is_test = zlib.crc32(" ".join(words[-3:]).encode()) % 5 == 0
            if is_test == (self.split != "train"):
                return words, text


def random_sentence(rng: np.random.Generator) -> tuple[list[str], str]:
    """The words of a Spanish sentence, such as `abre dos puertas rojas`, and its translation, `open two red doors`.

    A fifth of the combinations of number, noun and adjective are in no training string.
    """
    verb = list(VERBS)[rng.integers(len(VERBS))]
    number = list(NUMBERS)[rng.integers(len(NUMBERS))]
    noun = list(NOUNS)[rng.integers(len(NOUNS))]
    forms = list(ADJECTIVES)[rng.integers(len(ADJECTIVES))]
    english, is_feminine = NOUNS[noun]
    words, text = [number, noun, forms[is_feminine]], f"{NUMBERS[number]} {ADJECTIVES[forms]} {english}"
    if rng.random() < 0.5:
        words, text = [verb, *words], f"{VERBS[verb]} {text}"
    return words, text


def longest_texts(language: str, words: int = len(WORDS)) -> list[str]:
    """Texts of which one needs the most tokens, and the most frames of CTC, that any string may need. For words that is
    one of them over and over, as long as a word's tokens do not depend on its neighbours.
    """
    if language == "en":
        return [" ".join([word] * MOST_WORDS) for word in WORDS[:words]]
    nouns = [noun for noun, _ in NOUNS.values()]
    return list(map(" ".join, product(VERBS.values(), NUMBERS.values(), ADJECTIVES.values(), nouns)))


def all_texts(language: str, words: int = len(WORDS)) -> list[str]:
    """Texts that have every word, to train a tokenizer on."""
    if language == "en":
        return list(WORDS[:words])
    rng = np.random.default_rng(0)
    return [random_sentence(rng)[1] for _ in range(1000)]


def _voices(folder: Path, language: str, seed: int | None) -> dict[str, list[str]]:
    """The voices of each split: those of the table, or others by a seed."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    with open(folder / "words.csv", encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            if row["language"] == language and row["voice"] not in found[row["split"]]:
                found[row["split"]].append(row["voice"])
    if seed is None:
        return found
    shuffled = np.random.default_rng(seed).permutation([*chain(*found.values())]).tolist()
    return {split: [shuffled.pop() for _ in voices] for split, voices in found.items()}


def _read(folder: Path, language: str, voices: list[str]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Voice, word and samples of each clip of some voices."""
    files: dict[str, np.ndarray] = {}
    with open(folder / "words.csv", encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            voice = row["voice"]
            if row["language"] == language and voice in voices:
                if voice not in files:
                    files[voice] = soundfile.read(folder / f"{voice}.ogg", dtype="float32")[0]
                start, stop = (round(float(row[name]) * SAMPLING_RATE) for name in ("start", "stop"))
                yield voice, row["word"], files[voice][start:stop]


def _at_speed(audio: np.ndarray, speed: float) -> np.ndarray:
    places = np.arange(0, len(audio) - 1, speed)
    return np.interp(places, np.arange(len(audio)), audio).astype(np.float32)


def in_noise(
    rng: np.random.Generator,
    audio: np.ndarray,
    speech: np.ndarray,
    kinds: list[np.ndarray],
    decibels: Sequence[float] = NOISE_DECIBELS,
) -> np.ndarray:
    """The audio in one of some kinds of noise. `speech`, which is all of the audio or a part of it, is louder than the
    noise by a number that is drawn between the two `decibels`.
    """
    noise = kinds[rng.integers(len(kinds))]
    start = rng.integers(len(noise) - len(audio))
    loudness = np.sqrt((speech**2).mean()) * 10 ** (-rng.uniform(decibels[0], decibels[1]) / 20)
    return audio + loudness * noise[start : start + len(audio)]


def noises(seed: int) -> list[np.ndarray]:
    """Half a minute of white noise, and of noise that falls with frequency, both of standard deviation 1."""
    white = np.random.default_rng(seed).standard_normal(30 * SAMPLING_RATE)
    spectrum = np.fft.rfft(white)
    falling = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), len(white))
    return [(noise / noise.std()).astype(np.float32) for noise in (white, falling)]

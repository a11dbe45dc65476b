"""Audio files and arrays to samples, by libsndfile alone (WAV, FLAC, Ogg Vorbis and Opus, MP3)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile


def decode_audio(source: Any, sampling_rate: int, *, source_sampling_rate: int | None = None) -> np.ndarray:
    """Mono samples of shape (num_samples,), float32, at `sampling_rate` Hz.

    Channels are averaged. Another rate is converted by SciPy's polyphase filter.

    Args:
        source: a path or URL, a file's bytes, a one-dimensional floating-point array, or a dict with "path",
            "bytes" or "array" and "sampling_rate", as `datasets` gives it.
        sampling_rate: the rate to return.
        source_sampling_rate: the rate of a bare array; for other sources, what their own must be.

    Raises:
        ValueError: naming the file and what is wrong: it is missing, cannot be decoded, is cut off, is empty,
            has values that are not finite, or its rate is unknown or not `source_sampling_rate`.
    """
    name, content = read_audio(source)
    if isinstance(content, bytes):
        samples, rate = _decode_bytes(content, name)
    else:
        stated = source.get("sampling_rate") if isinstance(source, Mapping) else None
        samples, rate = _check_array(content, stated or source_sampling_rate, name)
    if source_sampling_rate not in (None, rate):
        raise ValueError(
            f"{name} has a sampling rate of {rate} Hz, not `source_sampling_rate`={source_sampling_rate}; "
            "leave that out to have it resampled"
        )
    if samples.size == 0:
        raise ValueError(f"{name} holds no audio; remove it from the data")
    if not np.isfinite(samples).all():
        raise ValueError(
            f"{name} has values that are NaN or infinite; write it again, or remove it from the data"
        )
    return _resample(samples.astype(np.float32, copy=False), rate, sampling_rate)


def read_audio(source: Any) -> tuple[str, bytes | np.ndarray]:
    """A name for error messages, and a file's bytes or an array."""
    name = "an audio clip without a path"
    if isinstance(source, Mapping):
        name = str(source.get("path") or name)
        content = next(
            (source[key] for key in ("array", "bytes", "path") if source.get(key) is not None), None
        )
    else:
        content = source
    if isinstance(content, (str, Path)):
        name = str(content)
        try:
            with fsspec.open(name, "rb") as file:
                content = file.read()
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error}); correct its path, or remove it") from error
    if isinstance(content, bytes):
        return name, content
    if content is None:
        raise ValueError(f"{name}: a dict must hold 'path', 'bytes' or 'array', got only {', '.join(source)}")
    return name, np.asarray(content)


def open_audio(data: bytes, name: str) -> soundfile.SoundFile:
    if not data:
        raise ValueError(f"{name} is an empty file; remove it from the data")
    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name} is not audio that libsndfile reads ({error.error_string}): it is damaged, or not WAV, "
            "FLAC, Ogg Vorbis, Opus or MP3; fetch it again, or convert it, as with `ffmpeg -i FILE OUT.flac`"
        ) from error


def _decode_bytes(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples (num_samples,), channels averaged, and their rate."""
    with open_audio(data, name) as file:
        frames, rate = file.frames, file.samplerate
        estimated = file.format == "MP3" and not _has_count(data)
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{name} is damaged or cut off ({error.error_string})") from error
    if (len(samples) < frames and not estimated) or _ends_early(data):
        raise ValueError(
            f"{name} is cut off after {len(samples) / rate:.2f} seconds, less than its header says; "
            "fetch it again"
        )
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1), rate


def _check_array(samples: np.ndarray, rate: int | None, name: str) -> tuple[np.ndarray, int]:
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"{name}: an array must be one-dimensional and floating-point, in [-1, 1], got shape "
            f"{samples.shape} of {samples.dtype}"
        )
    if rate is None:
        raise ValueError(
            f"{name}: an array does not tell its sampling rate; pass `source_sampling_rate`, or a dict "
            "with 'array' and 'sampling_rate'"
        )
    return samples, rate


def _has_count(data: bytes) -> bool:
    """Whether the first frame of an MP3 file, after an ID3v2 tag, tells how many there are; without, libsndfile
    estimates it from the size of the file.
    """
    start = 0
    if data[:3] == b"ID3":
        start = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0)))
    return any(name in data[start : start + 64] for name in (b"Xing", b"Info", b"VBRI"))


def _ends_early(data: bytes) -> bool:
    """Whether a WAV or Ogg file lacks its end, which libsndfile doesn't tell: by the size in the RIFF header,
    or the last Ogg page, which must have the end-of-stream flag (RFC 3533, section 6).
    """
    if data[:4] == b"RIFF":
        size = int.from_bytes(data[4:8], "little")
        unknown = size >= 0x7FFFF000  # what is written to a pipe
        return not unknown and size > len(data) - 7  # one byte of padding may lack
    if data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        segments = data[page + 26 : page + 27]
        sizes = data[page + 27 : page + 27 + sum(segments)]
        return not segments or not data[page + 5] & 4 or page + 27 + len(sizes) + sum(sizes) > len(data)
    return False


def _resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    if rate == new_rate:
        return samples
    from scipy.signal import resample_poly  # takes a second to import, and most data needs none of it

    common = math.gcd(rate, new_rate)
    return resample_poly(samples, new_rate // common, rate // common).astype(np.float32, copy=False)

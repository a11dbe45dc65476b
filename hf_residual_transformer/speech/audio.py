"""Decodes audio files and arrays with libsndfile alone (WAV, FLAC, Ogg Vorbis and Opus, MP3)."""

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
    """Decodes audio into mono float32 samples of shape (num_samples,), at `sampling_rate` Hz.

    Channels are averaged. SciPy's polyphase filter resamples audio of another rate.

    Args:
        source: a path or URL, the bytes of a file, a one-dimensional floating-point array, or a dict with "path",
            "bytes" or "array" and "sampling_rate", as `datasets` gives it.
        sampling_rate: the rate of the result in Hz.
        source_sampling_rate: the rate of a bare array in Hz; for other sources, the rate that they must have.

    Raises:
        ValueError: if the file is missing, cannot be decoded, is cut off or empty, has values that are not finite,
            or has a rate that is unknown or not `source_sampling_rate`. The message names the file.
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
    """Returns a name for error messages, and the bytes of a file or an array."""
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
    """Opens the bytes of an audio file, which errors call `name`."""
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
    """The mono samples of a file, of shape (num_samples,), and their rate in Hz."""
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
    """Whether the first frame of an MP3 file, after an ID3v2 tag, holds the number of frames.

    If it does not, libsndfile estimates the number from the size of the file.
    """
    start = 0
    if data[:3] == b"ID3":
        start = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0)))
    return any(name in data[start : start + 64] for name in (b"Xing", b"Info", b"VBRI"))


def _ends_early(data: bytes) -> bool:
    """Whether a WAV or Ogg file lacks its end, which libsndfile does not report.

    A WAV file is compared with the size in its RIFF header. The last page of an Ogg file must be whole and have the
    end-of-stream flag (RFC 3533, section 6).
    """
    if data[:4] == b"RIFF":
        size = int.from_bytes(data[4:8], "little")
        unknown = size >= 0x7FFFF000  # the file was written to a pipe
        return not unknown and size > len(data) - 7  # one byte of padding may be missing
    if data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        segments = data[page + 26 : page + 27]
        sizes = data[page + 27 : page + 27 + sum(segments)]
        return not segments or not data[page + 5] & 4 or page + 27 + len(sizes) + sum(sizes) > len(data)
    return False


def _resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    if rate == new_rate:
        return samples
    from scipy.signal import resample_poly  # its import takes a second, and most data does not need it

    common = math.gcd(rate, new_rate)
    return resample_poly(samples, new_rate // common, rate // common).astype(np.float32, copy=False)

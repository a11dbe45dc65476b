"""Decodes audio files and arrays with libsndfile alone (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, AU).

libsndfile does not report a file that lacks its end. Therefore headers are read here too, as far as that needs it.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile

logger = logging.getLogger(__name__)
# Beyond these, in Hz, a rate is an error of the header, and resampling could take all memory.
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
BLOCK = 1 << 16  # samples that are decoded at a time
ENDLESS = 1 << 62  # frames; libsndfile says so of a FLAC file that does not know its length
OGG_TABLE = []  # of the checksum, by the next byte
for _register in range(256):
    _register <<= 24
    for _ in range(8):
        _register = (_register << 1) ^ (0x1_04C1_1DB7 if _register & 0x8000_0000 else 0)
    OGG_TABLE.append(_register)
MP3_KILOBITS = {  # a second, by whether it is MPEG 1
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
UNKNOWN_SIZE = 0x7FFF_F000  # bytes; sizes from here on are what programs write to a pipe


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
            or has a rate that is unknown, not from 1,000 to 768,000 Hz, or not `source_sampling_rate`. The message
            names the file.
    """
    check_rate(sampling_rate, "`sampling_rate`")
    if source_sampling_rate is not None:
        check_rate(source_sampling_rate, "`source_sampling_rate`")
    name, content = read_audio(source)
    if isinstance(content, bytes):
        samples, rate = _decode_bytes(content, name)
    else:
        stated = source.get("sampling_rate") if isinstance(source, Mapping) else None
        samples, rate = _check_array(content, source_sampling_rate if stated is None else stated, name)
    check_rate(rate, f"the sampling rate of {name}")
    if source_sampling_rate not in (None, rate):
        raise ValueError(
            f"{name} has a sampling rate of {rate} Hz, not `source_sampling_rate`={source_sampling_rate}; "
            "leave that out to have it resampled"
        )
    if samples.size == 0:
        raise ValueError(f"{name} holds no audio; remove it from the data")
    with np.errstate(over="ignore"):
        samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise ValueError(
            f"{name} has values that are NaN or infinite; write it again, or remove it from the data"
        )
    return _resample(samples, rate, sampling_rate)


def check_rate(rate: Any, what: str) -> None:
    """Raises ValueError, with `what` for a name, for what cannot be a sampling rate of speech."""
    whole = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if not whole or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise ValueError(
            f"{what} must be a whole number of Hz from {LOWEST_RATE} to {HIGHEST_RATE}, got {rate!r}; correct it, or "
            "convert the recording, as with `ffmpeg -i FILE -ar 16000 OUT.flac`"
        )


def is_url(path: str) -> bool:
    """Whether fsspec reads a path, also one within an archive. A name such as `a::b.wav` is a file's."""
    return "://" in path


def read_audio(source: Any) -> tuple[str, bytes | np.ndarray]:
    """Returns a name for error messages, and the bytes of a file or an array."""
    name = "an audio clip without a path"
    if isinstance(source, Mapping):
        name = str(source.get("path") or name)
        content = next(
            (source[key] for key in ("array", "bytes", "path") if source.get(key) is not None), None
        )
        if content is None:
            raise ValueError(
                f"{name}: a dict must hold 'path', 'bytes' or 'array', got only {', '.join(map(str, source))}"
            )
    else:
        content = source
    if isinstance(content, (str, Path)):
        name = str(content)
        content = _read_url(name) if is_url(name) else _read_file(name)
    if isinstance(content, (bytes, bytearray, memoryview)):
        return name, bytes(content)
    if content is None:
        raise ValueError(
            f"{name} is None; it must be a path, the bytes of a file, an array, or a dict of one"
        )
    try:
        return name, np.asarray(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is no array of samples ({error}); write it again, or remove it") from error


def _read_file(name: str) -> bytes:
    try:
        if os.path.exists(name) and not os.path.isfile(name):
            # A pipe could block for ever, and a device such as /dev/zero has no end.
            raise ValueError(f"{name} is a folder, pipe or device; it must be a file of audio")
        return Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error}); correct its path, or remove it") from error
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise ValueError(f"{name!r} cannot be read ({error}); correct its path, or remove it") from error


def _read_url(name: str) -> bytes:
    try:
        with fsspec.open(name, "rb") as file:
            return file.read()
    except ImportError as error:
        raise ValueError(
            f'{name} needs a package that is not installed ({error}); `pip install "fsspec[http]"` brings what '
            "http needs"
        ) from error
    except Exception as error:  # each protocol of fsspec has exceptions of its own
        raise ValueError(f"{name} cannot be read ({error}); correct its address, or remove it") from error


class _Sequential(soundfile.SoundFile):
    """Reads from the start to the end, without a seek after each block, which GSM and endless FLAC do not have."""

    def seekable(self) -> bool:
        return False


def open_audio(data: bytes, name: str) -> soundfile.SoundFile:
    """Opens the bytes of an audio file, which errors call `name`, to be read in blocks from its start."""
    if not data:
        raise ValueError(f"{name} is an empty file; remove it from the data")
    try:
        return _Sequential(io.BytesIO(_with_end_mark(_with_sizes(data))))
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name} is not audio that libsndfile reads ({error.error_string}): it is damaged, or not WAV, FLAC, Ogg "
            "Vorbis, Opus, MP3, AIFF or AU; convert it, as with `ffmpeg -i FILE OUT.flac`, or remove it from the data"
        ) from error


def seconds_of(data: bytes, name: str) -> float:
    """The length of a file by its header; of a file that does not know it, by decoding it."""
    with open_audio(data, name) as file:
        check_rate(file.samplerate, f"the sampling rate of {name}")
        if _knows_length(file, data):
            return file.frames / file.samplerate
    samples, rate = _decode_bytes(data, name)
    return len(samples) / rate


def _decode_bytes(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """The mono samples of a file, of shape (num_samples,), and their rate in Hz."""
    with open_audio(data, name) as file:
        rate = file.samplerate
        check_rate(rate, f"the sampling rate of {name}")
        known = _knows_length(file, data)
        blocks = [np.zeros(0, np.float32)]
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{name} is damaged or cut off ({error.error_string}); get a whole copy, or save what can be read, as "
                "with `ffmpeg -i FILE OUT.flac`, or remove it from the data"
            ) from error
        samples = np.concatenate(blocks)
        if (known and len(samples) < file.frames) or _ends_early(data, len(samples)):
            raise ValueError(
                f"{name} is cut off or damaged: {len(samples) / rate:.2f} seconds can be read, less than it says it "
                "has; get a whole copy, or save what can be read, as with `ffmpeg -i FILE OUT.flac`, or remove it "
                "from the data"
            )
        counted = _mp3_samples(data) if file.format == "MP3" and not known else 0
        if counted > len(samples) + 2 * 1152:
            raise ValueError(
                f"{name} does not say how many frames it has, and libsndfile reads {len(samples) / rate:.2f} of its "
                f"{counted / rate:.2f} seconds; write it anew, as with `ffmpeg -i FILE OUT.flac`"
            )
    if _lacks_end_mark(data):
        logger.warning(
            f"{name} has no mark of its end, so that {len(samples) / rate:.2f} seconds are read, and nothing tells "
            "whether there were more"
        )
    if num_bytes := _bytes_after_samples(data):
        logger.warning(
            f"{name} has {num_bytes} bytes after its {len(samples) / rate:.2f} seconds that are not read; if these are "
            "samples, the size in its header is wrong, and `ffmpeg -i FILE OUT.flac` may save them"
        )
    return samples, rate


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


def _knows_length(file: soundfile.SoundFile, data: bytes) -> bool:
    """Whether the number of frames that libsndfile gives is not a guess."""
    return bool(file.frames < ENDLESS and (file.format != "MP3" or _has_count(data)))


def _has_count(data: bytes) -> bool:
    """Whether the first frame of an MP3 file, after an ID3v2 tag, holds the number of frames.

    If it does not, libsndfile estimates the number from the size of the file.
    """
    start = _first_frame(data)
    return any(name in data[start : start + 64] for name in (b"Xing", b"Info", b"VBRI"))


def _mp3_samples(data: bytes) -> int:
    """The samples in the frames of an MP3 file (layer III of MPEG 1, 2 and 2.5), as far as they follow each other."""
    position, samples = _first_frame(data), 0
    while position + 4 <= len(data):
        version, layer = data[position + 1] >> 3 & 3, data[position + 1] >> 1 & 3
        bits, rate = data[position + 2] >> 4, data[position + 2] >> 2 & 3
        synchronous = data[position] == 0xFF and data[position + 1] >= 0xE0
        if not synchronous or version == 1 or layer != 1 or bits in (0, 15) or rate == 3:
            break
        is_first = version == 3
        bitrate = 1000 * MP3_KILOBITS[is_first][bits - 1]
        hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
        position += (144 if is_first else 72) * bitrate // hertz + (data[position + 2] >> 1 & 1)
        samples += 1152 if is_first else 576
    return samples


def _first_frame(data: bytes) -> int:
    """Where the frames of an MP3 file start, after an ID3v2 tag."""
    if data[:3] != b"ID3":
        return 0
    return 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0)))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The name, the start and the size in bytes of each chunk of a RIFF, RF64 or AIFF file."""
    order: Any = "big" if data[:4] == b"FORM" else "little"
    position, long_size = 12, None
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], order)
        if data[:4] == b"RF64" and data[position : position + 4] == b"ds64":
            long_size = int.from_bytes(data[position + 16 : position + 24], "little")
        if data[position : position + 4] == b"data" and size == 0xFFFF_FFFF and long_size is not None:
            size = long_size
        yield data[position : position + 4], position + 8, size
        position += 8 + size + size % 2


def _with_sizes(data: bytes) -> bytes:
    """A WAV file with the size of its samples, which a recorder that was killed left at 0."""
    if data[:4] != b"RIFF" or int.from_bytes(data[4:8], "little") == len(data) - 8:
        return data
    start = next((start for name, start, size in _chunks(data) if name == b"data" and size == 0), len(data))
    if start == len(data):
        return data
    size = (len(data) - start).to_bytes(4, "little")
    return data[: start - 4] + size + data[start:]


def _with_end_mark(data: bytes) -> bytes:
    """An Ogg Opus file whose last page is marked as the last, without which libsndfile does not read the page where it
    ends within a packet.
    """
    if b"OpusHead" not in data[:64] or not _lacks_end_mark(data) or _ends_early(data, 0):
        return data
    start, segments, _ = _last_page(data)
    page = bytearray(data[start : start + 27 + len(segments) + sum(segments)])
    page[5] |= 4
    page[22:26] = _ogg_checksum(page)
    return data[:start] + bytes(page)


def _ogg_checksum(page: bytes | bytearray) -> bytes:
    """The CRC-32 of RFC 3533, section 6, which is not that of `zlib`: bits are not reflected, and it starts at 0."""
    register = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        register = (register << 8 & 0xFFFF_FFFF) ^ OGG_TABLE[register >> 24 ^ byte]
    return register.to_bytes(4, "little")


def _ends_early(data: bytes, num_frames: int) -> bool:
    """Whether a file lacks bytes at its end, which libsndfile does not report.

    Bytes of samples are counted in WAV, RF64, AIFF and AU files. An AIFF file must not state more frames than the
    `num_frames` that were decoded. The last page of an Ogg file must be whole and have its checksum (RFC 3533, section
    6).
    """
    if data[:4] in (b"RIFF", b"RF64", b"FORM"):
        sizes = {name: (start, size) for name, start, size in reversed(list(_chunks(data)))}
        start, size = sizes.get(b"SSND" if data[:4] == b"FORM" else b"data", (0, 0))
        described, _ = sizes.get(b"COMM", (len(data), 0))
        stated = int.from_bytes(data[described + 2 : described + 6], "big")
        known = size < UNKNOWN_SIZE or data[:4] == b"RF64"
        return stated > num_frames or (known and size > len(data) - start)
    if data[:4] == b".snd":
        start, size = int.from_bytes(data[4:8], "big"), int.from_bytes(data[8:12], "big")
        return size < UNKNOWN_SIZE and size > len(data) - start
    if data[:4] == b"OggS":
        page, segments, body = _last_page(data)
        end = page + 27 + len(segments) + sum(segments)
        if not segments or end > len(data) or not body:
            return True
        return _ogg_checksum(data[page:end]) != data[page + 22 : page + 26]
    return False


def _lacks_end_mark(data: bytes) -> bool:
    """Whether the last page of an Ogg file is not marked as the last (RFC 3533, section 6), as in a recorded stream."""
    return data[:4] == b"OggS" and not data[data.rfind(b"OggS") + 5] & 4


def _bytes_after_samples(data: bytes) -> int:
    """The number of bytes after the samples of a WAV, RF64, AIFF or AU file that are neither padding nor chunks."""
    if data[:4] == b".snd":
        start, size = int.from_bytes(data[4:8], "big"), int.from_bytes(data[8:12], "big")
        return 0 if size >= UNKNOWN_SIZE else len(data[start + size :].strip(b"\0"))
    if data[:4] not in (b"RIFF", b"RF64", b"FORM"):
        return 0
    chunks = list(_chunks(data))
    names = [name for name, *_ in chunks]
    of_samples = b"SSND" if data[:4] == b"FORM" else b"data"
    if of_samples not in names:
        return 0
    _, start, size = chunks[names.index(of_samples)]
    if size == 0 or (size >= UNKNOWN_SIZE and data[:4] != b"RF64"):
        return 0
    rest = data[start + size :]
    known = all(name.isascii() and name.decode().isprintable() for name in names)
    return (
        0 if known and (len(names) > names.index(of_samples) + 1 or len(rest) < 8) else len(rest.strip(b"\0"))
    )


def _last_page(data: bytes) -> tuple[int, bytes, bool]:
    """Where the last page of an Ogg file starts, the lengths of its segments, and whether there are as many as said."""
    page = data.rfind(b"OggS")
    count = data[page + 26] if page + 26 < len(data) else 0
    segments = data[page + 27 : page + 27 + count]
    return page, segments, len(segments) == count


def _resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    if rate == new_rate:
        return samples
    from scipy.signal import resample_poly  # its import takes a second, and most data does not need it

    common = math.gcd(rate, new_rate)
    return resample_poly(samples, new_rate // common, rate // common).astype(np.float32, copy=False)

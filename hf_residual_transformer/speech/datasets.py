"""Loads speech data sets from the Hub, tables and folders.

A row is `{"audio": {"array", "sampling_rate", "path"}, "text", "language"}`, and its audio is decoded when it is read.
`datasets` needs torchcodec to decode audio and to read folders of loose files. Therefore `audio.py` decodes the bytes
or the file of an `Audio` feature, and this module reads the folders.
"""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Audio, ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset_builder
from datasets.exceptions import DatasetsError

from .audio import check_rate, decode_audio, is_url, read_audio, seconds_of
from .tables import TABLES, Table, read_table

logger = logging.getLogger(__name__)
AUDIO_FILES = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au")
# Recordings and films that libsndfile does not read, or of which nothing tells whether they are whole.
OTHER_MEDIA = (
    *(
        ".3gp",
        ".aac",
        ".ac3",
        ".amr",
        ".ape",
        ".caf",
        ".m4a",
        ".m4b",
        ".mka",
        ".mkv",
        ".mov",
        ".mp2",
        ".mp4",
        ".mpc",
    ),
    *(".ra", ".snd", ".sph", ".tta", ".voc", ".w64", ".weba", ".webm", ".wma", ".wv"),
)
# A streamed data set encodes `Audio(decode=False)` anew when a column is renamed, so these features replace it.
UNDECODED = {"bytes": Value("binary"), "path": Value("string")}
COLUMNS = ("audio_column", "text_column", "language_column")
NO_CLIP = "no clip is left to read; check the split, `language`, `max_seconds` and `max_samples`"


def load_speech_dataset(
    name_or_path: str | Path,
    split: str = "train",
    *,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    outside_files: bool = False,
    **options: Any,
) -> Dataset | IterableDataset:
    """Loads one split of recordings; each row is decoded when it is read.

    Args:
        name_or_path: a data set id on the Hub; a `.csv`, `.tsv`, `.jsonl` or `.parquet` file; or a folder. A folder
            has a table called `metadata`, at its top or in a folder for each split (the audiofolder layout), or only
            audio files. Paths in a table are relative to the table's folder. A `.tsv` file has no quoting. Hidden
            files are not read, and a warning names recordings that cannot be.
        split: for the Hub, a split as `datasets` takes it, such as "train[:100]". For a local table, a value of its
            `split` column; if there is no such column, all rows are "train". "all" selects all rows.
        config_name: the configuration of a Hub data set.
        revision: the branch, tag or commit of a Hub data set.
        streaming: whether to return an `IterableDataset`, which does not keep what it downloads.
        outside_files: whether the data may name files outside of its own folder, by absolute paths, `..` or URLs. Do
            not allow this for data of people whom you do not trust.
        options: the options of `prepare_speech_dataset`.

    Raises:
        ValueError: if a split, column or language does not exist, a table cannot be read, or it names files outside.
        FileNotFoundError: if a path does not exist.
    """
    if not str(name_or_path).strip():
        raise ValueError(
            f"`name_or_path` must be a data set id, a table or a folder ('.' is this one), got {str(name_or_path)!r}"
        )
    path = Path(name_or_path)
    dataset: Dataset | IterableDataset
    if os.path.exists(path):
        names = {name: options[name] for name in COLUMNS if name in options}
        dataset, folder = _load_local(path, split, streaming, names)
        return prepare_speech_dataset(dataset, base_dir=folder, outside_files=outside_files, **options)
    if path.suffix in TABLES or path.is_absolute() or len(path.parts) > 2:
        raise FileNotFoundError(
            f"there is no file or folder {path}, and a Hub data set id looks like 'owner/name'"
        )
    return prepare_speech_dataset(
        _build(str(name_or_path), split, streaming, config_name, revision),
        outside_files=outside_files,
        **options,
    )


def prepare_speech_dataset(
    dataset: Dataset | IterableDataset,
    *,
    audio_column: str = "audio",
    text_column: str | None = "text",
    language_column: str | None = None,
    language: str | None = None,
    sampling_rate: int = 16_000,
    source_sampling_rate: int | None = None,
    max_seconds: float | None = None,
    max_samples: int | None = None,
    base_dir: str | Path | None = None,
    outside_files: bool | None = None,
) -> Dataset | IterableDataset:
    """Gives a data set the columns `audio`, `text` and `language` that this package reads, and drops all others.

    Args:
        dataset: a data set with at least a column of audio. One that this function has made is prepared again, and its
            sources are found as before.
        audio_column: the column with sources for `decode_audio`. If there is no "audio", "file_name" is used.
        text_column: the column with transcripts; None for recordings without transcripts.
        language_column: the column with languages; by default "language" if it exists.
        language: keeps only rows with this value in the language column. If there is no such column, all rows get this
            language.
        sampling_rate: the rate of the decoded audio in Hz, which must be the model's.
        source_sampling_rate: the rate that the sources must have, in Hz. Only bare arrays need it.
        max_seconds: drops longer clips. The header of each file is read for this.
        max_samples: keeps only the first `max_samples` rows.
        base_dir: the folder that relative paths start from.
        outside_files: whether rows may name files outside of `base_dir`, or URLs. By default they may if there is no
            `base_dir`, where the rows are the caller's own.

    Raises:
        ValueError: if a column or language does not exist, files are missing, or no row is left.
    """
    _check_limits(sampling_rate, source_sampling_rate, max_seconds, max_samples)
    before = decoder_of(dataset)
    if before is not None:
        if before.language is not None and language not in (None, before.language):
            raise ValueError(
                f"`language` must be {before.language!r}, with which the data set was loaded, got {language!r}"
            )
        language = before.language if language is None else language
        base_dir = before.base_dir if base_dir is None else base_dir
        outside_files = before.outside_files if outside_files is None else outside_files
        source_sampling_rate = source_sampling_rate or before.source_sampling_rate
        dataset = dataset.with_format(None)
    dataset = _rename_columns(dataset, audio_column, text_column, language_column)
    has_language = "language" in _columns(dataset)
    if language is not None and has_language:
        dataset = _keep(dataset, "language", language)
    outside_files = base_dir is None if outside_files is None else outside_files
    decoder = _Decoder(
        sampling_rate, source_sampling_rate, base_dir, outside_files, None if has_language else language
    )
    if isinstance(dataset, Dataset):
        _check_files(dataset, decoder)
    if max_seconds is not None:
        dataset = _filter(dataset, "audio", partial(decoder.fits, max_seconds))
    if isinstance(dataset, IterableDataset):
        dataset = dataset if max_samples is None else dataset.take(max_samples)
        if next(iter(dataset), None) is None:
            raise ValueError(NO_CLIP)
        return dataset.map(decoder, batched=True, batch_size=1)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    if len(dataset) == 0:
        raise ValueError(NO_CLIP)
    return dataset.with_transform(decoder)


def prepare_rows(
    rows: Iterable[Any],
    *,
    audio_column: str = "audio",
    text_column: str | None = "text",
    language_column: str | None = None,
    language: str | None = None,
    sampling_rate: int = 16_000,
    source_sampling_rate: int | None = None,
    max_seconds: float | None = None,
    max_samples: int | None = None,
    base_dir: str | Path | None = None,
    outside_files: bool | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields what `prepare_speech_dataset` gives of a data set, from rows that are in memory or come one by one.

    The options are the same, but `language` leaves out rows of another language, and a row that does not say its
    language gets this one. The audio of each row must be a dict for `decode_audio`.

    Raises:
        ValueError: if a column does not exist, a row has no such audio, or the options leave no row.
    """
    _check_limits(sampling_rate, source_sampling_rate, max_seconds, max_samples)
    outside_files = base_dir is None if outside_files is None else outside_files
    decoder = _Decoder(sampling_rate, source_sampling_rate, base_dir, outside_files, None)
    number, too_long = 0, 0
    others: set[str] = set()
    for row in rows:
        is_row = isinstance(row, Mapping)
        names = _meanings(list(row), audio_column, text_column, language_column) if is_row else {}
        found = {meaning: row[column] for column, meaning in names.items()}
        if not isinstance(found.get("audio"), Mapping):
            raise ValueError(
                'each row must be a dict such as {"audio": {"array": samples, "sampling_rate": 16000}}, got '
                f"{str(row)[:80]}"
            )
        if language is not None:
            spoken = found.get("language") or language
            if spoken != language:
                others.add(str(spoken))
                continue
            found["language"] = language
        found["audio"] = decoder.decode(found["audio"])
        if max_seconds is not None and len(found["audio"]["array"]) > max_seconds * sampling_rate:
            too_long += 1
            continue
        yield found
        number += 1
        if number == max_samples:
            return
    if not number and too_long:
        raise ValueError(NO_CLIP)
    if not number and others:
        raise ValueError(
            f"`language` must be one of those in the data ({', '.join(sorted(others)[:20])}), got {language!r}"
        )


def refuse_long_clips(dataset: Dataset, max_seconds: float) -> None:
    """Checks a data set of `load_speech_dataset` by the headers of its files, so that nothing is decoded.

    Raises:
        ValueError: naming the first clip that is longer than `max_seconds`.
    """
    decoder = decoder_of(dataset)
    if decoder is None:
        return
    for number, source in enumerate(dataset.with_format(None)["audio"]):
        if not decoder.fits(max_seconds, source):
            path = source.get("path") if isinstance(source, Mapping) else source
            raise ValueError(
                f"{path or 'the clip'} (row {number}) must be of at most {max_seconds:g} seconds; leave longer "
                "ones out with `max_seconds`, or cut them"
            )


def clip_samples(rows: Any) -> list[int]:
    """The number of samples of each clip at its decoded rate.

    Args:
        rows: a data set of `load_speech_dataset`, of which only the headers of files are read, or other rows.
    """
    decoder = decoder_of(rows)
    if decoder is not None:
        rate = decoder.sampling_rate
        return [round(decoder.seconds(source) * rate) for source in rows.with_format(None)["audio"]]
    return [len(row["audio"]["array"]) for row in rows]


def decoder_of(rows: Any) -> _Decoder | None:
    """What decodes the rows of a data set that `prepare_speech_dataset` has made; None for other rows."""
    decoder = rows.format["format_kwargs"].get("transform") if isinstance(rows, Dataset) else None
    return decoder if isinstance(decoder, _Decoder) else None


def _check_limits(
    sampling_rate: int, source_sampling_rate: int | None, max_seconds: float | None, max_samples: int | None
) -> None:
    check_rate(sampling_rate, "`sampling_rate`")
    if source_sampling_rate is not None:
        check_rate(source_sampling_rate, "`source_sampling_rate`")
    if max_seconds is not None and not (max_seconds > 0 and math.isfinite(max_seconds)):
        raise ValueError(f"`max_seconds` must be above 0 and finite, got {max_seconds}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be at least 1, got {max_samples}")


def _rename_columns(
    dataset: Dataset | IterableDataset,
    audio_column: str,
    text_column: str | None,
    language_column: str | None,
) -> Dataset | IterableDataset:
    """Renames the given columns to `audio`, `text` and `language`, and keeps the audio undecoded."""
    names = _meanings(_columns(dataset), audio_column, text_column, language_column)
    for column, meaning in names.items():
        feature = (dataset.features or {}).get(column)
        if meaning == "audio":
            if isinstance(feature, Audio):
                dataset = dataset.cast_column(column, UNDECODED)
        elif isinstance(feature, ClassLabel) or (
            isinstance(feature, Value) and feature.dtype not in ("string", "large_string", "null")
        ):
            raise ValueError(
                f"the column {column!r} must hold text, got {feature}; convert it with `map` or `cast`"
            )
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _meanings(
    columns: Sequence[str],
    audio_column: str = "audio",
    text_column: str | None = "text",
    language_column: str | None = None,
) -> dict[str, str]:
    """What each column that is read holds: "audio", "text" or "language"."""
    if audio_column == "audio" and "audio" not in columns and "file_name" in columns:
        audio_column = "file_name"
    if language_column is None and "language" in columns:
        language_column = "language"
    wanted = ((audio_column, "audio"), (text_column, "text"), (language_column, "language"))
    names: dict[str, str] = {}
    for column, meaning in wanted:
        if column is None:
            continue
        if column not in columns:
            raise ValueError(f"`{meaning}_column` must be one of {', '.join(columns)}, got {column!r}")
        if column in names:
            raise ValueError(
                f"`{meaning}_column` must not be `{names[column]}_column`, got {column!r} for both"
            )
        names[column] = meaning
    return names


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not columns:
        raise ValueError("the data set has no rows; it must have at least one")
    return columns


@dataclass
class _Decoder:
    """Decodes the `audio` of a batch of rows. It is a transform for `datasets` that worker processes can unpickle."""

    sampling_rate: int
    source_sampling_rate: int | None
    base_dir: str | Path | None
    outside_files: bool
    language: str | None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = dict(batch)
        if "audio" in batch:
            rows["audio"] = [self.decode(source) for source in batch["audio"]]
            for audio, text in zip(rows["audio"], batch.get("text", ()), strict=False):
                if not isinstance(text, str):
                    raise ValueError(
                        f"{audio['path']} has no text, but {text!r}; correct it, remove it, or pass `text_column=None`"
                    )
        if self.language is not None:
            rows["language"] = [self.language] * len(next(iter(batch.values())))
        return rows

    def decode(self, source: Any) -> dict[str, Any]:
        path = source.get("path") if isinstance(source, Mapping) else source
        array = decode_audio(
            self.locate(source), self.sampling_rate, source_sampling_rate=self.source_sampling_rate
        )
        return {
            "array": array,
            "sampling_rate": self.sampling_rate,
            "path": str(path) if isinstance(path, (str, Path)) else None,
        }

    def fits(self, max_seconds: float, source: Any) -> bool:
        """Whether a clip is at most `max_seconds` long."""
        return self.seconds(source) <= max_seconds

    def seconds(self, source: Any) -> float:
        """The length of a clip; only the header of a file is decoded."""
        name, content = read_audio(self.locate(source))
        if isinstance(content, bytes):
            return seconds_of(content, name)
        return len(self.decode(source)["array"]) / self.sampling_rate

    def locate(self, source: Any) -> Any:
        """Makes the path of `source` start from `base_dir`, if the audio is read from a path."""
        path = _path_of(source)
        if path is None:
            return source
        located = self._inside(path)
        return {**source, "path": located} if isinstance(source, Mapping) else located

    def _inside(self, path: str) -> str:
        """Where a path leads from `base_dir`.

        Raises:
            ValueError: if that is outside, or a URL, and `outside_files` is false.
        """
        located = path if self.base_dir is None or is_url(path) else os.path.join(self.base_dir, path)
        if self.outside_files:
            return located
        inside = self.base_dir is not None and not is_url(path)
        # Without this, "a/../../b" would be opened as the system resolves it.
        located = os.path.normpath(located) if inside else located
        if not inside or not Path(os.path.abspath(located)).is_relative_to(
            os.path.abspath(str(self.base_dir))
        ):
            raise ValueError(
                f"the data names {path!r}, which is a URL or outside of "
                + ("the data" if self.base_dir is None else f"its folder {self.base_dir}")
                + "; correct the path, or, if you trust the data, pass `outside_files=True` (--outside-files)"
            )
        return located


def _path_of(source: Any) -> str | None:
    """The path that audio is read from; None if it is there already."""
    if isinstance(source, Mapping):
        held = any(source.get(key) is not None for key in ("array", "bytes"))
        source = None if held else source.get("path")
    return str(source) if isinstance(source, (str, Path)) else None


def _load_local(
    path: Path, split: str, streaming: bool, names: Mapping[str, Any]
) -> tuple[Dataset | IterableDataset, Path]:
    """Returns the data set at `path`, and the folder that its relative paths start from."""
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is a pipe or device; it must be a table or a folder")
    folder = path if path.is_dir() else path.parent
    table = _metadata(path) if path.is_dir() else path
    if table is None and (table := _metadata(path / split)) is not None:
        folder, split = path / split, "all"
    dataset: Dataset | IterableDataset
    if table is None:
        files = _audio_files(path)
        if not files:
            return _build(str(path), split, streaming), folder
        dataset = Dataset.from_dict({"audio": files})
    elif table.suffix == ".parquet":
        _check_columns(table)
        dataset = _build("parquet", "train", streaming, data_files=str(table))
    else:
        rows = read_table(table)
        if "split" in rows.columns and split != "all":
            rows, split = _split_of(rows, split), "all"
        dataset = _as_dataset(rows, names)
    if "split" in (dataset.column_names or []) and split != "all":
        dataset = _keep(dataset, "split", split)
    elif split not in ("train", "all"):
        raise ValueError(
            f"`split` must be 'train' or 'all' for {path}, which has no column `split`, got {split!r}"
        )
    if streaming and isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset()
    return dataset, folder


def _metadata(folder: Path) -> Path | None:
    """The table of a folder."""
    found = [file for suffix in TABLES if (file := folder / f"metadata{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{folder} must have one table, got {', '.join(file.name for file in found)}; name the one to read, or "
            "remove the others"
        )
    return found[0] if found else None


def _split_of(table: Table, split: str) -> Table:
    kept = table.where("split", split)
    if not kept.rows:
        found = ", ".join(sorted({str(value) for value in table.texts("split")})[:20])
        raise ValueError(f"`split` must be one of those in the data ({found}), got {split!r}")
    return kept


def _as_dataset(table: Table, names: Mapping[str, Any]) -> Dataset:
    """The columns of a table that are read, after a check of each value."""
    data: dict[str, list[Any]] = {}
    for column, meaning in _meanings(table.columns, **names).items():
        if meaning == "audio" and all(isinstance(row.get(column), Mapping) for row in table.rows):
            data[column] = [row[column] for row in table.rows]
        else:
            data[column] = table.texts(column, empty=meaning != "audio", null=meaning == "language")
    try:
        return Dataset.from_dict(data)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{table.path} has rows of different kinds of audio ({error}); write them alike"
        ) from error


def _audio_files(folder: Path) -> list[str]:
    """The audio files in a folder and those below, relative to it; a warning names recordings that are not read.

    Hidden files are left out, such as the `._x.wav` that macOS writes beside `x.wav`.
    """
    found, unread = [], []
    for place, folders, files in os.walk(folder, onerror=_refuse_folder):
        links = [name for name in folders if Path(place, name).is_symlink() and not name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*sorted(files), *links]:
            path = Path(place, name)
            suffix = path.suffix.lower()
            if suffix in AUDIO_FILES and not name.startswith(".") and path.is_file():
                found.append(path.relative_to(folder).as_posix())
            elif name in links or (suffix in AUDIO_FILES + OTHER_MEDIA and not name.startswith("._")):
                unread.append(path.relative_to(folder).as_posix())
    if unread:
        problem = (
            f"{len(unread)} of {len(unread) + len(found)} recordings in {folder} are not read, such as "
            f"{', '.join(unread[:3])}: of these, convert those of another format, as with "
            "`ffmpeg -i FILE OUT.flac`, put files in the place of links and pipes, and rename hidden files"
        )
        if not found:
            raise ValueError(problem)
        logger.warning(problem)
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read ({error}); correct its permissions") from error


def _build(
    name: str,
    split: str,
    streaming: bool,
    config_name: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Dataset | IterableDataset:
    """Loads a split with a builder of `datasets`, from the Hub or from a clone of a Hub data set."""
    local = options.get("data_files", name)
    is_local = os.path.exists(local)
    load = partial(load_dataset_builder, name, config_name, revision=revision, **options)
    with _naming(local):
        builder = load()
    kinds = {kind.__name__ for kind in type(builder).__mro__}
    if "AudioFolder" in kinds:
        raise ValueError(
            f"{name!r} consists of loose audio files, which `datasets` reads through torchcodec alone; pass "
            "revision 'refs/convert/parquet', the Hub's own conversion, or download it and pass the folder"
        )
    if "Csv" in kinds and is_local:
        tables = [str(file) for files in builder.config.data_files.values() for file in files]
        raise ValueError(
            f"{local} has no table called metadata; name the one to read, such as {tables[0]}, or rename it"
        )
    if "Csv" in kinds and builder.config.sep == "\t":
        builder = load(quoting=csv.QUOTE_NONE)
    with _naming(local):
        if streaming:
            stream = builder.as_streaming_dataset(split)
            return _naming_errors(stream, local) if is_local else stream
        builder.download_and_prepare()
        dataset = builder.as_dataset(split)
        if is_local:
            _check_texts(dataset)
        return dataset


@contextmanager
def _naming(local: str | Path) -> Iterator[None]:
    """Errors of `datasets` become one that names the file or folder; those of a data set on the Hub stay."""
    try:
        yield
    except (DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
        if not os.path.exists(local):
            raise
        cause = error.__cause__ or error
        raise ValueError(
            f"{local} holds no recordings that can be read ({cause}); it must have audio files, a table called "
            "metadata.csv, .tsv, .jsonl or .parquet, or the whole files of a Hub data set"
        ) from error


def _naming_errors(stream: IterableDataset, local: str) -> IterableDataset:
    """The same stream, but an error that comes while it is read, as of a damaged file, names `local`."""
    features = None
    if stream.features is not None:
        features = Features(
            {name: UNDECODED if isinstance(kind, Audio) else kind for name, kind in stream.features.items()}
        )
        stream = stream.cast(features)
    number = stream.num_shards
    shards = [stream.shard(number, index) for index in range(number)]
    return IterableDataset.from_generator(
        _read_shards, features=features, gen_kwargs={"shards": shards, "local": local}
    )


def _read_shards(shards: list[IterableDataset], local: str) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with _naming(local):
            yield from shard


def _check_columns(table: Path) -> None:
    """Checks that no two columns of a Parquet file have one name."""
    with _naming(table):
        names = pyarrow.parquet.read_schema(table).names
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{table} has two columns called {double!r}; rename or remove one of them")


def _check_texts(dataset: Dataset) -> None:
    """Checks that all texts are UTF-8, which a damaged Parquet file may not be.

    Raises:
        pyarrow.ArrowInvalid: naming the column's first wrong value.
    """
    texts = [name for name, feature in dataset.features.items() if feature == Value("string")]
    dataset.data.table.select(texts).validate(full=True)


def _filter(
    dataset: Dataset | IterableDataset, column: str, keep: Callable[[Any], bool]
) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.filter(keep, input_columns=column)
    return dataset.select([row for row, value in enumerate(dataset[column]) if keep(value)])


def _keep(dataset: Dataset | IterableDataset, column: str, value: str) -> Dataset | IterableDataset:
    """Keeps the rows whose `column` has the given value."""
    kept = _filter(dataset, column, partial(_is, column, value))
    if isinstance(kept, Dataset) and isinstance(dataset, Dataset) and not len(kept):
        found = ", ".join(sorted({str(other) for other in dataset[column]})[:20])
        raise ValueError(f"`{column}` must be one of those in the data ({found}), got {value!r}")
    return kept


def _is(column: str, value: str, found: Any) -> bool:
    """Whether a row is wanted; that it does not say which split it is in is an error."""
    if found is None and column == "split":
        raise ValueError(
            f"each row of a table with a column `split` must have a value in it, got a row without; the wanted is "
            f"{value!r}, and 'all' selects all rows"
        )
    return bool(found == value)


def _check_files(dataset: Dataset, decoder: _Decoder) -> None:
    """Checks before hours of training that all files exist and are allowed."""
    sources = list(dataset["audio"])
    for row, source in enumerate(sources, 1):
        if source is None or (
            isinstance(source, Mapping) and not any(value is not None for value in source.values())
        ):
            raise ValueError(f"row {row} of the data has no audio; add it, or remove the row")
    paths = [path for source in sources if (path := _path_of(source)) is not None]
    located = {path: decoder.locate(path) for path in paths}
    if decoder.base_dir is None:
        return
    missing = [path for path in paths if not is_url(path) and not os.path.isfile(located[path])]
    if missing:
        kind = "no files" if os.path.exists(located[missing[0]]) else "missing"
        raise ValueError(
            f"{len(missing)} of {len(dataset)} audio files are {kind} in {decoder.base_dir}: {missing[0]}, ...; "
            "add them, or remove their rows"
        )

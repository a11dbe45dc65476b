"""Loads speech data sets from the Hub, tables and folders.

A row is `{"audio": {"array", "sampling_rate", "path"}, "text", "language"}`, and its audio is decoded when it is read.
`datasets` needs torchcodec to decode audio and to read folders of loose files. Therefore `audio.py` decodes the bytes
or the file of an `Audio` feature, and this module reads the folders.
"""

from __future__ import annotations

import csv
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, IterableDataset, Value, load_dataset_builder

from .audio import decode_audio, open_audio, read_audio

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
AUDIO_FILES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif")
# A streamed data set encodes `Audio(decode=False)` anew when a column is renamed, so these features replace it.
UNDECODED = {"bytes": Value("binary"), "path": Value("string")}


def load_speech_dataset(
    name_or_path: str | Path,
    split: str = "train",
    *,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    **options: Any,
) -> Dataset | IterableDataset:
    """Loads one split of recordings; each row is decoded when it is read.

    Args:
        name_or_path: a data set id on the Hub; a `.csv`, `.tsv`, `.jsonl` or `.parquet` file; or a folder. A folder
            has a table called `metadata`, at its top or in a folder for each split (the audiofolder layout), or only
            audio files. Paths in a table are relative to the table's folder.
        split: for the Hub, a split as `datasets` takes it, such as "train[:100]". For a local table, a value of its
            `split` column; if there is no such column, all rows are "train". "all" selects all rows.
        config_name: the configuration of a Hub data set.
        revision: the branch, tag or commit of a Hub data set.
        streaming: whether to return an `IterableDataset`, which does not keep what it downloads.
        options: the options of `prepare_speech_dataset`.

    Raises:
        ValueError: if a split, column or language does not exist, or a table cannot be read.
        FileNotFoundError: if a path does not exist.
    """
    path = Path(name_or_path)
    dataset: Dataset | IterableDataset
    if path.exists():
        dataset, folder = _load_local(path, split, streaming)
        return prepare_speech_dataset(dataset, base_dir=folder, **options)
    if path.suffix in TABLES or path.is_absolute() or len(path.parts) > 2:
        raise FileNotFoundError(
            f"there is no file or folder {path}, and a Hub data set id looks like 'owner/name'"
        )
    return prepare_speech_dataset(
        _build(str(name_or_path), split, streaming, config_name, revision), **options
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
) -> Dataset | IterableDataset:
    """Gives a data set the columns `audio`, `text` and `language` that this package reads, and drops all others.

    Args:
        dataset: a data set with at least a column of audio.
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

    Raises:
        ValueError: if a column or language does not exist, files are missing, or no row is left.
    """
    dataset = _rename_columns(dataset, audio_column, text_column, language_column)
    has_language = "language" in _columns(dataset)
    if language is not None and has_language:
        dataset = _keep(dataset, "language", language)
    if isinstance(dataset, Dataset) and base_dir is not None:
        _check_files(dataset, Path(base_dir))
    decoder = _Decoder(sampling_rate, source_sampling_rate, base_dir, None if has_language else language)
    if max_seconds is not None:
        dataset = _filter(dataset, "audio", partial(decoder.fits, max_seconds))
    if isinstance(dataset, IterableDataset):
        dataset = dataset if max_samples is None else dataset.take(max_samples)
        return dataset.map(decoder, batched=True, batch_size=1)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    if len(dataset) == 0:
        raise ValueError("no clip is left to read; check the split, `max_seconds` and `max_samples`")
    return dataset.with_transform(decoder)


def _rename_columns(
    dataset: Dataset | IterableDataset,
    audio_column: str,
    text_column: str | None,
    language_column: str | None,
) -> Dataset | IterableDataset:
    """Renames the given columns to `audio`, `text` and `language`, and keeps the audio undecoded."""
    columns = _columns(dataset)
    if audio_column == "audio" and "audio" not in columns and "file_name" in columns:
        audio_column = "file_name"
    if language_column is None and "language" in columns:
        language_column = "language"
    wanted = ((audio_column, "audio"), (text_column, "text"), (language_column, "language"))
    names = {column: meaning for column, meaning in wanted if column is not None}
    for column, meaning in names.items():
        if column not in columns:
            raise ValueError(f"`{meaning}_column` must be one of {', '.join(columns)}, got {column!r}")
    if isinstance((dataset.features or {}).get(audio_column), Audio):
        dataset = dataset.cast_column(audio_column, UNDECODED)
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))


@dataclass
class _Decoder:
    """Decodes the `audio` of a batch of rows. It is a transform for `datasets` that worker processes can unpickle."""

    sampling_rate: int
    source_sampling_rate: int | None
    base_dir: str | Path | None
    language: str | None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = dict(batch)
        if "audio" in batch:
            rows["audio"] = [self.decode(source) for source in batch["audio"]]
            for audio, text in zip(rows["audio"], batch.get("text", ()), strict=False):
                if text is None:
                    raise ValueError(f"{audio['path']} has no text; remove it, or pass `text_column=None`")
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
        """Whether a clip is at most `max_seconds` long; only the header of a file is decoded."""
        name, content = read_audio(self.locate(source))
        if isinstance(content, bytes):
            with open_audio(content, name) as file:
                return file.frames / file.samplerate <= max_seconds
        return len(self.decode(source)["array"]) / self.sampling_rate <= max_seconds

    def locate(self, source: Any) -> Any:
        """Makes the path of `source` start from `base_dir`, if the audio is read from a path."""
        if self.base_dir is None:
            return source
        if isinstance(source, Mapping) and source.get("path") and not source.get("bytes"):
            return {**source, "path": _join(self.base_dir, source["path"])}
        return _join(self.base_dir, source) if isinstance(source, (str, Path)) else source


def _load_local(path: Path, split: str, streaming: bool) -> tuple[Dataset | IterableDataset, Path]:
    """Returns the data set at `path`, and the folder that its relative paths start from."""
    folder = path if path.is_dir() else path.parent
    table = _metadata(path) if path.is_dir() else path
    if table is None and (table := _metadata(path / split)) is not None:
        folder, split = path / split, "all"
    dataset: Dataset | IterableDataset
    if table is None:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_FILES)
        if not files:
            return _build(str(path), split, streaming), folder
        dataset = Dataset.from_dict({"audio": [file.relative_to(path).as_posix() for file in files]})
    elif table.suffix == ".parquet":
        dataset = _build("parquet", "train", streaming, data_files=str(table))
    else:
        dataset = Dataset.from_dict(_read_table(table))
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
    files = (folder / f"metadata{suffix}" for suffix in TABLES)
    return next((file for file in files if file.is_file()), None)


def _read_table(table: Path) -> dict[str, list[Any]]:
    """The columns of a CSV, TSV or JSONL file. All values of a CSV or TSV file are text, also "1" and "null"."""
    rows: list[dict[str, Any]] = []
    with table.open(encoding="utf-8-sig", newline="") as file:
        if table.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise ValueError(
                        f"line {number} of {table} must be a JSON object, got {line[:80]!r}"
                    ) from error
        elif table.suffix in TABLES:
            reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num} of {table} must have as many fields as line 1")
                rows.append(row)
        else:
            raise ValueError(f"a table must be one of {', '.join(TABLES)}, got {table}")
    if not rows:
        raise ValueError(f"{table} has no rows; it must have at least one")
    return {column: [row.get(column) for row in rows] for column in rows[0]}


def _build(
    name: str,
    split: str,
    streaming: bool,
    config_name: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Dataset | IterableDataset:
    """Loads a split with a builder of `datasets`, from the Hub or from a clone of a Hub data set."""
    builder = load_dataset_builder(name, config_name, revision=revision, **options)
    if type(builder).__name__ == "AudioFolder":
        raise ValueError(
            f"{name!r} consists of loose audio files, which `datasets` reads through torchcodec alone; pass "
            "revision 'refs/convert/parquet', the Hub's own conversion, or download it and pass the folder"
        )
    if streaming:
        return builder.as_streaming_dataset(split)
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _filter(
    dataset: Dataset | IterableDataset, column: str, keep: Callable[[Any], bool]
) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.filter(keep, input_columns=column)
    return dataset.select([row for row, value in enumerate(dataset[column]) if keep(value)])


def _keep(dataset: Dataset | IterableDataset, column: str, value: str) -> Dataset | IterableDataset:
    """Keeps the rows whose `column` has the given value."""
    kept = _filter(dataset, column, partial(operator.eq, value))
    if isinstance(kept, Dataset) and isinstance(dataset, Dataset) and not len(kept):
        found = ", ".join(sorted({str(other) for other in dataset[column]})[:20])
        raise ValueError(f"`{column}` must be one of those in the data ({found}), got {value!r}")
    return kept


def _check_files(dataset: Dataset, base_dir: Path) -> None:
    """Checks before hours of training that all files exist."""
    paths = [source for source in dataset["audio"] if isinstance(source, str) and "://" not in source]
    missing = [path for path in paths if not (base_dir / path).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(dataset)} audio files are missing in {base_dir}: {missing[0]}, ...; "
            "add them, or remove their rows"
        )


def _join(base_dir: str | Path, path: str | Path) -> str:
    return str(path) if "://" in str(path) else str(Path(base_dir) / path)

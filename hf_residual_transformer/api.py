"""The four verbs of this package: `compress`, `distill`, `evaluate` and `export`, from names or objects.

Each is a short way through the rooms below it, which are imported when a verb is called, so that loading and running a
compact model needs nothing but transformers. `from_dense`, the Trainers and `evaluate_asr` are the precise forms.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .classes import MODEL_TYPE_PREFIX, RECOGNIZERS, model_classes_of
from .configuration import ResidualConfig, ResidualConfigMixin
from .families import FAMILIES, REFUSED
from .modeling import ResidualMixin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .speech.metrics import EvaluationResult

WINDOWS, WINDOWS_WITH_DECODER = 16, 64  # to calibrate on; a decoder has few tokens in each
Q4_0 = ResidualConfig(
    group_size=1, rank=0, diagonal="none", shared_bits=4
)  # the numbers of whisper.cpp's format
SHUFFLE_BUFFER = 200  # clips of a stream
LOADING = ("config_name", "revision", "streaming")  # options that say how recordings are loaded
EXTRAS = {
    "speech": ("datasets", "fsspec", "jiwer", "scipy", "soundfile", "tqdm"),
    "export": ("onnx", "onnxruntime"),
    "train": ("accelerate", "datasets", "fsspec", "jiwer", "scipy", "soundfile", "tqdm", "yaml"),
}


def compress(
    model: str | PreTrainedModel,
    audio: Any,
    size: float | Sequence[float] | None = None,
    *,
    processor: Any = None,
    split: str = "train",
    language: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    num_windows: int | None = None,
    batch_size: int = 1,
    pack: float = 0.75,
    seed: int = 0,
    parts: Sequence[str] | None = None,
    bits: int | Sequence[int] | str | None = "auto",
    block_size: int | None = None,
    rotation: int | None = None,
    residual_config: ResidualConfig | None = None,
    whisper_cpp: bool = False,
    start: str = "calibrated",
    iterations: int | None = None,
    device: str | torch.device | None = None,
    low_memory: bool = False,
    distributed: bool = False,
    progress: bool = True,
) -> Any:
    """A compact model from a trained one and recordings like those that it will hear; transcripts are not read.

    Args:
        model: the id or folder of a dense speech model, or such a model, whose `processor` is then needed.
        audio: a folder of recordings, a data set id on the Hub, a table file, a `datasets` data set, or rows
            `{"audio": {"array", "sampling_rate"}}`. A few minutes are enough, but of several speakers. None for the
            start "svd", which needs none.
        size: bytes of the whole saved model relative to dense in 16 bits; by default 0.31. With `parts=("encoder",)`,
            `bits=None` or a `residual_config`, it is relative to the encoder's layers; by default 0.7 with `bits=None`,
            or what `residual_config` makes. Several sizes, such as (0.31, 0.25), give a list of models, for which the
            recordings are looked at once.
        processor: the model's; by default the one saved with it. It becomes `model.processor` of the result, and is
            saved with it.
        split: of the data to calibrate on.
        language: as the data writes it; keeps only its clips where the data says which language they are in.
        data_options: further options of `load_speech_dataset`, such as `{"max_seconds": 20}`. Data sets and rows have
            them too, but those that say how to load, such as `{"streaming": True}`.
        num_windows: windows of 30 seconds to calibrate on, as many inputs of the model. By default 64, of which the
            encoder uses 16, or 16 where the encoder alone becomes compact.
        batch_size: windows at a time, which changes memory and speed, but not the result.
        pack: part of the windows in which short clips are joined.
        seed: of the choice of recordings. Of those that come one by one, as from a stream or a generator, only the
            next 200 are shuffled at a time.
        parts: those of "encoder", "decoder" and "embed_tokens" that become compact; by default all that there are.
        bits: the most bits that a full matrix may have; all numbers of bits that it may have, such as (2, 4, 8), which
            ONNX Runtime has; or None for matrices in floating point. "auto" is 8.
        block_size: the number of weights that have one scale: 32, 64 or 128; by default 32.
        rotation: the number of inputs that are rotated together before a matrix is rounded, so that this loses less:
            16, 32, 64, 128 or 256, or 1 for none; by default 128. Fewer make a slightly faster model.
        residual_config: what to share, instead of what `size` chooses; `size` then chooses the ranks alone.
        whisper_cpp: whether a Whisper is given the form of whisper.cpp's q4_0, four bits for each weight and nothing
            else, fitted to the recordings. `export(..., format="ggml")` writes it without rounding again, and
            whisper.cpp runs it as its own. The form leaves nothing to choose, so that `size`, `parts`, `bits`,
            `block_size`, `rotation` and `residual_config` must not be set.
        start: "calibrated", or "svd", which looks at weights alone and is far worse.
        iterations: rounds of alternation for groups of layers that have no closed form.
        device: where a model that is given by name is put; by default a GPU if there is one.
        low_memory: whether the matrices of the dense model's layers stay in the CPU's memory, or where a given model
            has them, in their own precision. Each is then copied to `device` while it runs, which takes longer.
        distributed: whether all processes of `torch.distributed` compress together, each on its share of the windows.
            All call this with the same arguments, and all get the same model.
        progress: whether to show progress bars.

    Returns:
        A residual model in float32 and eval mode; see `from_dense`. `save_pretrained` saves it. A list of models where
        `size` is one of sizes.

    Raises:
        ImportError: when the packages of the extra "speech" are missing.
        ValueError: for a model that has no residual form, a missing processor, and as in `from_dense`.
    """
    require_extra("speech")
    from .speech.windows import calibration_batches

    if residual_config is not None and bits != "auto":
        raise ValueError(
            f"`bits` must not be set beside `residual_config`, which has its own `shared_bits`, got {bits!r}"
        )
    if whisper_cpp:
        chosen: dict[str, Any] = {
            "size": size,
            "parts": parts,
            "block_size": block_size,
            "rotation": rotation,
        }
        chosen |= {"bits": None if bits == "auto" else bits, "residual_config": residual_config}
        for name, value in chosen.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` must not be set with `whisper_cpp`, whose form is fixed, got {value!r}"
                )
    dense, processor = load_dense(model, processor, device=device, low_memory=low_memory)
    if whisper_cpp and type(dense).__name__ != "WhisperForConditionalGeneration":
        raise ValueError(
            f"`whisper_cpp` must be false for a {type(dense).__name__}, since whisper.cpp runs Whisper for speech "
            "recognition alone, got True"
        )
    calibration = None
    if audio is not None:
        rows = rows_of(audio, processor, split, language=language, text_column=None, options=data_options)
        # Among all of the data, which may be in order of speakers or languages.
        rows = _shuffled(rows, seed)
        if num_windows is None:
            decoder = residual_config is None and bits is not None and (parts is None or len(parts) > 1)
            num_windows = WINDOWS_WITH_DECODER if decoder and dense.can_generate() else WINDOWS
        calibration = calibration_batches(
            rows, processor, num_windows=num_windows, batch_size=batch_size, pack=pack
        )
    options: dict[str, Any] = {"parts": parts, "block_size": block_size, "rotation": rotation}
    if whisper_cpp:
        residual_config = Q4_0
        options |= {"decoder_residual_config": Q4_0, "embedding_bits": Q4_0.shared_bits}
    elif residual_config is None:
        options["shared_bits"] = bits
    if iterations is not None:
        options["iterations"] = iterations
    if low_memory:
        options["device"] = _checked_device(device)
    found = residual_class_of(dense).from_dense(
        dense,
        residual_config,
        calibration=calibration,
        start=start,
        budget=size,
        distributed=distributed,
        progress=progress,
        **options,
    )
    for residual in found if isinstance(found, list) else [found]:
        residual.processor = processor
    return found


def distill(
    student: str | PreTrainedModel,
    audio: Any,
    teacher: str | PreTrainedModel | None = None,
    *,
    steps: int = 60,
    processor: Any = None,
    split: str = "train",
    validation: Any = None,
    language: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    window_seconds: float | None = None,
    short_windows: bool = False,
    **training: Any,
) -> Any:
    """The compact model after a short distillation on recordings, whose transcripts are not read.

    Only the compact parts of `student` learn, in place: the decoder alone where encoder and decoder have few bits, and
    the encoder where the decoder is dense, or where short windows are learnt. A student that is given by name is
    trained without dropout, LayerDrop and SpecAugment, as the teacher runs.

    Args:
        student: a residual model, or the id or folder of one.
        audio: as in `compress`.
        teacher: the dense model that it was compressed from, or the id or folder of it. It is frozen, and put into
            eval mode.
        steps: of the optimizer.
        processor: the student's; by default the one that it has, or that is saved with it.
        split: of the data to train on.
        validation: recordings that are not trained on, such as the name of another split of `audio`, or rows. The
            student keeps its weights where the loss on them does not fall, and a warning says so, unless
            `keep="always"` is among the options of `training`.
        language: as in `compress`.
        data_options: as in `compress`.
        window_seconds: length of the windows that whole clips are packed into, by default 10 seconds, or 30 where
            the decoder learns alone.
        short_windows: whether a compact Whisper learns to hear a recording without the padding to 30 seconds, so that
            short recordings take a fraction of the time. The teacher hears the padding. The result has
            `config.short_windows`, and leaves out padding by itself, exported too. A student that has it keeps it.
        training: options of `RecipeArguments`, which has those of transformers' `Seq2SeqTrainingArguments`, such as
            `learning_rate`, which by default fits the student's size, and `per_device_train_batch_size`.

    Raises:
        ImportError: when the packages of the extra "train" are missing.
        ValueError: when the teacher is missing or does not fit the student, and when one of them is not in float32.
    """
    require_extra("train")
    from .speech.collators import is_multilingual
    from .speech.transcription import complete_token_ids
    from .training.recipe import (
        WITHOUT_NOISE,
        check_student,
        default_learning_rate,
        prepare_windows,
        restore_windows,
        short_distillation,
    )
    from .whisper import has_short_windows

    if teacher is None:
        raise ValueError("`teacher` must be the dense model that the student was compressed from, got None")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    if "output_dir" not in training and training.get("save_strategy", "no") != "no":
        raise ValueError(
            "`output_dir` must be given beside `save_strategy`, since checkpoints are deleted with the folder that is "
            f"used otherwise, got {training['save_strategy']!r}"
        )
    model, processor = _load_recognizer(student, processor, overrides=WITHOUT_NOISE)
    check_student(model)
    if isinstance(teacher, str | Path):
        teacher = load_model(teacher)
    loaded: Any = teacher
    for name, given in (("student", model), ("teacher", loaded)):
        dtype = str(given.dtype).removeprefix("torch.")
        if dtype != "float32":
            raise ValueError(
                f"`{name}` must be in float32 to be distilled, got {dtype}; pass {name}.float(), and save the result "
                "with half()"
            )
    if loaded.can_generate() and is_multilingual(loaded):
        complete_token_ids(loaded, getattr(processor, "tokenizer", None))
    had_windows = has_short_windows(model.config)
    collator = prepare_windows(model, processor, window_seconds, short_windows)
    read = partial(rows_of, processor=processor, language=language, text_column=None, options=data_options)
    rows = read(audio, split=split)
    if isinstance(validation, str) and isinstance(audio, str | Path):
        validation = read(audio, split=validation)
    elif validation is not None:
        validation = read(validation, split="validation")
    settings = {
        "max_steps": steps,
        "learning_rate": default_learning_rate(model, teacher),
        "report_to": "none",
        **training,
    }
    device, was_training = model.device, model.training
    with tempfile.TemporaryDirectory() as folder:
        outcome = short_distillation(
            model,
            teacher,
            list(rows) if isinstance(rows, Iterator) else rows,
            Path(settings.pop("output_dir", folder)),
            collator=collator,
            validation=list(validation) if isinstance(validation, Iterator) else validation,
            **settings,
        )
    restore_windows(model, outcome, had_windows)
    model.processor = processor
    return model.to(device).train(was_training)


def evaluate(
    model: str | PreTrainedModel,
    data: Any,
    *,
    processor: Any = None,
    split: str = "test",
    language: str | None = None,
    task: str = "transcribe",
    text_column: str = "text",
    data_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    keep_marks: bool = False,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> EvaluationResult:
    """Word and character error rates of a model, dense or residual, on recordings with transcripts.

    Args:
        model: a Whisper or CTC model, or the id or folder of one.
        data: as `audio` in `compress`, with transcripts.
        processor: the model's; by default the one that it has, or that is saved with it.
        split: of the data to evaluate on.
        language: as the data writes it; see `evaluate_asr`.
        task: of a multilingual Whisper, "transcribe", or "translate" for references in English.
        text_column: the column with the transcripts.
        data_options: as in `compress`.
        batch_size: clips at a time.
        max_new_tokens: limit of a transcript's length in tokens; by default the model's own.
        keep_marks: keeps the vowel signs of scripts such as Devanagari and Thai; see `evaluate_asr`.
        device: where a model that is given by name is put; by default a GPU if there is one.
        dtype: of a model that is given by name.
        progress: shows a progress bar.

    Raises:
        ImportError: when the packages of the extra "speech" are missing.
        ValueError: as in `evaluate_asr`, and when the processor is missing.
    """
    require_extra("speech")
    from .speech.metrics import evaluate_asr

    recognizer, processor = _load_recognizer(model, processor, device=device, dtype=dtype)
    rows = rows_of(data, processor, split, language=language, text_column=text_column, options=data_options)
    return evaluate_asr(
        recognizer,
        processor,
        rows,
        batch_size=batch_size,
        language=language,
        task=task,
        max_new_tokens=max_new_tokens,
        keep_marks=keep_marks,
        progress=progress,
    )


def export(
    model: str | PreTrainedModel,
    out: str | Path,
    *,
    format: str = "onnx",
    processor: Any = None,
    floats: str = "float16",
    accuracy_level: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a Whisper, dense or compact, for runtimes that need no PyTorch, and returns the folder.

    The folder has the layout and the names of optimum and of the models of onnx-community. Matrices in few bits become
    block-quantised operators of ONNX Runtime, which have 2, 4 or 8 bits. Other matrices are stored in the next of these
    and keep their numbers, and a warning says so.

    Args:
        model: a Whisper for transcription, or the id or folder of one.
        out: folder for the exported model; it must be empty or new. If it cannot be written whole, it stays as it was.
        format: "onnx"; "sherpa-onnx", the same matrices in the two graphs that sherpa-onnx reads; or "ggml" for
            whisper.cpp. The last takes compact models whose matrices are blocks of at most four bits and nothing else,
            no low rank and no diagonal, and stores them as q4_0 without rounding again.
        processor: the model's; by default the one that it has, or that is saved with it.
        floats: how weights that are not quantised are stored, "float16" or "float32". Products are in float32.
        accuracy_level: 4 rounds the inputs of matrices in few bits to 8 bits, in blocks; 0 does not. By default it is 4
            in the decoder, which is several times as fast so, and 0 in the encoder, which is not.
        overwrite: whether `out` may hold files; those of the same name are replaced.

    Raises:
        ImportError: when the packages of the extra "export" are missing.
        FileExistsError: when `out` holds files, and for the folder of a checkpoint even with `overwrite`.
        ValueError: for a model that has no exported form, a missing processor, a tokenizer without the tokens of
            languages and tasks that the runtime needs, and where the ONNX Runtime that is installed cannot load the
            result.
    """
    require_extra("export")
    from .exporting.folder import export_model, prepare_export_dir

    prepare_export_dir(out, overwrite)  # before a model is loaded for nothing
    loaded, processor = _load_recognizer(model, processor, device="cpu")
    return export_model(
        loaded,
        processor,
        out,
        format=format,
        floats=floats,
        accuracy_level=accuracy_level,
        overwrite=overwrite,
    )


def require_extra(extra: str) -> None:
    """Raises ImportError with the command that installs them where packages of an extra are missing."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'this needs {", ".join(missing)}: pip install "hf-residual-transformer[{extra}]"',
            name=missing[0],
        )


def residual_class_of(dense: PreTrainedModel) -> Any:
    """The residual class whose dense class is the model's.

    Raises:
        ValueError: for a model that has none, or is residual already.
    """
    if isinstance(dense, ResidualMixin):
        raise ValueError(
            f"`model` must be a dense model, got {type(dense).__name__}, a {type(dense.config).model_type}; "
            "merge() gives the dense form of a residual one"
        )
    model_type = dense.config.model_type
    for cls in model_classes_of(FAMILIES[model_type]).values() if model_type in FAMILIES else ():
        if cls.dense_class() is type(dense):
            return cls
    raise _not_supported(type(dense).__name__, model_type)


def load_dense(
    model: str | Path | PreTrainedModel,
    processor: Any = None,
    *,
    device: Any = None,
    low_memory: bool = False,
) -> tuple[Any, Any]:
    """A dense model that has a residual form, in float32 or with `low_memory` as it is stored, and its processor.

    Raises:
        ValueError: for a model without a residual form, an adapter, or a model that is given without a processor.
    """
    import torch
    from transformers import AutoProcessor

    from .compression.inputs import frozen_view, refuse_adapter

    refuse_adapter(model)
    if not isinstance(model, str | Path):
        residual_class_of(model)
        processor = _processor_of(model, processor)
        # The caller's model is not to change, and the weights of a view in float32 are its own.
        loaded = frozen_view(model, lent=[model]) if low_memory else frozen_view(model).float()
        loaded.processor = processor  # it names the tokens of languages where the generation config does not
        return loaded, processor
    config = _config_of(model)
    dense_class = _dense_class_for(config, str(model))
    if processor is None:
        processor = AutoProcessor.from_pretrained(model)
    if low_memory:
        return dense_class.from_pretrained(model, dtype="auto"), processor
    place = _checked_device(device)
    return dense_class.from_pretrained(model, dtype=torch.float32).to(place), processor


def _config_of(model: str | Path) -> Any:
    """The config of a model by name. Only where there is none, the Hub is asked whether the name is an adapter's."""
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        adapter = None
        with suppress(OSError, ValueError):
            adapter = find_adapter_config_file(str(model))
        if adapter is None:
            raise
        raise ValueError(
            f"`model` must be a whole model without an adapter, got {str(model)!r}, an adapter: merge the adapter "
            "first, and pass the model that merge_and_unload() of PEFT gives"
        ) from error


def load_model(model: str | Path, *, dtype: str = "float32", **overrides: Any) -> Any:
    """A speech recogniser through the Auto class that its config calls for; `overrides` are of
    its config, and those that it does not have do not count."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    auto = next((auto for auto in RECOGNIZERS if type(config) in auto._model_mapping), None)
    if auto is None:
        raise ValueError(f"`model` must be a speech recogniser, got {str(model)!r}, a {config.model_type}")
    return auto.from_pretrained(
        model, dtype=dtype, **{k: v for k, v in overrides.items() if hasattr(config, k)}
    )


def load_compact(model: str | Path) -> Any:
    """A compact model of any class, as it was saved.

    Raises:
        ValueError: for a model that is not compact.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    family = FAMILIES.get(type(config).model_type.removeprefix(MODEL_TYPE_PREFIX))
    classes = [] if family is None else model_classes_of(family).values()
    for cls in classes if isinstance(config, ResidualConfigMixin) else ():
        if cls.__name__ in (config.architectures or ()):
            return cls.from_pretrained(model, dtype="auto")
    raise ValueError(
        f"`model` must be a compact model as from `hrt compress`, got {str(model)!r}, a "
        f"{' or '.join(config.architectures or [config.model_type])}"
    )


def rows_of(
    audio: Any,
    processor: Any,
    split: str,
    *,
    language: str | None = None,
    text_column: str | None = "text",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Rows of decoded recordings at the model's rate, from whatever form of `audio` the verbs take.

    Raises:
        ValueError: for an option that this form of `audio` cannot have, and as in `load_speech_dataset`.
    """
    from datasets import Dataset, DatasetDict, IterableDataset

    from .speech.datasets import decoder_of, load_speech_dataset, prepare_rows, prepare_speech_dataset

    rate = processor.feature_extractor.sampling_rate
    chosen = dict(options or {})
    settings = {"sampling_rate": rate, "text_column": text_column, "language": language, **chosen}
    if isinstance(audio, str | Path):
        return load_speech_dataset(audio, split, **settings)
    if isinstance(audio, DatasetDict):
        if split not in audio:
            raise ValueError(f"`split` must be one of {', '.join(audio)}, got {split!r}")
        audio = audio[split]
    if isinstance(audio, Mapping) or not isinstance(audio, Iterable):
        raise ValueError(
            "`audio` must be a folder, a data set id, a table file, a data set, or rows with an 'audio' each, got "
            f"{type(audio).__name__}"
        )
    if isinstance(audio, Dataset) and audio.format["type"] == "custom" and decoder_of(audio) is None:
        if text_column not in (None, "text"):
            chosen["text_column"] = text_column
        return _rows_of_own_transform(audio, language, chosen)
    for name in LOADING:
        if settings.pop(name, None):
            raise ValueError(
                f"`{name}` must not be set for recordings that are loaded already, got {chosen[name]!r}"
            )
    if isinstance(audio, Dataset | IterableDataset):
        return prepare_speech_dataset(audio, **settings)
    rows = prepare_rows(audio, **settings)
    return list(rows) if isinstance(audio, Sequence) else rows


def _rows_of_own_transform(dataset: Any, language: str | None, chosen: Mapping[str, Any]) -> Any:
    """A data set whose transform gives rows as they are to be; those in a language, or that do not say in which."""
    for name, value in chosen.items():
        if value is not None and value is not False:
            raise ValueError(
                f"`{name}` must not be set for a data set with a transform of its own, got {value!r}; let the "
                "transform give rows as they are to be, or take it away"
            )
    first = dataset[0] if len(dataset) else {"audio": {}}
    if not isinstance(first.get("audio"), Mapping):
        raise ValueError(
            f"`audio` must have rows with an 'audio' each, but its own transform gives {', '.join(sorted(first))}; "
            "take the transform away with with_format(None)"
        )
    if language is None:
        return dataset
    kept = [number for number, row in enumerate(dataset) if (row.get("language") or language) == language]
    if not kept:
        raise ValueError(f"`language` must be one of those in the data, got {language!r}")
    return dataset.select(kept)


def _shuffled(rows: Any, seed: int) -> Any:
    """Rows in random order; of those that come one by one, only some are in memory."""
    import numpy as np
    from datasets import Dataset, IterableDataset

    if isinstance(rows, IterableDataset):
        return rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    if isinstance(rows, Dataset):
        return rows.shuffle(seed=seed)
    generator = np.random.default_rng(seed)
    if isinstance(rows, Sequence):
        return [rows[number] for number in generator.permutation(len(rows))]
    return _shuffled_stream(rows, generator)


def _shuffled_stream(rows: Iterable[Any], generator: Any) -> Iterator[Any]:
    held: list[Any] = []
    for row in rows:
        held.append(row)
        if len(held) > SHUFFLE_BUFFER:
            yield held.pop(generator.integers(len(held)))
    generator.shuffle(held)
    yield from held


def _load_recognizer(
    model: Any, processor: Any, *, device: Any = None, dtype: str = "float32", overrides: Any = None
) -> tuple[Any, Any]:
    from transformers import AutoProcessor

    if not isinstance(model, str | Path):
        return model, _processor_of(model, processor)
    if processor is None:
        processor = AutoProcessor.from_pretrained(model)
    place = _checked_device(device)
    return load_model(model, dtype=dtype, **(overrides or {})).to(place), processor


def _processor_of(model: Any, processor: Any) -> Any:
    processor = getattr(model, "processor", None) if processor is None else processor
    if processor is None:
        raise ValueError(
            "`processor` must be the model's where a model is given, got None; "
            "AutoProcessor.from_pretrained(...) loads it"
        )
    return processor


def _dense_class_for(config: Any, name: str) -> Any:
    """The dense class to load a checkpoint with: the one that it was saved from, or its family's recogniser."""
    # The class's, since a residual model's config calls itself dense.
    model_type = type(config).model_type
    if model_type not in FAMILIES:
        raise _not_supported(repr(name), model_type)
    classes = {auto: cls.dense_class() for auto, cls in model_classes_of(FAMILIES[model_type]).items()}
    known = {cls.__name__: cls for cls in classes.values()}
    names = list(config.architectures or ())
    if not names:
        names = [classes[auto].__name__ for auto in RECOGNIZERS if auto in classes]
    for architecture in names:
        if architecture in known:
            return known[architecture]
    raise ValueError(
        f"`model` must be a {' or '.join(known)}, got {name!r}, a {model_type} "
        f"({', '.join(names) or 'of no known class'})"
    )


def _not_supported(name: str, model_type: str) -> ValueError:
    reason = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
    return ValueError(
        f"`model` must be a dense model of {', '.join(FAMILIES)}, got {name}, a {model_type}{reason}"
    )


def _checked_device(device: Any) -> torch.device:
    """A device, by default a GPU if there is one.

    Raises:
        ValueError: for one that is not here.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`device` must be one that torch can use here, such as cpu, got {device!r} ({reason})"
        ) from error
    if found.type == "meta":
        raise ValueError("`device` must be one that computes, such as cpu, got 'meta'")
    return found

"""Runs of distillation and fine-tuning from names to a saved model, as the command line and `scripts/` start them, and
what a run leaves in its output folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    ParakeetFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    set_seed,
)
from transformers.utils import logging

from ..adapters import add_lora
from ..configuration import ResidualConfig
from ..folders import (
    adopt,
    model_bytes,
    prepare_output_dir,
    require_space,
    save_processor,
    set_checkpoints_aside,
    unfinished,
)
from ..speech.collators import CTCCollator, Seq2SeqCollator, collator_for
from ..speech.datasets import refuse_long_clips
from ..whisper import has_short_windows
from .arguments import DistillationArguments, TrainingDataArguments, read_json, warn_of_slow_bfloat16
from .checkpoints import bytes_to_write
from .clips import checked
from .recipe import (
    check_student,
    default_learning_rate,
    is_whisper,
    prepare_windows,
    rates_for_short_windows,
    restore_windows,
    trainer_class_for,
    without_noise,
)
from .scratch import (
    EncoderSizes,
    ModelSizes,
    ScratchTrainer,
    check_average,
    check_transcripts,
    load_average,
    new_model,
    new_processor,
    train_tokenizer,
)
from .scratch_ctc import CTCSizes, new_ctc_model, new_ctc_processor
from .scratch_parakeet import (
    Head,
    ParakeetSizes,
    TransducerTrainer,
    check_head,
    new_parakeet,
    new_parakeet_processor,
)
from .trainers import CTCDistillationTrainer, DistillationTrainer, Seq2SeqDistillationTrainer

logger = logging.get_logger(__name__)
OF_LOADING = (
    "num_labels",
    "attn_implementation",
)  # which `from_pretrained` takes beside the fields of a config
CASES: dict[str, Callable[[str], str]] = {"keep": str, "upper": str.upper, "lower": str.lower}


def run_distillation(
    student_id: str,
    teacher_id: str,
    distillation: DistillationArguments,
    data: TrainingDataArguments,
    args: Any,
    *,
    window_seconds: float | None = None,
    short_windows: bool = False,
    task: str = "transcribe",
    overwrite: bool = False,
) -> None:
    """Distils the model `teacher_id` into the residual one `student_id`, and saves it in `args.output_dir`.

    Args:
        distillation: the losses.
        data: the recordings; transcripts are read only where a loss needs them.
        args: `RecipeArguments`.
        window_seconds: length of the windows that whole clips are packed into, by default `WINDOW_SECONDS`.
        short_windows: as in `hrt.distill`.
        task: what the transcripts are to a multilingual Whisper.
        overwrite: writes into a folder that already holds files.

    Raises:
        ValueError: for `window_seconds` or `short_windows` beside a loss on transcripts, and as in `prepare_windows`
            and `DistillationTrainer`.
    """
    _prepare(args, overwrite)
    with_text = "labels" in distillation.weights
    if with_text and window_seconds is not None:
        raise ValueError(
            "`window_seconds` must not be set with losses on transcripts, since a transcript belongs to one clip; "
            "leave it out"
        )
    if with_text and short_windows:
        raise ValueError(
            "`short_windows` must be false with losses on transcripts, which do not say what dense hears in the full "
            "window; distil without them first"
        )
    config = AutoConfig.from_pretrained(student_id)
    auto_class: Any = AutoModelForSpeechSeq2Seq if is_whisper(config) else AutoModelForCTC
    overrides = without_noise(config)
    student = auto_class.from_pretrained(student_id, dtype=torch.float32, **overrides)
    check_student(student)
    teacher = auto_class.from_pretrained(teacher_id, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(student_id)
    had_windows = has_short_windows(config)
    collator: Any
    if with_text:
        collator = collator_for(student, processor, language=data.language, task=task)
    else:
        collator = prepare_windows(student, processor, window_seconds, short_windows)
    train_dataset, eval_dataset = data.load_splits(processor, args.seed, with_text=with_text)
    if with_text:
        collator = checked(student, collator, train_dataset, eval_dataset)
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(student, teacher)
    if distillation.learning_rates is None:
        rates = rates_for_short_windows(student, args.learning_rate)
        distillation = replace(distillation, learning_rates=rates)
    trainer = trainer_class_for(student)(
        model=student,
        teacher=teacher,
        args=args,
        distillation=distillation,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        run_data=asdict(data)
        | {
            "task": task,
            "window_seconds": window_seconds,
            "short_windows": has_short_windows(student.config),
        },
    )
    train_and_save(
        trainer, lambda: restore_windows(student, trainer.outcome, had_windows), _stored_dtype(config)
    )


def run_seq2seq_finetuning(
    model_id: str,
    data: TrainingDataArguments,
    args: Any,
    *,
    task: str = "transcribe",
    freeze: str = "none",
    learning_rates: str | None = None,
    lora_rank: int | None = None,
    overwrite: bool = False,
) -> None:
    """Fine-tunes a Whisper model, residual or dense, and saves it in `args.output_dir`.

    Args:
        data: clips with transcripts, or with translations.
        args: `Seq2SeqTrainingArguments`.
        task: "transcribe", or "translate" for texts in English.
        freeze: "none", or what does not learn and gets no adapters: "encoder" or "decoder".
        learning_rates: as in `DistillationArguments`.
        lora_rank: of LoRA adapters of PEFT, which then learn alone and are merged into the model at the end; None for
            none.
        overwrite: writes into a folder that already holds files.
    """
    _check_lora_rank(lora_rank)
    _prepare(args, overwrite)
    stored = _stored_dtype(AutoConfig.from_pretrained(model_id))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(model_id, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_id)
    if freeze != "none":
        frozen = model.get_encoder() if freeze == "encoder" else model.get_decoder()
        frozen.requires_grad_(False)
    collator = collator_for(model, processor, language=data.language, task=task)
    trainer_class = Seq2SeqDistillationTrainer
    without_lora = None if freeze == "none" else rf".*\.{freeze}\..*"
    options = {"task": task}, args, learning_rates, lora_rank, stored, without_lora
    _finetune(trainer_class, model, processor, collator, data, *options)


def run_ctc_finetuning(
    model_id: str,
    data: TrainingDataArguments,
    args: Any,
    *,
    text_case: str = "keep",
    remove: str = "",
    freeze_feature_encoder: bool = True,
    config_overrides: str | None = None,
    learning_rates: str | None = None,
    lora_rank: int | None = None,
    overwrite: bool = False,
) -> None:
    """Fine-tunes a model with CTC, such as a wav2vec2 or a Parakeet, residual or dense, and saves it in
    `args.output_dir`.

    Args:
        data: clips with transcripts.
        args: `TrainingArguments`.
        text_case: the vocabulary's case, "keep", "upper" or "lower", that transcripts are changed to.
        remove: regular expression of what is then removed from transcripts.
        freeze_feature_encoder: keeps the convolutions over samples as they are; a model that reads a spectrogram has
            none.
        config_overrides: values of the model's config to change, as JSON.
        learning_rates: as in `DistillationArguments`.
        lora_rank: of LoRA adapters of PEFT, which then learn alone and are merged into the model at the end; None for
            none.
        overwrite: writes into a folder that already holds files.
    """
    overrides = read_json("config_overrides", config_overrides or "{}")
    normalize = _speller(text_case, remove)
    _check_lora_rank(lora_rank)
    _prepare(args, overwrite)
    config = AutoConfig.from_pretrained(model_id)
    known = {*config.to_dict(), *config.attribute_map, *OF_LOADING} - {"dtype", "model_type", "architectures"}
    if not isinstance(overrides, dict) or not set(overrides) <= known:
        raise ValueError(
            f"`config_overrides` must be a JSON object with fields of a {config.model_type}'s config, got "
            f"{config_overrides!r}"
        )
    stored = _stored_dtype(config)
    model = AutoModelForCTC.from_pretrained(model_id, dtype=torch.float32, **overrides)
    processor = AutoProcessor.from_pretrained(model_id)
    if freeze_feature_encoder and hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()
    collator = CTCCollator(processor, normalize)
    trainer_class = CTCDistillationTrainer
    options = {"spelling": [text_case, remove]}, args, learning_rates, lora_rank, stored
    _finetune(trainer_class, model, processor, collator, data, *options, normalize=normalize)


def run_ctc_training(
    sizes: CTCSizes,
    data: TrainingDataArguments,
    args: Any,
    *,
    residual: str | None = None,
    text_case: str = "keep",
    remove: str = "",
    average_checkpoints: int = 1,
    divide_shared_rate: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains a wav2vec2 with CTC from scratch, and saves it in `args.output_dir`.

    Args:
        sizes: of the model.
        data: clips with transcripts; streamed data is not read here.
        args: `TrainingArguments`.
        residual, average_checkpoints, divide_shared_rate, overwrite: as in `run_training`.
        text_case, remove: as in `run_ctc_finetuning`; the vocabulary is the characters that are left in the training
            split.

    Raises:
        ValueError: naming the clip or the option, before training starts.
    """

    def make(texts: list[str], residual_config: ResidualConfig | None) -> tuple[Any, Any]:
        processor = new_ctc_processor(texts)
        return processor, new_ctc_model(sizes, processor.tokenizer, residual_config)

    options = residual, text_case, remove, average_checkpoints, divide_shared_rate, overwrite
    rate = Wav2Vec2FeatureExtractor().sampling_rate
    _train_along_frames(CTCDistillationTrainer, make, rate, sizes, data, args, *options)


def run_parakeet_training(
    sizes: ParakeetSizes,
    data: TrainingDataArguments,
    args: Any,
    *,
    head: Head = "ctc",
    residual: str | None = None,
    vocab_size: int = 1024,
    text_case: str = "keep",
    remove: str = "",
    average_checkpoints: int = 1,
    divide_shared_rate: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains a Parakeet from scratch, and saves it in `args.output_dir`.

    Args:
        sizes: of the model.
        data: clips with transcripts; streamed data is not read here.
        args: `TrainingArguments`.
        head: "ctc", "rnnt" or "tdt".
        residual, vocab_size, average_checkpoints, divide_shared_rate, overwrite: as in `run_training`.
        text_case, remove: as in `run_ctc_finetuning`.

    Raises:
        ValueError: naming the clip or the option, before training starts; for "rnnt" without torchaudio too.
    """
    check_head(head)

    def make(texts: list[str], residual_config: ResidualConfig | None) -> tuple[Any, Any]:
        processor = new_parakeet_processor(texts, vocab_size, head, sizes)
        return processor, new_parakeet(sizes, head, processor.tokenizer, residual_config)

    trainer_class = CTCDistillationTrainer if head == "ctc" else TransducerTrainer
    options = residual, text_case, remove, average_checkpoints, divide_shared_rate, overwrite
    rate = ParakeetFeatureExtractor().sampling_rate
    _train_along_frames(trainer_class, make, rate, sizes, data, args, *options)


def _train_along_frames(
    trainer_class: Any,
    make: Callable[[list[str], ResidualConfig | None], tuple[Any, Any]],
    sampling_rate: int,
    sizes: EncoderSizes,
    data: TrainingDataArguments,
    args: Any,
    residual: str | None,
    text_case: str,
    remove: str,
    average_checkpoints: int,
    divide_shared_rate: bool,
    overwrite: bool,
) -> None:
    """Trains and saves a new model that writes a text along its frames; `make` makes its processor and itself from the
    texts of the training split.
    """
    residual_config = _residual_config(residual)
    check_average(average_checkpoints, args)
    normalize = _speller(text_case, remove)
    _prepare(args, overwrite)
    splits = _whole_splits(data, sampling_rate)
    processor, model = make([normalize(text) for text in splits[0]["text"]], residual_config)
    run_data = _run_data(data, sizes, text_case, remove)
    collator = CTCCollator(processor, normalize)
    trainer = _labels_trainer(
        trainer_class,
        model,
        processor,
        collator,
        splits,
        run_data,
        args,
        divide_shared_rate=divide_shared_rate,
    )
    train_and_save(trainer, partial(load_average, model, Path(args.output_dir), average_checkpoints))


def run_training(
    sizes: ModelSizes,
    data: TrainingDataArguments,
    args: Any,
    *,
    residual: str | None = None,
    vocab_size: int = 1024,
    ctc_weight: float = 0.3,
    average_checkpoints: int = 1,
    divide_shared_rate: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains a Whisper-type model from scratch, and saves it in `args.output_dir`.

    Args:
        sizes: of the model.
        data: clips with transcripts, or with translations; streamed data is not read here.
        args: `Seq2SeqTrainingArguments`.
        residual: fields of `ResidualConfig` as JSON; None for a dense model.
        vocab_size: tokens of the vocabulary, which is trained on the texts of the training split.
        ctc_weight: as in `ScratchTrainer`.
        average_checkpoints: the model is the mean of the last so many checkpoints.
        divide_shared_rate: as in `GuardedTrainer`.
        overwrite: writes into a folder that already holds files.

    Raises:
        ValueError: naming the clip or the option, before training starts.
    """
    residual_config = _residual_config(residual)
    check_average(average_checkpoints, args)
    _prepare(args, overwrite)
    train_dataset, eval_dataset = _whole_splits(data, WhisperFeatureExtractor().sampling_rate)
    tokenizer = train_tokenizer(train_dataset["text"], vocab_size)
    for name, split in ((data.train_split, train_dataset), (data.eval_split, eval_dataset)):
        if split is not None:
            refuse_long_clips(split, sizes.window_seconds)
            clips = ((f"clip {index} of split {name!r}", text) for index, text in enumerate(split["text"]))
            check_transcripts(clips, tokenizer, sizes, with_ctc=ctc_weight > 0)
    model = new_model(sizes, tokenizer, residual_config)
    processor = new_processor(tokenizer, sizes)
    args.remove_unused_columns = False  # the collator reads columns that no model does
    trainer = ScratchTrainer(
        model=model,
        args=args,
        ctc_weight=ctc_weight,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Seq2SeqCollator(processor, multilingual=False),
        processing_class=processor,
        run_data=_run_data(data, sizes),
        divide_shared_rate=divide_shared_rate,
    )
    train_and_save(trainer, partial(trainer.finish, average_checkpoints))


def _run_data(data: TrainingDataArguments, sizes: EncoderSizes, *spelling: str) -> dict[str, Any]:
    """What a checkpoint of a model from scratch remembers: its data, and what its weights do not show, as masks."""
    return asdict(data) | {"sizes": asdict(sizes), "spelling": list(spelling)}


def _residual_config(residual: str | None) -> ResidualConfig | None:
    return None if residual is None else ResidualConfig.from_dict(read_json("residual", residual))


def _whole_splits(data: TrainingDataArguments, sampling_rate: int) -> tuple[Any, Any]:
    """The data to train on and to evaluate on, whose texts can be read before training starts."""
    if data.streaming:
        raise ValueError(
            "`streaming` must be false, since the vocabulary is trained on all texts first, got true"
        )
    return data.load(data.train_split, sampling_rate), data.load_eval_split(sampling_rate, with_text=True)


def respell(text: str, case: str, remove: str) -> str:
    """The text in another case, then without what `remove` matches, and with single spaces."""
    return " ".join(re.sub(remove, "", CASES[case](text)).split())


def _speller(case: str, remove: str) -> Callable[[str], str]:
    """`respell` with these options.

    Raises:
        ValueError: for what is no regular expression.
    """
    try:
        re.compile(remove)
    except re.error as error:
        raise ValueError(f"`remove` must be a regular expression, got {remove!r} ({error})") from error
    return partial(respell, case=case, remove=remove)


def _check_left(texts: Iterable[str], normalize: Callable[[str], str]) -> None:
    """Checks that transcripts have something left to learn from.

    Raises:
        ValueError: if no transcript has; if only some have nothing left, it is a warning.
    """
    texts = [text for text in texts if text.strip()]
    emptied = [text for text in texts if not normalize(text)]
    if not emptied:
        return
    of_all = f"{len(emptied)} of {len(texts)} transcripts"
    said = f"`text_case` and `remove` leave nothing of {of_all}, such as {emptied[0]!r}"
    if len(emptied) == len(texts):
        raise ValueError(f"{said}; the case is changed first, so `remove` must name characters of that case")
    logger.warning(f"{said}, which the model learns to be silent for")


def _check_lora_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ValueError(
            f"`lora_rank` must be at least 1, got {rank}; leave it out to train without adapters"
        )


def _stored_dtype(config: Any) -> torch.dtype | None:
    """The dtype of a checkpoint, from its config, before it is loaded in another; None where it does not say."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else None


def _prepare(args: Any, overwrite: bool) -> None:
    warn_of_slow_bfloat16(args)
    prepare_output_dir(args.output_dir, overwrite, resume=args.resume_from_checkpoint is not None)
    set_seed(args.seed)


def _finetune(
    trainer_class: type[DistillationTrainer],
    model: Any,
    processor: Any,
    collator: Any,
    data: TrainingDataArguments,
    texts: dict[str, Any],
    args: Any,
    learning_rates: str | None,
    lora_rank: int | None,
    stored: torch.dtype | None,
    without_lora: str | None = None,
    normalize: Callable[[str], str] | None = None,
) -> None:
    """Trains on labels alone, without a teacher, and saves in the dtype in which the model was `stored`. Modules whose
    path matches `without_lora` get no adapters. Checkpoints remember `texts`, what was told about the transcripts.
    `normalize` is what the collator does to each transcript.
    """
    if lora_rank is not None:
        model = add_lora(model, lora_rank, exclude_modules=without_lora)
    splits = data.load_splits(processor, args.seed)
    if normalize is not None and isinstance(splits[0], Dataset):
        _check_left(splits[0]["text"], normalize)
    run_data = asdict(data) | texts
    trainer = _labels_trainer(
        trainer_class, model, processor, collator, splits, run_data, args, learning_rates
    )

    def merge() -> None:
        trainer.model = trainer.model.merge_and_unload()

    train_and_save(trainer, None if lora_rank is None else merge, stored)


def _labels_trainer(
    trainer_class: Any,
    model: Any,
    processor: Any,
    collator: Any,
    splits: tuple[Any, Any],
    run_data: dict[str, Any],
    args: Any,
    learning_rates: str | None = None,
    divide_shared_rate: bool = False,
) -> Any:
    """A Trainer on labels alone, of a class that distils or of another."""
    train_dataset, eval_dataset = splits
    collator = checked(model, collator, train_dataset, eval_dataset)
    args.remove_unused_columns = False  # the collator reads columns that no model does
    losses = {}
    if issubclass(trainer_class, DistillationTrainer):
        losses["distillation"] = DistillationArguments(
            final_weight=0.0, logits_weight=0.0, labels_weight=1.0, learning_rates=learning_rates
        )
    return trainer_class(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        run_data=run_data,
        divide_shared_rate=divide_shared_rate,
        **losses,
    )


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers, also those that no checkpoint has, such as sinusoids."""
    return [*model.parameters(), *model.buffers()]


def _drop_half_written(path: Path) -> None:
    """Removes a file of metrics that a killed run left in pieces; `save_metrics` would fail to read it."""
    try:
        if path.is_file():
            json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        logger.warning(f"{path} was not written whole by an earlier run, and is written anew")
        path.unlink()


def train_and_save(
    trainer: Any, finish: Callable[[], None] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Trains, or goes on from `resume_from_checkpoint` ("last" is the newest in its folder), and leaves the model, its
    processor, the trainer's log and the results in the output folder. Checkpoints of an earlier run are set aside.
    With `push_to_hub`, the folder is uploaded when the model is complete in it.

    Args:
        trainer: of any kind.
        finish: called between training and saving.
        dtype: of the parameters as they are saved; by default their own. FSDP and DeepSpeed keep theirs.
    """
    output_dir = Path(trainer.args.output_dir)
    require_space(output_dir, bytes_to_write(trainer, model_bytes(trainer.model)))
    if trainer.args.resume_from_checkpoint is None and trainer.is_world_process_zero():
        set_checkpoints_aside(output_dir)
    trainer.accelerator.wait_for_everyone()
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if finish is not None:
        finish()
    new = unfinished(output_dir)
    if trainer.is_world_process_zero() and new.is_dir():
        shutil.rmtree(new)  # of an earlier run, as `prepare_output_dir` said
    trainer.accelerator.wait_for_everyone()
    own = trainer.model.dtype
    rounds = dtype not in (None, own) and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    exact = [tensor.detach().cpu().clone() for tensor in _tensors(trainer.model)] if rounds else []
    if rounds:
        trainer.model.to(dtype)
    trainer.save_model(str(new), _internal_call=True)  # without a push, which follows
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        save_processor(trainer.processing_class, new)
        adopt(new, output_dir)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.push_to_hub("Model save")
    if rounds:
        with torch.no_grad():
            for tensor, value in zip(_tensors(trainer.model.to(own)), exact, strict=True):
                tensor.copy_(value)
    if trainer.is_world_process_zero():
        _drop_half_written(output_dir / "all_results.json")
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

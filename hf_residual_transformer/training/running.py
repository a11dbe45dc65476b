"""Runs of distillation and fine-tuning from names to a saved model, as the command line and `scripts/` start them, and
what a run leaves in its output folder.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperFeatureExtractor,
    set_seed,
)

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
from ..speech.windows import WindowCollator
from .arguments import DistillationArguments, TrainingDataArguments, read_json
from .checkpoints import bytes_to_write
from .clips import checked
from .recipe import WINDOW_SECONDS, default_learning_rate, trainer_class_for, without_noise
from .scratch import ModelSizes, ScratchTrainer, check_transcripts, new_model, new_processor, train_tokenizer
from .trainers import CTCDistillationTrainer, DistillationTrainer, Seq2SeqDistillationTrainer

CASES: dict[str, Callable[[str], str]] = {"keep": str, "upper": str.upper, "lower": str.lower}


def run_distillation(
    student_id: str,
    teacher_id: str,
    distillation: DistillationArguments,
    data: TrainingDataArguments,
    args: Any,
    *,
    window_seconds: float | None = None,
    task: str = "transcribe",
    overwrite: bool = False,
) -> None:
    """Distils the model `teacher_id` into the residual one `student_id`, and saves it in `args.output_dir`.

    Args:
        distillation: the losses.
        data: the recordings; transcripts are read only where a loss needs them.
        args: `RecipeArguments`.
        window_seconds: length of the windows that whole clips are packed into, by default `WINDOW_SECONDS`.
        task: what the transcripts are to a multilingual Whisper.
        overwrite: writes into a folder that already holds files.

    Raises:
        ValueError: for `window_seconds` beside a loss on transcripts, and as in `DistillationTrainer`.
    """
    _prepare(args, overwrite)
    with_text = "labels" in distillation.weights
    if with_text and window_seconds is not None:
        raise ValueError(
            "`window_seconds` must not be set with losses on transcripts, since a transcript belongs to one clip; "
            "leave it out"
        )
    config = AutoConfig.from_pretrained(student_id)
    auto_class: Any = AutoModelForSpeechSeq2Seq if config.is_encoder_decoder else AutoModelForCTC
    overrides = without_noise(config)
    student = auto_class.from_pretrained(student_id, dtype=torch.float32, **overrides)
    teacher = auto_class.from_pretrained(teacher_id, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(student_id)
    collator: Any
    if with_text:
        collator = collator_for(student, processor, language=data.language, task=task)
    else:
        longest = getattr(processor.feature_extractor, "chunk_length", math.inf)
        seconds = min(WINDOW_SECONDS, longest) if window_seconds is None else window_seconds
        collator = WindowCollator(processor, seconds)
    train_dataset, eval_dataset = data.load_splits(processor, args.seed, with_text=with_text)
    if with_text:
        collator = checked(student, collator, train_dataset, eval_dataset)
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(student, teacher)
    trainer = trainer_class_for(student)(
        model=student,
        teacher=teacher,
        args=args,
        distillation=distillation,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        run_data=asdict(data),
    )
    train_and_save(trainer)


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
        freeze: "none", or what does not learn: "encoder" or "decoder".
        learning_rates: as in `DistillationArguments`.
        lora_rank: of LoRA adapters of PEFT, which then learn alone and are merged into the model at the end; None for
            none.
        overwrite: writes into a folder that already holds files.
    """
    _prepare(args, overwrite)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(model_id, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_id)
    if freeze != "none":
        frozen = model.get_encoder() if freeze == "encoder" else model.get_decoder()
        frozen.requires_grad_(False)
    collator = collator_for(model, processor, language=data.language, task=task)
    _finetune(Seq2SeqDistillationTrainer, model, processor, collator, data, args, learning_rates, lora_rank)


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
    """Fine-tunes a wav2vec2 model with CTC, residual or dense, and saves it in `args.output_dir`.

    Args:
        data: clips with transcripts.
        args: `TrainingArguments`.
        text_case: the vocabulary's case, "keep", "upper" or "lower", that transcripts are changed to.
        remove: regular expression of what is then removed from transcripts.
        freeze_feature_encoder: keeps the convolutions as they are.
        config_overrides: values of the model's config to change, as JSON.
        learning_rates: as in `DistillationArguments`.
        lora_rank: of LoRA adapters of PEFT, which then learn alone and are merged into the model at the end; None for
            none.
        overwrite: writes into a folder that already holds files.
    """
    overrides = read_json("config_overrides", config_overrides or "{}")
    _prepare(args, overwrite)
    model = AutoModelForCTC.from_pretrained(model_id, dtype=torch.float32, **overrides)
    processor = AutoProcessor.from_pretrained(model_id)
    if freeze_feature_encoder:
        model.freeze_feature_encoder()
    collator = CTCCollator(processor, partial(respell, case=text_case, remove=remove))
    _finetune(CTCDistillationTrainer, model, processor, collator, data, args, learning_rates, lora_rank)


def run_training(
    sizes: ModelSizes,
    data: TrainingDataArguments,
    args: Any,
    *,
    residual: str | None = None,
    vocab_size: int = 1024,
    ctc_weight: float = 0.3,
    average_checkpoints: int = 1,
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
        overwrite: writes into a folder that already holds files.

    Raises:
        ValueError: naming the clip or the option, before training starts.
    """
    values = None if residual is None else read_json("residual", residual)
    if data.streaming:
        raise ValueError(
            "`streaming` must be false, since the vocabulary is trained on all texts first, got true"
        )
    _prepare(args, overwrite)
    rate = WhisperFeatureExtractor().sampling_rate
    splits = {name: data.load(name, rate) for name in (data.train_split, data.eval_split) if name}
    tokenizer = train_tokenizer(splits[data.train_split]["text"], vocab_size)
    for name, split in splits.items():
        clips = ((f"clip {index} of split {name!r}", text) for index, text in enumerate(split["text"]))
        check_transcripts(clips, tokenizer, sizes, with_ctc=ctc_weight > 0)
    model = new_model(sizes, tokenizer, None if values is None else ResidualConfig.from_dict(values))
    processor = new_processor(tokenizer, sizes)
    args.remove_unused_columns = False  # the collator reads columns that no model does
    trainer = ScratchTrainer(
        model=model,
        args=args,
        ctc_weight=ctc_weight,
        train_dataset=splits[data.train_split],
        eval_dataset=None if data.eval_split is None else splits.get(data.eval_split),
        data_collator=Seq2SeqCollator(processor, multilingual=False),
        processing_class=processor,
    )
    train_and_save(trainer, partial(trainer.finish, average_checkpoints))


def respell(text: str, case: str, remove: str) -> str:
    """The text in another case, then without what `remove` matches, and with single spaces."""
    return " ".join(re.sub(remove, "", CASES[case](text)).split())


def _prepare(args: Any, overwrite: bool) -> None:
    resume = args.resume_from_checkpoint is not None
    folder = prepare_output_dir(args.output_dir, overwrite, resume=resume)
    if overwrite and not resume and folder.is_dir() and args.process_index == 0:
        set_checkpoints_aside(folder)
    set_seed(args.seed)


def _finetune(
    trainer_class: type[DistillationTrainer],
    model: Any,
    processor: Any,
    collator: Any,
    data: TrainingDataArguments,
    args: Any,
    learning_rates: str | None,
    lora_rank: int | None,
) -> None:
    """Trains on labels alone, without a teacher."""
    if lora_rank is not None:
        model = add_lora(model, lora_rank)
    train_dataset, eval_dataset = data.load_splits(processor, args.seed)
    collator = checked(model, collator, train_dataset, eval_dataset)
    args.remove_unused_columns = False  # the collator reads columns that no model does
    trainer = trainer_class(
        model=model,
        args=args,
        distillation=DistillationArguments(
            final_weight=0.0, logits_weight=0.0, labels_weight=1.0, learning_rates=learning_rates
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        run_data=asdict(data),
    )

    def merge() -> None:
        trainer.model = trainer.model.merge_and_unload()

    train_and_save(trainer, None if lora_rank is None else merge)


def train_and_save(trainer: Any, finish: Callable[[], None] | None = None) -> None:
    """Trains, or goes on from `resume_from_checkpoint` ("last" is the newest in its folder), and leaves the
    model, its processor, the trainer's log and the results in the output folder.

    Args:
        trainer: of any kind.
        finish: called between training and saving.
    """
    output_dir = Path(trainer.args.output_dir)
    require_space(output_dir, bytes_to_write(trainer, model_bytes(trainer.model)))
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if finish is not None:
        finish()
    new = unfinished(output_dir)
    if trainer.is_world_process_zero() and new.is_dir():
        shutil.rmtree(new)  # of a run that was killed
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(new))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        save_processor(trainer.processing_class, new)
        adopt(new, output_dir)
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

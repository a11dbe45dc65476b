"""Distils a dense model into the one compressed from it, on recordings alone or on transcripts too.

    python scripts/distill.py --student outputs/compact --teacher openai/whisper-base \
        --dataset openslr/librispeech_asr --dataset_config clean --train_split train.100 \
        --window_seconds 15 --per_device_train_batch_size 32 --learning_rate 3e-4 --warmup_steps 0.05 \
        --num_train_epochs 3 --bf16 --logging_steps 20 --output_dir outputs/compact-distilled

In about a minute on a CPU, with the recordings that come with this repository, after the short command of
`scripts/compress.py`:

    python scripts/distill.py --student outputs/compact --teacher openai/whisper-tiny.en --language en \
        --window_seconds 5 --per_device_train_batch_size 8 --learning_rate 3e-4 --max_steps 20 \
        --logging_steps 5 --output_dir outputs/compact-distilled

The losses are weighted by `--hidden_weight`, `--final_weight`, `--logits_weight` and `--labels_weight`. With
the first two alone, as by default, transcripts are not read, Whisper's decoder does not run, and only the
encoder learns; `--window_seconds` then packs clips into windows of 5 to 15 seconds, which train several times
faster than Whisper's 30. wav2vec2 is trained without dropout, LayerDrop and SpecAugment, as the teacher runs.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from common import parse_args, prepare_output_dir
from pretrained import resolve_pretrained
from training import TrainingDataArguments, train_and_save
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Seq2SeqTrainingArguments,
    set_seed,
)

import hf_residual_transformer  # noqa: F401 (registers the residual classes)
from hf_residual_transformer.data import SpeechCollator, WindowCollator, collator_for
from hf_residual_transformer.distillation import (
    CTCDistillationTrainer,
    DistillationArguments,
    DistillationTrainer,
    Seq2SeqDistillationTrainer,
)

WITHOUT_NOISE: dict[str, Any] = {
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
}


@dataclass
class ScriptArguments:
    """Which models, and how they hear the recordings."""

    student: str = field(
        metadata={"help": "Folder or Hub id of the compressed model, as from scripts/compress.py."}
    )
    teacher: str = field(
        default="openai/whisper-base",
        metadata={"help": "Folder or Hub id of the dense model that it was compressed from."},
    )
    window_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Pack whole clips into windows of this length, without transcripts. By default each clip "
            "is one input, which Whisper pads to 30 seconds."
        },
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe",
        metadata={"help": "What the transcripts are to a multilingual Whisper, if used."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that already holds files."})


def main() -> None:
    args, distillation, data_args, training_args = parse_args(
        ScriptArguments, DistillationArguments, TrainingDataArguments, Seq2SeqTrainingArguments
    )
    prepare_output_dir(
        training_args.output_dir, args.overwrite, resume=training_args.resume_from_checkpoint is not None
    )
    set_seed(training_args.seed)
    student_id, teacher_id = resolve_pretrained(args.student), resolve_pretrained(args.teacher)
    auto_class: Any = AutoModelForCTC
    trainer_class: type[DistillationTrainer] = CTCDistillationTrainer
    overrides = WITHOUT_NOISE
    if AutoConfig.from_pretrained(student_id).is_encoder_decoder:
        auto_class, trainer_class, overrides = AutoModelForSpeechSeq2Seq, Seq2SeqDistillationTrainer, {}
    student = auto_class.from_pretrained(student_id, dtype=torch.float32, **overrides)
    teacher = auto_class.from_pretrained(teacher_id, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(student_id)

    with_text = bool(trainer_class.losses_on_labels & distillation.weights.keys())
    collator: Any = SpeechCollator(processor)
    if with_text:
        collator = collator_for(student, processor, language=data_args.language, task=args.task)
    if args.window_seconds is not None:
        if with_text:
            raise ValueError(
                "`window_seconds` must not be set with losses on transcripts, which belong to clips"
            )
        collator = WindowCollator(processor, args.window_seconds)
    train_dataset, eval_dataset = data_args.load_splits(processor, training_args.seed, with_text=with_text)

    training_args.remove_unused_columns = False  # the collator reads columns that no model does
    trainer = trainer_class(
        model=student,
        teacher=teacher,
        args=training_args,
        distillation=distillation,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    main()

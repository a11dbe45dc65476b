"""Distils a dense model into the one compressed from it, on recordings alone or on transcripts too.

    python scripts/distill.py --student outputs/compact --teacher openai/whisper-base \
        --dataset openslr/librispeech_asr --dataset_config clean --train_split train.100 \
        --per_device_train_batch_size 32 --learning_rate 2e-4 --num_train_epochs 3 --bf16 --logging_steps 20 \
        --output_dir outputs/compact-distilled

In about a minute on a CPU, with the recordings that come with this repository, after the short command of
`scripts/compress.py`:

    python scripts/distill.py --student outputs/compact --teacher openai/whisper-tiny.en --language en \
        --max_steps 40 --logging_steps 5 --output_dir outputs/compact-distilled

Each step packs clips into windows of 10 seconds, which train several times faster than Whisper's 30. By default the
encoder alone learns, from the teacher's final encoder states (`--final_weight`) and its probabilities for the words
that it hears itself (`--logits_weight`): transcripts are not read. Without the latter no decoder runs, and steps take
half the time. With `--labels_weight` transcripts are read, and all of the model learns. The default `--learning_rate`
suits a few hundred steps; longer runs bear more. wav2vec2 is trained without dropout, LayerDrop and SpecAugment, as the
teacher runs.

A run that was interrupted goes on by the same command with `--resume_from_checkpoint last`.
The first argument may instead be a JSON or YAML file with options by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    set_seed,
)

from hf_residual_transformer.folders import prepare_output_dir
from hf_residual_transformer.speech.collators import collator_for
from hf_residual_transformer.speech.windows import WindowCollator
from hf_residual_transformer.training.arguments import (
    DistillationArguments,
    RecipeArguments,
    TrainingDataArguments,
    parse_args,
)
from hf_residual_transformer.training.recipe import (
    WINDOW_SECONDS,
    learning_rate_for,
    mean_bits,
    relative_size,
)
from hf_residual_transformer.training.running import train_and_save
from hf_residual_transformer.training.trainers import (
    CTCDistillationTrainer,
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
            "help": f"Pack whole clips into windows of this length, by default {WINDOW_SECONDS:g}. With "
            "--labels_weight each clip is an input instead, which Whisper pads to 30 seconds."
        },
    )
    task: Literal["transcribe", "translate"] = field(
        default="transcribe",
        metadata={"help": "What the transcripts are to a multilingual Whisper, if used."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Write into a folder that already holds files."})


def main() -> None:
    args, distillation, data_args, training_args = parse_args(
        ScriptArguments, DistillationArguments, TrainingDataArguments, RecipeArguments
    )
    prepare_output_dir(
        training_args.output_dir, args.overwrite, resume=training_args.resume_from_checkpoint is not None
    )
    set_seed(training_args.seed)
    student_id, teacher_id = args.student, args.teacher
    auto_class: Any = AutoModelForCTC
    trainer_class: type[DistillationTrainer] = CTCDistillationTrainer
    overrides = WITHOUT_NOISE
    if AutoConfig.from_pretrained(student_id).is_encoder_decoder:
        auto_class, trainer_class, overrides = AutoModelForSpeechSeq2Seq, Seq2SeqDistillationTrainer, {}
    student = auto_class.from_pretrained(student_id, dtype=torch.float32, **overrides)
    teacher = auto_class.from_pretrained(teacher_id, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(student_id)

    with_text = "labels" in distillation.weights
    collator: Any
    if with_text:
        if args.window_seconds is not None:
            raise ValueError(
                "`window_seconds` must not be set with losses on transcripts, which belong to clips"
            )
        collator = collator_for(student, processor, language=data_args.language, task=args.task)
    else:
        longest = getattr(processor.feature_extractor, "chunk_length", math.inf)
        seconds = min(WINDOW_SECONDS, longest) if args.window_seconds is None else args.window_seconds
        collator = WindowCollator(processor, seconds)
    train_dataset, eval_dataset = data_args.load_splits(processor, training_args.seed, with_text=with_text)

    if training_args.learning_rate is None:
        encoders = [trainer_class.family.find_encoder(model) for model in (student, teacher)]
        training_args.learning_rate = learning_rate_for(relative_size(*encoders), mean_bits(student))
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

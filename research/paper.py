"""Runs the grid of the paper: models trained from scratch that differ in their encoder alone, for recognition and
translation, and the equally small dense and low-rank models that decide what sharing is worth.

    pip install ".[research]"
    python research/paper.py --scale cpu

Every run has the same recipe, data, steps and seeds, and leaves one JSON file in `results/paper/<scale>/`. A run that
has one is skipped; a run that was killed goes on from its last checkpoint in `--work`. Either is refused where the
scale has changed since. `--table` only writes the table and the curves from what is there. `research/paper/*.yaml`
hold the scales: `cpu` on synthetic words, minutes a run on one core; `acted` on human speech that
`research/make_paper_data.py` writes, on one GPU; `gpu` and `cluster` on LibriSpeech and CoVoST 2, which many processes
run by

    accelerate launch --config_file research/paper/accelerate.yaml research/paper.py --scale cluster
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from accelerate import PartialState
from paper_bits import with_four_bits
from paper_checks import LANGUAGES, check_scale
from paper_models import ARCHITECTURES, Architecture, without_weights
from paper_table import write_table
from sentences import SpokenSentences
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed
from words import SPLITS, TRAINING_SPEEDS, WordStrings, all_texts, longest_texts

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.families import family_of
from hf_residual_transformer.folders import save_processor
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.speech.collators import batched
from hf_residual_transformer.speech.datasets import refuse_long_clips
from hf_residual_transformer.training.arguments import TrainingDataArguments, read_options
from hf_residual_transformer.training.checkpoints import checkpoints_in, fault_of, flat
from hf_residual_transformer.training.scratch import EncoderSizes, check_average

REPOSITORY = Path(__file__).resolve().parent.parent
SCALES = REPOSITORY / "research" / "paper"
BLOCK = ResidualConfig().block_size


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Args:
        title: of the row.
        residual: what the encoder shares; None for a dense one.
        sizes: sizes that differ from the scale's.
        four_bits: whether `U`, or each dense matrix, is also measured in four bits after training.
        divide_shared_rate: as in `GuardedTrainer`.
    """

    title: str
    residual: ResidualConfig | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    four_bits: bool = True
    divide_shared_rate: bool = False


def make_cells(sizes: EncoderSizes) -> dict[str, Cell]:
    """The rows by name. The controls have the parameters of K=3, R=2, as near as whole numbers allow. Each that shares
    has a twin, `...-divided`, whose shared matrices have a smaller learning rate.
    """
    paper = ResidualConfig.paper
    target = encoder_size(sizes, paper(3, 2))
    layers = max(1, round(sizes.encoder_layers / 3))
    widths = range(BLOCK, 4 * sizes.encoder_ffn_dim + BLOCK, BLOCK)
    shallow = [{"encoder_layers": layers, "encoder_ffn_dim": width} for width in widths]
    step = math.lcm(2, sizes.attention_heads)
    narrow = [
        {"d_model": width, "encoder_ffn_dim": width * sizes.encoder_ffn_dim // sizes.d_model}
        for width in range(step, sizes.d_model + 1, step)
    ]
    low_rank = [
        ResidualConfig(group_size=None, rank=rank, diagonal="square") for rank in range(1, sizes.d_model + 1)
    ]
    cells = {
        "dense": Cell("dense"),
        "k3-r2": Cell("K=3, R=2", paper(3, 2)),
        "shallow": Cell("dense, fewer layers", sizes=_nearest(shallow, lambda s: _size(sizes, s), target)),
        "narrow": Cell(
            "dense, narrower",
            sizes=_nearest(narrow, lambda s: _size(sizes, s), target),
            four_bits=False,  # such widths are no multiples of a block
        ),
        "low-rank": Cell(
            "low rank, nothing shared",
            _nearest(low_rank, lambda r: encoder_size(sizes, r), target),
            four_bits=False,
        ),
        "k3-r16": Cell("K=3, R=16", paper(3, 16)),
        "k3-r0": Cell("K=3, R=0 (diagonal alone)", paper(3, 0)),
        "k3-r0-none": Cell("K=3, R=0, no diagonal (pure sharing)", replace(paper(3, 0), diagonal="none")),
        "k3-r2-none": Cell("K=3, R=2, no diagonal", replace(paper(3, 2), diagonal="none")),
        "k3-r2-all": Cell("K=3, R=2, diagonal on all", replace(paper(3, 2), diagonal="all")),
        "k3-r2-cyclic": Cell("K=3, R=2, cyclic", replace(paper(3, 2), cyclic=True)),
        "k6-r16": Cell("K=6, R=16", paper(6, 16)),
        "k9-r16": Cell("K=9, R=16", paper(9, 16)),
        # The rank 16 of the paper's 512 features, for encoders of a fifth of the width.
        "k6-r2": Cell("K=6, R=2", paper(6, 2)),
        "k9-r2": Cell("K=9, R=2", paper(9, 2)),
    }
    divided = {
        f"{name}-divided": replace(cell, title=f"{cell.title}, divided rate", divide_shared_rate=True)
        for name, cell in cells.items()
        if cell.residual and cell.residual.group_size
    }
    return cells | divided


def _nearest(choices: Sequence[Any], size: Callable[[Any], int], target: int) -> Any:
    """That of `choices`, which become larger, whose size is nearest to `target`."""
    number = bisect_right(choices, target, key=size)
    return min(choices[max(0, number - 1) : number + 1], key=lambda choice: abs(size(choice) - target))


def _size(sizes: EncoderSizes, changes: dict[str, int]) -> int:
    return encoder_size(replace(sizes, **changes), None)


def _check_sizes(name: str, cell: Cell, sizes: EncoderSizes) -> None:
    try:
        encoder_size(replace(sizes, **cell.sizes), cell.residual)
    except ValueError as error:
        raise ValueError(f"the cell {name!r} cannot have these sizes: {error}") from error
    layers = cell.sizes.get("encoder_layers", sizes.encoder_layers)
    group_size = cell.residual.group_size if cell.residual else None
    if isinstance(group_size, int) and group_size > layers:
        raise ValueError(
            f"the cell {name!r} needs `encoder_layers` of at least {group_size}, got {layers}, which would share as in "
            f"K={layers}"
        )


def encoder_size(sizes: EncoderSizes, residual: ResidualConfig | None) -> int:
    """Parameters of the encoder's layers and of what they share."""
    return count_encoder(without_weights(sizes, residual))


def count_encoder(model: Any) -> int:
    """Parameters of the encoder's layers and of what they share."""
    encoder = family_of(model).find_encoder(model)
    parts = [encoder.layers, *([encoder.shared] if hasattr(encoder, "shared") else [])]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


@dataclass(frozen=True)
class Scale:
    """What every run of a grid has in common, from a YAML file.

    Args:
        name: of the file.
        data: of each task: `words: {...}` for synthetic words, `sentences: {...}` for synthetic sentences, or the
            options of `TrainingDataArguments`.
        model: what is trained, a key of `ARCHITECTURES`.
        sizes: of the dense model, as `ModelSizes` or `ParakeetSizes`; `sizes_of` has what differs by task.
        recipe: options of the Trainer.
        vocab_size, ctc_weight, average_checkpoints: as in `scripts/train_asr.py`; a Parakeet has no CTC.
        runs: cells and seeds by task, in the order in which they run.
    """

    name: str
    data: dict[str, dict[str, Any]]
    sizes: dict[str, Any]
    recipe: dict[str, Any]
    runs: list[dict[str, Any]]
    sizes_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str = "whisper"
    vocab_size: int = 1024
    ctc_weight: float = 0.3
    average_checkpoints: int = 1

    @classmethod
    def read(cls, path: Path) -> Scale:
        """Reads a YAML file.

        Raises:
            ValueError: naming the field, for one that is missing, that a scale may not have, or that cannot be; most of
                `recipe` is up to `training_arguments`, since some of it depends on the machine.
        """
        try:
            scale = cls(name=path.stem, **read_options(path))
        except TypeError as error:
            raise ValueError(f"{path} must hold the fields of a scale: {error}") from error
        if scale.model not in [*ARCHITECTURES]:  # YAML may hold what cannot be a key
            raise ValueError(f"`model` must be one of {', '.join(ARCHITECTURES)}, got {scale.model!r}")
        check_scale(scale)
        return scale

    @property
    def architecture(self) -> Architecture:
        """What is trained."""
        return ARCHITECTURES[self.model]

    def sizes_for(self, task: str) -> Any:
        """The sizes of the dense model of a task."""
        return self.architecture.sizes_class(**self.sizes | self.sizes_of.get(task, {}))

    def settings(self, task: str) -> dict[str, Any]:
        """What makes the runs of a task beside cell and seed, as plain values. The sizes are of the dense model."""
        return {
            "model": self.model,
            "data": self.data[task],
            "sizes": asdict(self.sizes_for(task)),
            "vocab_size": self.vocab_size,
            "ctc_weight": self.ctc_weight,
            "average_checkpoints": self.average_checkpoints,
            "recipe": self.recipe,
        }

    def items_to_train_on(self) -> int:
        """How many synthetic clips a run reads, in all processes, so that none comes twice."""
        clips = self.recipe["max_steps"] * self.recipe["per_device_train_batch_size"]
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return int(clips * self.recipe.get("gradient_accumulation_steps", 1) * processes)

    def training_arguments(
        self, folder: Path, seed: int = 0, max_tokens: int | None = None
    ) -> Seq2SeqTrainingArguments:
        """The arguments of the Trainer of one run.

        Raises:
            ValueError: for an option in `recipe` that cannot be, or for `average_checkpoints` that it does not keep.
        """
        try:
            args = Seq2SeqTrainingArguments(
                output_dir=str(folder),
                seed=seed,
                remove_unused_columns=False,
                predict_with_generate=True,
                generation_max_length=max_tokens,
                report_to=[],
                **self.recipe,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"`recipe` must hold options of the Trainer: {error}") from error
        check_average(self.average_checkpoints, args)
        return args

    def all_runs(self) -> Iterator[tuple[str, str, int]]:
        """Task, cell and seed of each run, in order.

        Raises:
            ValueError: for a task or cell that does not exist, or whose sizes cannot be.
        """
        found = {task: make_cells(self.sizes_for(task)) for task in self.data}
        checked = set()
        for run in self.runs:
            if run["task"] not in [*found]:
                raise ValueError(f"`task` must be one of {', '.join(found)}, got {run['task']!r}")
            cells = found[run["task"]]
            for seed in run["seeds"]:
                for cell in run["cells"]:
                    if cell not in [*cells]:
                        raise ValueError(f"`cells` must be of {', '.join(cells)}, got {cell!r}")
                    if (run["task"], cell) not in checked:
                        checked.add((run["task"], cell))
                        _check_sizes(cell, cells[cell], self.sizes_for(run["task"]))
                    yield run["task"], cell, seed


@dataclass
class Splits:
    """The data of a task. The vocabulary is trained on `texts`; `named_texts` are those that a model must be able to
    write, each after its name.
    """

    texts: list[str]
    named_texts: list[tuple[str, str]]
    train: Any
    validation: Any
    test: Any


def load_splits(scale: Scale, task: str, seed: int) -> Splits:
    """The data of a run. Only the strings to train on depend on the seed.

    Raises:
        ValueError: for an empty split, or a clip that is longer than the window of the model.
    """
    data, sizes = scale.data[task], scale.sizes_for(task)
    if "words" in data:
        language, words = LANGUAGES[task], data["words"]
        seconds = words.get("seconds") or sizes.window_seconds
        strings = scale.items_to_train_on()
        splits = {
            split: WordStrings(
                language,
                split,
                words.get(split, strings),
                seconds,
                seed if split == "train" else 0,
                words["vocabulary"],
                words.get("speeds", TRAINING_SPEEDS),
                seed if words.get("new_voices") else None,
            )
            for split in SPLITS
        }
        longest = longest_texts(language, words["vocabulary"])
        named_texts = [(f"the string {text!r}", text) for text in longest]
        return Splits(all_texts(language, words["vocabulary"]), named_texts, **splits)
    if "sentences" in data:
        options = data["sentences"] | {"train": scale.items_to_train_on()}
        batch_size = scale.recipe["per_device_train_batch_size"]
        found = {
            split: SpokenSentences(
                Path(options["folder"]),
                options.get("table", task),
                split,
                options[split],
                seed if split == "train" else 0,
                batch_size,
            )
            for split in SPLITS
        }
        if hasattr(sizes, "window_seconds"):
            for split in found.values():
                split.check_longest(sizes.window_seconds)
        texts = {split: [row["text"] for row in found[split].rows] for split in ("train", "validation")}
        named_texts = [(repr(text), text) for own in texts.values() for text in own]
        return Splits(texts["train"], named_texts, **found)
    names = {split: data[f"{split}_split"] for split in SPLITS}
    options = TrainingDataArguments(**{key: data[key] for key in data if not key.endswith("_split")})
    loaded = {split: options.load(name, 16_000) for split, name in names.items()}
    if hasattr(sizes, "window_seconds"):
        for rows in loaded.values():
            refuse_long_clips(rows, sizes.window_seconds)
    texts = {split: list(loaded[split]["text"]) for split in ("train", "validation")}
    named_texts = [
        (f"clip {index} of split {names[split]!r}", text)
        for split, own in texts.items()
        for index, text in enumerate(own)
    ]
    return Splits(texts["train"], named_texts, **loaded)


class StepClock(TrainerCallback):
    """Measures the optimizer steps of this process, without the reading of data, evaluations and saving."""

    def __init__(self) -> None:
        self.steps, self.cpu_seconds, self.seconds = 0, 0.0, 0.0
        self._started = 0.0, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.process_time(), time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        cpu, wall = self._started
        self.cpu_seconds += time.process_time() - cpu
        self.seconds += time.perf_counter() - wall
        self.steps += 1

    def means(self) -> dict[str, float | None]:
        """CPU seconds and seconds of a step; None where a run that goes on has no step left."""
        sums = {"cpu_seconds_per_step": self.cpu_seconds, "seconds_per_step": self.seconds}
        return {name: value / self.steps if self.steps else None for name, value in sums.items()}


def train(scale: Scale, task: str, cell: Cell, seed: int, folder: Path) -> tuple[Any, Splits, StepClock]:
    """Trains one model, or goes on where it stopped. Returns what measured its steps too."""
    sizes = replace(scale.sizes_for(task), **cell.sizes)
    splits = load_splits(scale, task, seed)
    architecture = scale.architecture
    processor = architecture.processor(splits.texts, scale.vocab_size, sizes)
    architecture.check_texts(splits.named_texts, processor, sizes, scale.ctc_weight)
    set_seed(seed)
    model = architecture.model(sizes, processor, cell.residual)
    for rows in (splits.validation, splits.test):
        architecture.check_rows(model, processor, rows)
    clock = StepClock()
    trainer = architecture.trainer(
        scale.ctc_weight,
        model=model,
        args=scale.training_arguments(folder, seed, getattr(sizes, "max_tokens", None)),
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        data_collator=architecture.collator(processor),
        processing_class=processor,
        compute_metrics=lambda predicted: {"wer": jiwer.wer(*_texts(processor, predicted))},
        callbacks=[clock],
        run_data=scale.settings(task),
        divide_shared_rate=cell.divide_shared_rate,
    )
    complete = [path for path in checkpoints_in(folder) if fault_of(path) is None]
    trainer.train(resume_from_checkpoint=str(complete[-1]) if complete else None)
    trainer.finish(scale.average_checkpoints)
    return trainer, splits, clock


def _texts(processor: Any, predicted: Any) -> tuple[list[str], list[str]]:
    """References and predictions. CTC writes a token in many frames, so that equal neighbours are one token in what is
    predicted, and not in a reference, such as the two letters in "look".
    """
    padding = processor.tokenizer.pad_token_id
    sides: Any = (predicted.label_ids, {"group_tokens": False}), (predicted.predictions, {})
    return tuple(  # type: ignore[return-value]
        [
            text.strip()
            for text in processor.batch_decode(
                np.where(ids >= 0, ids, padding), skip_special_tokens=True, **options
            )
        ]
        for ids, options in sides
    )


@torch.inference_mode()
def recognise(
    architecture: Architecture, model: Any, processor: Any, dataset: Any, batch_size: int
) -> tuple[list[str], list[str]]:
    """References and predictions, by greedy search."""
    collator = architecture.collator(processor)
    references: list[str] = []
    predictions: list[str] = []
    model.eval()
    for rows in batched((dataset[index] for index in range(len(dataset))), batch_size):
        ids = architecture.recognise(model, collator([{"audio": row["audio"]} for row in rows]))
        predictions += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        references += [row["text"] for row in rows]
    return references, predictions


@torch.inference_mode()
def measure_nats(
    architecture: Architecture, model: Any, processor: Any, dataset: Any, batch_size: int
) -> dict[str, Any]:
    """The mean over a reference's tokens of less the logarithm of its probability, given the audio, in nats; and for
    each clip the sum, and the number of its tokens. Empty for a model whose loss is not this.

    It tells models apart with fewer runs than word errors do, since it also moves where no word changes. Models that
    are trained with label smoothing keep some of it for any clip.
    """
    collator = architecture.collator(processor)
    nats: list[float] = []
    tokens: list[int] = []
    model.eval()
    for rows in batched((dataset[index] for index in range(len(dataset))), batch_size):
        found = architecture.nats(model, collator(rows))
        if found is None:
            return {}
        nats += found[0].tolist()
        tokens += found[1].tolist()
    return {
        "nats_per_token": sum(nats) / sum(tokens),
        "nats_of_clips": " ".join(f"{value:.4g}" for value in nats),
        "tokens_of_clips": " ".join(map(str, tokens)),
    }


def measure(task: str, references: list[str], predictions: list[str]) -> dict[str, Any]:
    """WER and CER, for a translation BLEU and chrF too, and for each clip what a bootstrap adds up.

    That is the numbers of words and of word errors, and for BLEU the matches of one to four words, and the lengths of
    prediction and reference.
    """
    translated: dict[str, Any] = {}
    if task == "translation":
        import sacrebleu

        one_clip = sacrebleu.BLEU(effective_order=True)  # sacrebleu warns without it; no count changes
        translated = {
            "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
            "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
            "bleu_of_clips": " ".join(
                ",".join(map(str, (*clip.counts, clip.sys_len, clip.ref_len)))
                for clip in map(one_clip.sentence_score, predictions, ([text] for text in references))
            ),
        }
    counts = [jiwer.process_words(*pair) for pair in zip(references, predictions)]
    errors = [count.substitutions + count.deletions + count.insertions for count in counts]
    words = [len(reference.split()) for reference in references]
    return {
        "wer": sum(errors) / sum(words),
        "cer": jiwer.cer(references, predictions),
        **translated,
        "clips": len(references),
        "words": sum(words),
        "word_errors_of_clips": " ".join(map(str, errors)),
        "words_of_clips": " ".join(map(str, words)),
    }


def voices(test: Any) -> dict[str, Any]:
    """Who speaks in the test, by whom the intervals are drawn: names, and a number for each clip. Only synthetic speech
    has it.
    """
    if not isinstance(test, WordStrings | SpokenSentences):
        return {}
    names = list(test.voices)
    return {
        "voices": names,
        "voices_of_clips": " ".join(str(names.index(test.voice(index))) for index in range(len(test))),
    }


def run(scale: Scale, task: str, name: str, seed: int, work: Path, result: Path) -> None:
    """Trains and measures one model, and writes its JSON file, last of all."""
    cell = make_cells(scale.sizes_for(task))[name]
    trainer, splits, clock = train(scale, task, cell, seed, work / f"{task}-{name}-{seed}")
    model: Any = trainer.model
    processor: Any = trainer.processing_class
    batch_size = trainer.args.per_device_eval_batch_size
    parameters = count_encoder(model)
    dense = encoder_size(scale.sizes_for(task), None)
    history = trainer.state.log_history
    values: dict[str, Any] = {
        "scale": scale.name,
        "model": scale.model,
        "task": task,
        "cell": name,
        "title": cell.title,
        "seed": seed,
        "steps": trainer.state.global_step,
        "settings": scale.settings(task),
        "residual_config": cell.residual and cell.residual.to_dict(),
        "divide_shared_rate": cell.divide_shared_rate,
        "sizes": asdict(replace(scale.sizes_for(task), **cell.sizes)),
        "encoder": {"parameters": parameters, "ratio": parameters / dense, "bytes": 2 * parameters},
        **clock.means(),
        "losses": [[entry["step"], float(entry["loss"])] for entry in history if "loss" in entry],
        "validation": [
            [entry["step"], float(entry["eval_loss"]), entry["eval_wer"]]
            for entry in history
            if "eval_wer" in entry
        ],
        "test": measure(task, *recognise(scale.architecture, model, processor, splits.test, batch_size))
        | measure_nats(scale.architecture, model, processor, splits.test, batch_size)
        | voices(splits.test),
    }
    if cell.four_bits:
        collator = scale.architecture.collator(processor)
        # The first clips that were trained on. They are short ones where these come first.
        rows = [splits.train[index] for index in range(min(128, len(splits.train)))]
        heard = [collator([{"audio": row["audio"]} for row in own]) for own in batched(rows, 16)]
        for entry, scale_bits in (("four_bits", 16), ("four_bits_small_scales", 8)):
            small, num_bytes = with_four_bits(model, heard, scale_bits)
            found = recognise(scale.architecture, small, processor, splits.test, batch_size)
            values[entry] = {
                "bytes": num_bytes,
                "ratio": num_bytes / (2 * dense),
                "test": measure(task, *found),
            }
    if trainer.is_world_process_zero():
        save_processor(processor, work)
        result.parent.mkdir(parents=True, exist_ok=True)
        unfinished = result.with_suffix(".part")
        unfinished.write_text(json.dumps(values | provenance(), indent=1) + "\n", encoding="utf-8")
        unfinished.rename(result)


def check_finished(result: Path, settings: dict[str, Any]) -> None:
    """Refuses the file of a run that other settings made. Older files do not have theirs.

    Raises:
        ValueError: naming the first field that differs.
    """
    theirs, ours = flat(json.loads(result.read_text(encoding="utf-8")).get("settings", {})), flat(settings)
    for name in {**theirs, **ours} if theirs else ():
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{result} is of a run whose `{name}` was {theirs.get(name)!r}, and the scale has {ours.get(name)!r}; "
                "change it back, name another folder with --results, or remove the file to train anew"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", default="cpu", help="cpu, acted, gpu, cluster, or a YAML file of the same fields"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/paper"), help="folder for checkpoints")
    parser.add_argument(
        "--results", type=Path, default=Path("results/paper"), help="folder for JSON files and table"
    )
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    path = Path(args.scale) if args.scale.endswith(".yaml") else SCALES / f"{args.scale}.yaml"
    if not path.is_file():
        names = sorted(found.stem for found in SCALES.glob("*.yaml") if found.stem != "accelerate")
        parser.error(f"--scale must be one of {', '.join(names)}, or a YAML file, got {args.scale!r}")
    scale = Scale.read(path)
    results = args.results / scale.name
    if args.table and not any(results.glob("*.json")):
        parser.error(f"--table needs the JSON files of runs, and {results} has none")
    runs = [] if args.table else list(scale.all_runs())
    if runs:
        scale.architecture.check()
        # Refuses a wrong recipe before anything is trained, and tells the processes of each other.
        scale.training_arguments(args.work)
    files = [results / f"{task}-{name}-{seed}.json" for task, name, seed in runs]
    for (task, _, _), result in zip(runs, files):
        if result.is_file():
            check_finished(result, scale.settings(task))
    for (task, name, seed), result in zip(runs, files):
        if result.is_file():
            continue
        print(f"{task}, {name}, seed {seed}", flush=True)
        run(scale, task, name, seed, args.work / scale.name, result)
        _write_table_once(results)
    _write_table_once(results)


def _write_table_once(results: Path) -> None:
    """Writes the table in the main process alone. The others wait, and then find the files of the run that ended."""
    state = PartialState()
    if state.is_main_process:
        write_table(results)
    state.wait_for_everyone()


if __name__ == "__main__":
    main()

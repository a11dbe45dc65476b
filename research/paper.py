"""Runs the grid of the paper: models trained from scratch that differ in their encoder alone, for recognition and
translation, and the equally small dense and low-rank models that decide what sharing is worth.

    pip install ".[research]"
    python research/paper.py --scale cpu

Every run has the same recipe, data, steps and seeds, and leaves one JSON file in `results/paper/<scale>/`. A run that
has one is skipped; a run that was killed goes on from its last checkpoint in `--work`. Either is refused where the
scale has changed since. `--table` only writes the table and the figures from what is there. `research/paper/*.yaml`
hold the scales: `cpu` on synthetic words, minutes a run on one core; `acted` on human speech that
`research/make_paper_data.py` writes, on one GPU; `gpu` and `cluster` on LibriSpeech and CoVoST 2, which many processes
run by

    accelerate launch --config_file research/paper/accelerate.yaml research/paper.py --scale cluster
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jiwer
from accelerate import PartialState
from paper_bits import with_four_bits
from paper_cells import Cell, count_encoder, encoder_size, make_cells
from paper_measures import measure, measure_nats, recognise, texts_of, voices
from paper_scale import Scale
from paper_splits import Splits, load_splits
from paper_table import write_table
from transformers import TrainerCallback, set_seed

from hf_residual_transformer.folders import save_processor
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.speech.collators import batched
from hf_residual_transformer.training.checkpoints import checkpoints_in, fault_of, flat

REPOSITORY = Path(__file__).resolve().parent.parent
SCALES = REPOSITORY / "research" / "paper"


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
        compute_metrics=lambda predicted: {"wer": jiwer.wer(*texts_of(processor, predicted))},
        callbacks=[clock],
        run_data=scale.settings(task),
        divide_shared_rate=cell.divide_shared_rate,
    )
    complete = [path for path in checkpoints_in(folder) if fault_of(path) is None]
    trainer.train(resume_from_checkpoint=str(complete[-1]) if complete else None)
    trainer.finish(scale.average_checkpoints)
    return trainer, splits, clock


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
    parser.add_argument("--table", action="store_true", help="only write the table and the figures")
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

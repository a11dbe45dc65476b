"""Trainers that distil a dense teacher into a compressed student. They add up the losses in `losses.py`.

Unless the loss on labels has a weight, training needs only audio and changes only the compact parts. The decoder does
not run if only encoder states are compared. If the decoder's probabilities are compared, the teacher transcribes the
audio first, as in Distil-Whisper (https://arxiv.org/abs/2311.00430, section 3). Without a teacher, the same Trainers
fine-tune on labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer
from transformers.utils import logging

from ..families import Family, family_of, frame_mask, num_frames_of
from ..layers import SHARED, QuantizedEmbedding, QuantizedWeight, ResidualLinear, quantized_weights
from ..modeling import forward_as
from ..speech.transcription import encode, encoder_window, has_words, transcribe
from ..whisper import MARGIN_FRAMES, has_short_windows, num_heard_frames
from .arguments import LEARNING_RATES, DistillationArguments, RecipeArguments
from .guarded import GuardedTrainer
from .losses import HiddenStateLoss, LogitsLoss
from .states import record_states

logger = logging.get_logger(__name__)
TEMPERATURE, DECODER_TEMPERATURE = 2.0, 1.0  # docs/LOG.md
SCALE_UNIT = 40.0  # docs/LOG.md
# Fields of encoders' configs that student and teacher must share, where they have them.
SHAPES = ("hidden_size", "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
TEACHER_STATES = "teacher_states"  # in a batch, what the teacher's encoder gives for it


@dataclass(frozen=True)
class DistillationOutcome:
    """The result of a distillation.

    Args:
        log: the Trainer's log.
        loss_before: the loss on the validation clips before the first step; None where it decides nothing.
        loss_after: the same after the last step.
    """

    log: list[dict[str, Any]]
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the student has the trained weights: the loss on the validation clips fell, or decides nothing."""
        return self.loss_before is None or self.loss_after is None or self.loss_after < self.loss_before


class DistillationTrainer(GuardedTrainer):
    """The common base of the two Trainers below.

    Each loss is a mean over all clips, tokens or frames of an optimizer step. Accumulated gradients therefore equal
    those of one large batch, whatever the lengths of its clips. The logs have each loss without its weight, as
    `loss_<name>`.

    Args:
        teacher: the dense model, of the student's family and hidden size, and with as many layers if their states are
            compared. It is frozen, put into eval mode and moved to the training device, and it is never saved. It may
            be None if only the loss on labels has a weight.
        distillation: the weights and settings of the losses.
        kwargs: the arguments of `GuardedTrainer` and `Trainer`: `run_data`, `model`, `args`, `train_dataset`,
            `data_collator` and so on.

    Raises:
        ValueError: if the teacher is missing or does not fit the student, or if an argument of `Trainer` would replace
            these losses, or a divided rate would meet `learning_rates`.
    """

    losses_on_labels: ClassVar[set[str]]
    heard_words: bool | None = None  # whether the teacher has transcribed a word; None before it transcribes
    model: Any
    outcome: DistillationOutcome

    def __init__(
        self,
        *,
        teacher: PreTrainedModel | None = None,
        distillation: DistillationArguments | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.distillation = DistillationArguments() if distillation is None else distillation
        if self.divide_shared_rate and self.distillation.learning_rates:
            raise ValueError(
                "`divide_shared_rate` must be false beside `learning_rates`, which may have that of 'shared', got true"
            )
        self.weights = self.distillation.weights
        self.label_free = "labels" not in self.weights
        self.states_alone = self.weights.keys() <= {"hidden", "final"}
        self.loss_is_scaled_for_ga = True
        self.hidden_state_loss = HiddenStateLoss()
        temperature = self.distillation.temperature
        if temperature is None:
            temperature = DECODER_TEMPERATURE if self._decoder_learns_alone else TEMPERATURE
        self.logits_loss = LogitsLoss(temperature)
        self.teacher = teacher
        self._check()
        if teacher is not None:
            teacher.requires_grad_(False).eval().to(self.args.device)
        self._logged: dict[str, Tensor] = {}
        self._logged_steps = 0

    def _check(self) -> None:
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "`label_smoothing_factor` must be 0 and `compute_loss_func` None, got "
                f"{self.args.label_smoothing_factor} and {self.compute_loss_func}; the losses are in `distillation`"
            )
        if self.teacher is None:
            if self.weights.keys() != {"labels"}:
                raise ValueError(
                    f"`teacher` must be a model for the losses {', '.join(self.weights)}, got None"
                )
            return
        if self.teacher is self.model:
            raise ValueError("`teacher` must be another model than the student, got the student itself")
        student: Any = self.encoder
        teacher: Any = self.family.find_encoder(self.teacher)
        names = [*SHAPES, *(["num_hidden_layers"] if "hidden" in self.weights else [])]
        pairs = [(name, student.config, teacher.config) for name in names]
        if "logits" in self.weights:
            pairs.append(("vocab_size", self.model.config, self.teacher.config))
        for name, *configs in pairs:
            own, others = (getattr(config, name, None) for config in configs)
            if own != others:
                raise ValueError(f"`teacher` must have the student's {name}, {own}, got {others}")
        layerdrop = getattr(student, "layerdrop", getattr(student.config, "layerdrop", 0.0))
        if "hidden" in self.weights and layerdrop > 0:
            raise ValueError(
                "the student's `layerdrop` must be 0 to compare each layer with the teacher's, got "
                f"{layerdrop}; pass `layerdrop=0` to from_pretrained"
            )

    def run_settings(self) -> dict[str, Any]:
        return super().run_settings() | vars(self.distillation)

    @property
    def family(self) -> Family:
        """The family of student and teacher."""
        return family_of(self.model)

    @property
    def encoder(self) -> nn.Module:
        """The student's encoder, the module that has the `layers`."""
        return self.family.find_encoder(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as `Trainer` does, and sets `outcome`.

        Label-free training freezes a decoder that is dense meanwhile, and any decoder where short windows are learnt,
        since it gets more noise than it learns (docs/LOG.md). It freezes the encoder where `learns_decoder_alone`.

        With `RecipeArguments(keep="better")` and an `eval_dataset`, the student gets its weights back if the loss on
        this data does not fall. A warning says so if the teacher heard no word in any of the recordings.
        """
        result = self._train_and_choose(*args, **kwargs)
        if self.heard_words is False:
            logger.warning(
                "the teacher heard no word in these recordings, so that its probabilities teach nothing; choose "
                "recordings with speech"
            )
        return result

    def _train_and_choose(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and gives the student its weights back where the result is to be kept only if it is better."""
        with self._frozen_part():
            chooses = isinstance(self.args, RecipeArguments) and self.args.keep == "better"
            if not chooses or self.eval_dataset is None:
                result = super().train(*args, **kwargs)
                self.outcome = DistillationOutcome(self.state.log_history)
                return result
            start = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            before = self.evaluate()["eval_loss"]
            self._forget_preparation()
            result = super().train(*args, **kwargs)
            after = self.evaluate()["eval_loss"]
        self.outcome = DistillationOutcome(self.state.log_history, before, after)
        if not self.outcome.is_kept:
            self.model.load_state_dict(start)
            checkpoint = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
            logger.warning(
                "the student keeps its weights as they were, since the loss on the validation clips did not fall "
                f"({before:.5f} before, {after:.5f} after); "
                + (f"the distilled weights are in {checkpoint}, and " if checkpoint.is_dir() else "")
                + '`keep`, "always", keeps them'
            )
        kept = {
            "validation_loss_before": before,
            "validation_loss_after": after,
            "kept": self.outcome.is_kept,
        }
        result.metrics.update(kept)
        return result

    @property
    def _decoder_learns_alone(self) -> bool:
        return self.label_free and "logits" in self.weights and learns_decoder_alone(self.model)

    def _frozen_part(self) -> AbstractContextManager[None]:
        """Inside this context, what does not learn has no gradients."""
        if not self.label_free:
            return nullcontext()
        if self._decoder_learns_alone:
            return _frozen(self.encoder.parameters())
        if has_compact_decoder(self.model) and not has_short_windows(self.model.config):
            return nullcontext()
        of_encoder = set(map(id, self.encoder.parameters()))
        return _frozen(p for p in self.model.parameters() if id(p) not in of_encoder)

    def _forget_preparation(self) -> None:
        """Lets the student be prepared for training after an evaluation.

        Accelerate takes a model that it has prepared once for ready, and would leave the gradients of several processes
        apart.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.accelerator._models.clear()
            self.model._is_accelerate_prepared = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer as `Trainer` does, and splits its groups by component if `learning_rates` is a dict.

        Without a rate for "shared", scales of few-bit weights get a rate of their own: that of their group times
        `SCALE_UNIT` times their mean magnitude. Adam moves every parameter by about its rate, however small it is, and
        the scale of a matrix in 8 bits is a sixty-fourth of that of the same matrix in 2.

        Raises:
            ValueError: if `learning_rates` names a component without trained parameters.
        """
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rates = self.distillation.learning_rates
        trained_model = self.model if model is None else model
        if created and not (isinstance(rates, dict) and "shared" in rates):
            scales = {
                id(module.weight_scale)
                for module in trained_model.modules()
                if isinstance(module, QuantizedWeight)
            }
            optimizer.param_groups = [
                part for group in optimizer.param_groups for part in _relative_to_scales(group, scales)
            ]
        if created and isinstance(rates, dict) and rates:
            component_of = _components(trained_model)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            missing = rates.keys() - {component_of.get(id(p), "rest") for p in trained}
            if missing:
                raise ValueError(
                    f"`learning_rates` must name components that are trained, got {', '.join(sorted(missing))}"
                )
            groups = []
            for group in optimizer.param_groups:
                for name in LEARNING_RATES:
                    params = [p for p in group["params"] if component_of.get(id(p), "rest") == name]
                    groups.append({**group, "params": params, "lr": rates.get(name, group["lr"])})
            optimizer.param_groups = [group for group in groups if group["params"]]
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor]:
        """The batches of one optimizer step, and the sum of their `_count`s, averaged over processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        batches = [self._with_labels(batch) for batch in batches]
        self._logged_steps += 1
        counts = sum((self._count(batch) for batch in batches), torch.zeros(2))
        return batches, self.accelerator.reduce(counts.to(self.args.device), "mean")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the losses; for one batch of an optimizer step, its share in the mean of the step.

        Args:
            model: the student, or a wrapper around it.
            inputs: a batch.
            return_outputs: whether to return the student's output too.
            num_items_in_batch: the counts from `get_batch_samples`; None for a batch on its own, as in evaluation.

        Raises:
            ValueError: if the batch lacks the `labels` that a loss needs.
        """
        inputs = dict(inputs)
        missing = self.losses_on_labels & self.weights.keys()
        if missing and inputs.get("labels") is None:
            raise ValueError(
                f"a batch must have `labels` for the losses {', '.join(sorted(missing))}, got none"
            )
        shares = torch.ones(2)
        if model.training and num_items_in_batch is not None:
            shares = self._count(inputs) / num_items_in_batch.cpu().clamp(min=1)
        losses, outputs = self._losses(model, inputs)
        total: Any = 0.0
        for name, loss in losses.items():
            loss = loss * self._share(name, shares)
            total = total + self.weights[name] * loss
            if model.training:
                self._logged[name] = self._logged.get(name, 0.0) + loss.detach()
        return (total, outputs) if return_outputs else total

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """Returns the losses by name, and the student's output."""
        known = inputs.pop(TEACHER_STATES, None)
        student_inputs = {k: v for k, v in inputs.items() if k != "labels" or not self.states_alone}
        with record_states(self.encoder) as student:
            outputs = self._run(model, self.encoder, student_inputs, encoder_only=self.states_alone)
        losses = {}
        if self.teacher is not None:
            encoder = self.family.find_encoder(self.teacher)
            with torch.no_grad(), self.accelerator.autocast(), record_states(encoder) as teacher:
                if known is not None:
                    teacher.last.append(known)
                    expected = self.teacher(encoder_outputs=(known,), labels=inputs["labels"])
                else:
                    only = "logits" not in self.weights
                    expected = self._run(self.teacher, encoder, inputs, encoder_only=only)
            num_frames = student.last[0].shape[1]
            mask = self._frame_mask(inputs, num_frames)
            # A student with `short_windows` has fewer frames, from the first on.
            layers, last = ([x[:, :num_frames] for x in states] for states in (teacher.layers, teacher.last))
            if "hidden" in self.weights:
                losses["hidden"] = self.hidden_state_loss(student.layers, layers, mask)
            if "final" in self.weights:
                losses["final"] = self.hidden_state_loss(student.last, last, mask)
            if "logits" in self.weights:
                mask = self._logits_mask(inputs, outputs.logits.shape[1])
                losses["logits"] = self.logits_loss(outputs.logits, expected.logits, mask)
        if "labels" in self.weights:
            losses["labels"] = outputs.loss
        return losses, outputs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Evaluates as `Trainer` does, but gives only the loss where a batch has no labels or states are compared."""
        inputs = dict(self._prepare_inputs(inputs))
        if not self.states_alone:
            inputs = dict(self._with_labels(inputs))
            inputs.pop(TEACHER_STATES, None)  # `generate` would not take them
            if inputs.get("labels") is not None:
                return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as `Trainer` does, and adds the mean of each loss since the last log."""
        if "loss" in logs and self._logged_steps:
            for name, total in self._logged.items():
                logs[f"loss_{name}"] = self.accelerator.reduce(total, "mean").item() / self._logged_steps
            self._logged, self._logged_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _with_labels(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds the labels that a loss needs to a batch, if they can be made.

        `TEACHER_STATES` may come with them, so that the teacher's encoder does not run again.
        """
        return inputs

    def _run(self, model: nn.Module, encoder: nn.Module, inputs: dict[str, Any], encoder_only: bool) -> Any:
        """Runs the model, or at least its encoder if `encoder_only` is true, and returns the output."""
        raise NotImplementedError

    def _frame_mask(self, inputs: Mapping[str, Any], num_frames: int) -> Tensor | None:
        """True for the encoder frames that count, (batch_size, num_frames); None if all count."""
        raise NotImplementedError

    def _logits_mask(self, inputs: Mapping[str, Any], num_positions: int) -> Tensor | None:
        """True for the positions of logits that count, (batch_size, num_positions); None if all count."""
        raise NotImplementedError

    def _count(self, inputs: Mapping[str, Any]) -> Tensor:
        """The number of clips, and of tokens or frames that have logits, as a tensor of shape (2,) on the CPU."""
        raise NotImplementedError

    def _share(self, name: str, shares: Tensor) -> Tensor | float:
        """The factor of a loss. `shares` are the batch's shares of the step's clips and positions."""
        return shares[1] if name == "logits" else shares[0]


class Seq2SeqDistillationTrainer(DistillationTrainer, Seq2SeqTrainer):
    """Distils or fine-tunes a Whisper. A batch has `input_features`, and `labels` if a loss needs them.

    Features have the shape (batch_size, num_mel_bins, num_frames), where `num_frames` may be below 3000 (see
    `encoder_window`). Labels have the shape (batch_size, num_tokens), padded with -100. All frames count, also those of
    padding, because the decoder attends to them.
    """

    losses_on_labels: ClassVar[set[str]] = {"logits", "labels"}

    def _with_labels(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.label_free or "logits" not in self.weights or inputs.get("labels") is not None:
            return inputs
        teacher: Any = self.teacher
        features = inputs["input_features"].to(self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            states = encode(teacher.get_encoder(), features).last_hidden_state
            # A teacher that repeats itself may do so for 30 seconds, of which the student hears a few.
            padded = has_short_windows(self.model.config)
            heard = num_heard_frames(features) + MARGIN_FRAMES if padded else None
            labels = transcribe(teacher, features, states, heard)
        made = {**inputs, "labels": labels}
        self.heard_words = bool(self.heard_words) or has_words(teacher, labels)
        return made if "hidden" in self.weights else {**made, TEACHER_STATES: states}

    def _run(self, model: nn.Module, encoder: nn.Module, inputs: dict[str, Any], encoder_only: bool) -> Any:
        features = inputs["input_features"]
        with encoder_window(encoder, features.shape[-1]):
            if not encoder_only:
                return model(**inputs)
            # The call goes through `model`, because a wrapper that synchronises gradients must see it.
            inner = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast(), forward_as(inner, encoder.__call__):
                return model(features)

    def _frame_mask(self, inputs: Mapping[str, Any], num_frames: int) -> Tensor | None:
        return None

    def _logits_mask(self, inputs: Mapping[str, Any], num_positions: int) -> Tensor | None:
        return inputs["labels"] != -100

    def _count(self, inputs: Mapping[str, Any]) -> Tensor:
        labels = inputs.get("labels")
        num_tokens = 0 if labels is None else (labels != -100).sum().item()
        return torch.tensor([float(len(inputs["input_features"])), float(num_tokens)])

    def _share(self, name: str, shares: Tensor) -> Tensor | float:
        return shares[1] if name in self.losses_on_labels else shares[0]


class CTCDistillationTrainer(DistillationTrainer):
    """Distils or fine-tunes an encoder with a CTC head, such as wav2vec 2.0 or Parakeet.

    A batch has `input_values` of shape (batch_size, num_samples) or `input_features` of shape (batch_size, num_frames,
    num_mel_bins), an `attention_mask` for their second dimension, and `labels` for the loss on labels. Padded frames do
    not count. If the model takes no attention mask, a batch has none, and all frames count.
    """

    losses_on_labels: ClassVar[set[str]] = {"labels"}

    def _run(self, model: nn.Module, encoder: nn.Module, inputs: dict[str, Any], encoder_only: bool) -> Any:
        needs_labels = model is not self.teacher and "labels" in self.weights
        return model(**{key: value for key, value in inputs.items() if key != "labels" or needs_labels})

    def _frame_mask(self, inputs: Mapping[str, Any], num_frames: int) -> Tensor | None:
        mask = inputs.get("attention_mask")
        if mask is None:
            return None
        return frame_mask(self.model, num_frames, mask)

    def _logits_mask(self, inputs: Mapping[str, Any], num_positions: int) -> Tensor | None:
        mask = inputs.get("attention_mask")
        return None if mask is None else frame_mask(self.model, num_positions, mask, adapter=True)

    def _count(self, inputs: Mapping[str, Any]) -> Tensor:
        values, mask = inputs[self.model.main_input_name], inputs.get("attention_mask")
        lengths = torch.full((len(values),), values.shape[1]) if mask is None else mask.sum(-1)
        num_frames = num_frames_of(self.model, lengths).sum().item()
        return torch.tensor([float(len(values)), float(num_frames)])

    def _share(self, name: str, shares: Tensor) -> Tensor | float:
        if name == "labels" and self.model.config.ctc_loss_reduction == "sum":
            # The gradients of all processes are averaged, and their sum is wanted.
            return float(self.accelerator.num_processes) if self.model.training else 1.0
        return super()._share(name, shares)


def has_compact_decoder(model: Any) -> bool:
    """Whether the decoder's layers or the token embedding are compact."""
    return any(getattr(model.config, name, None) for name in ("decoder_residual_config", "embedding_bits"))


def learns_decoder_alone(model: Any) -> bool:
    """Whether a distillation leaves the encoder as it is: it has few bits, as the decoder has, and full windows.

    Most of the divergence is then the decoder's, and most of the time would be the encoder's (docs/LOG.md).
    """
    encoder = family_of(model).find_encoder(model)
    full = not has_short_windows(model.config)
    return full and has_compact_decoder(model) and bool(quantized_weights(encoder))


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside this context, these parameters have no gradients."""
    frozen = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        _set_requires_grad(frozen, False)
        yield
    finally:
        _set_requires_grad(frozen, True)


def _set_requires_grad(parameters: Iterable[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)


def _relative_to_scales(group: dict[str, Any], scales: set[int]) -> Iterator[dict[str, Any]]:
    """A group of an optimizer without the parameters whose ids are `scales`, then one group for each of these."""
    others = [p for p in group["params"] if id(p) not in scales]
    if others:
        yield {**group, "params": others}
    for parameter in group["params"]:
        if id(parameter) in scales:
            # FSDP keeps a part of it in each process.
            whole: Any = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            magnitude = whole.detach().float().abs().mean().item()
            yield {**group, "params": [parameter], "lr": SCALE_UNIT * magnitude * group["lr"]}


def _components(model: nn.Module) -> dict[int, str]:
    """The key in `learning_rates` for each parameter of the residual layers, by the parameter's id."""
    names = {}
    for module in model.modules():
        if isinstance(module, (ResidualLinear, *SHARED, QuantizedEmbedding)):
            for name, parameter in module.named_parameters(recurse=False):
                kinds = {"weight": "shared", "weight_scale": "shared"}
                kinds |= {"residual_A": "lora", "residual_B": "lora"}
                kinds |= {"weight_mean": "rest"}
                names[id(parameter)] = kinds.get(name, "diagonal")
    return names

"""The dense model as a compression sees it, the batches of inputs, and runs that end where enough is known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..families import WHISPER, frame_mask, takes_mask
from ..layers import at_least_float32
from ..speech.collators import LABEL_PADDING
from ..speech.transcription import greedy_labels, has_words, transcribe

INPUT_NAMES = ("input_features", "input_values")
TRANSCRIBED = 8  # batches at a time, since tokens are cheaper together
LABELS = "labels"  # of a decoder: token ids as `transcribe` gives them, with LABEL_PADDING
MEMORY = "encoder_states"  # what the dense encoder gives for the inputs, so that it runs once
Batch = dict[str, Tensor]
Context = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a layer beside its hidden states


def refuse_adapter(dense: Any) -> None:
    """Raises ValueError for a model that PEFT wraps, and for the folder of an adapter."""
    if isinstance(dense, (str, Path)):
        is_adapter = (Path(dense) / "adapter_config.json").is_file()
        name = repr(str(dense))
    else:
        is_adapter, name = hasattr(dense, "peft_config"), f"a {type(dense).__name__} with an adapter"
    if is_adapter:
        raise ValueError(
            f"`dense` must be a whole model without an adapter, got {name}: merge the adapter first, and pass the "
            "model that merge_and_unload() of PEFT gives"
        )


def frozen_view(model: Any, device: Any = None, lent: Iterable[nn.Module] = ()) -> Any:
    """A second model over the same weights, in eval mode and without gradients.

    Modules and hooks are its own, so nothing that is done to it reaches `model`. Weights of fewer than 32 bits are
    converted to float32; all others are the tensors of `model`, and take no further memory.

    Args:
        model: the model.
        device: where the view's weights are; by default where those of `model` are.
        lent: modules of `model` whose parameters stay as they are and where they are, for `lend_weights`.
    """

    def ready(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device)
        return at_least_float32(tensor) if tensor.is_floating_point() else tensor

    stays = {id(parameter) for module in lent for parameter in module.parameters()}
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(
            parameter.detach() if id(parameter) in stays else ready(parameter), requires_grad=False
        )
        for parameter in model.parameters()
    }
    memo |= {id(buffer): ready(buffer) for buffer in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def lend_weights(module: nn.Module, device: torch.device) -> None:
    """From now on, a module's own parameters are on `device` in float32 while it runs. A backward pass that follows
    keeps the copies until it is done.
    """
    loan = _Loan(device)
    module.register_forward_pre_hook(loan.begin)
    module.register_forward_hook(loan.end, always_call=True)


class _Loan:
    """Copies of one module's parameters on a device, while it runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[str, Any] = {}

    def begin(self, module: nn.Module, _args: Any) -> None:
        self.kept = {name: value for name, value in module._parameters.items() if value is not None}
        for name, value in self.kept.items():
            set_frozen(module, name, at_least_float32(value.to(self.device)))

    def end(self, module: nn.Module, _args: Any, _output: Any) -> None:
        for name, value in self.kept.items():
            setattr(module, name, value)
        self.kept = {}


def set_frozen(module: Any, name: str, value: Tensor) -> None:
    """Gives a module of a `frozen_view` another parameter, which leaves the tensor that it had as it is."""
    setattr(module, name, nn.Parameter(value.detach(), requires_grad=False))


def as_batches(calibration: Any) -> list[Batch]:
    """Checked batches of model inputs; a single batch needs no list around it."""
    if calibration is None:
        return []
    if isinstance(calibration, (Mapping, Tensor)):
        calibration = [calibration]
    batches = []
    for index, batch in enumerate(calibration):
        batch = {"input_features": batch} if isinstance(batch, Tensor) and batch.dim() == 3 else batch
        batch = {"input_values": batch} if isinstance(batch, Tensor) else batch
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"`calibration[{index}]` must be a dict of model inputs, got {type(batch).__name__}"
            )
        batch = {
            key: batch[key] for key in (*INPUT_NAMES, "attention_mask", LABELS) if batch.get(key) is not None
        }
        inputs = [batch[name] for name in INPUT_NAMES if name in batch]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise ValueError(
                f"`calibration[{index}]` must have a tensor {' or '.join(INPUT_NAMES)}, got {sorted(batch)}"
            )
        if not inputs[0].numel():
            raise ValueError(f"`calibration[{index}]` must not be empty, got shape {tuple(inputs[0].shape)}")
        if not torch.isfinite(inputs[0]).all():
            raise ValueError(f"`calibration[{index}]` must be finite, but it has NaN or infinite values")
        batches.append(batch)
    return batches


def to_model(model: Any, batch: Mapping[str, Tensor]) -> Batch:
    """The batch on the model's device; floating-point values get the model's dtype."""
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
    }


def with_labels(
    model: Any,
    encoder: nn.Module,
    batches: list[Batch],
    progress: bool,
    *,
    own: Collection[int] | None = None,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> list[Batch]:
    """The batches with what a Whisper's encoder gives, and with the model's own greedy transcripts as labels, where
    they have none.

    Other decoders read more than the encoder's states, such as the mask of its frames, or change them in place.

    Args:
        model: a dense model with a decoder.
        encoder: its encoder.
        batches: inputs of the model.
        progress: shows a progress bar.
        own: indices of the batches that this process hears; None for all. The others get labels alone.
        gather: gives the values that all processes pass to it.

    Raises:
        ValueError: when a transcript is needed and the model cannot generate, or nothing is heard in any batch.
    """
    lacking = [index for index, batch in enumerate(batches) if LABELS not in batch]
    if lacking and not model.can_generate():
        raise ValueError(
            f"`calibration` must have `{LABELS}`, token ids of transcripts, since a {type(model).__name__} cannot "
            'generate them; or compress the encoder alone, with parts=("encoder",)'
        )
    found = list(batches)
    places = sorted(range(len(batches)) if own is None else own)
    if model.config.model_type == WHISPER.name:
        for place in tqdm(places, desc="encoding", unit="batch", disable=not progress):
            batch = found[place]
            memory = output_of(model, encoder, to_model(model, batch))[0]
            found[place] = {**batch, MEMORY: memory.to(main_input(batch).device)}
    lacking = [place for place in lacking if place in places]
    made: dict[int, Tensor] = {}
    with tqdm(total=len(lacking), desc="transcribing", unit="batch", disable=not progress) as bar:
        for start in range(0, len(lacking), TRANSCRIBED):
            together = lacking[start : start + TRANSCRIBED]
            for index, labels in zip(together, _transcripts(model, [found[index] for index in together])):
                made[index] = labels
            bar.update(len(together))
    for of_process in gather({place: labels.cpu() for place, labels in made.items()}):
        for place, labels in of_process.items():
            found[place] = {**found[place], LABELS: labels.to(main_input(found[place]).device)}
    if not any(has_words(model, batch[LABELS]) for batch in found):
        raise ValueError(
            "`calibration` must have speech for a model with a decoder, but the model hears no word in it; pass other "
            'recordings, or compress the encoder alone, with parts=("encoder",)'
        )
    return found


def _transcripts(model: Any, batches: list[Batch]) -> list[Tensor]:
    """Labels for each batch, (batch_size, num_tokens), on the device of its inputs."""
    if model.config.model_type != WHISPER.name:
        return [
            greedy_labels(model, to_model(model, batch)).to(main_input(batch).device) for batch in batches
        ]
    features, memory = (
        torch.cat([to_model(model, batch)[name] for batch in batches]) for name in ("input_features", MEMORY)
    )
    together = transcribe(model, features, memory).to(main_input(batches[0]).device)
    found = []
    for labels in together.split([len(main_input(batch)) for batch in batches]):
        longest = max(1, int((labels != LABEL_PADDING).sum(1).max()))
        found.append(labels[:, :longest])
    return found


def main_input(batch: Batch) -> Tensor:
    """What the model hears, (batch_size, ...)."""
    return next(batch[name] for name in INPUT_NAMES if name in batch)


def decoder_ids(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The tokens that the decoder reads to predict the labels, (batch_size, num_tokens)."""
    labels, known = batch[LABELS], (model.config, getattr(model, "generation_config", None))
    starts = (getattr(config, "decoder_start_token_id", None) for config in known)
    start = next((start for start in starts if start is not None), None)
    if start is None:
        raise ValueError(
            "`decoder_start_token_id` must be set in the config of a model with a decoder, got None"
        )
    return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1].clamp_min(0)], 1)


def is_token(batch: Mapping[str, Tensor]) -> Tensor:
    """(batch_size, num_tokens), false for labels that are padding."""
    return batch[LABELS] != LABEL_PADDING


def without_memory(batch: Batch) -> Batch:
    """The batch for a model whose encoder differs from the dense one."""
    return {name: value for name, value in batch.items() if name != MEMORY}


def inputs_of(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a forward pass: labels become the decoder's input, no cache is kept, and where the encoder's
    states are known, it does not run.
    """
    inputs: dict[str, Any] = to_model(model, batch)
    if MEMORY in inputs:
        inputs["encoder_outputs"] = (inputs.pop(MEMORY),)
    if LABELS in inputs:
        inputs["decoder_input_ids"] = decoder_ids(model, inputs)
        inputs["use_cache"] = False
        del inputs[LABELS]
    return inputs


def mask_of(model: Any, output: Any, batch: Mapping[str, Tensor]) -> Tensor | None:
    """(batch_size, num_frames), false for frames of padding in an encoder's output; None where the family does not
    mask.
    """
    known = getattr(output, "attention_mask", None)
    if known is not None:
        return known.bool()
    if "attention_mask" not in batch or not takes_mask(model):
        return None
    return frame_mask(model, output[0].shape[1], batch["attention_mask"])


class Reached(Exception):
    """Ends a forward pass at the point after which nothing is needed."""


def run_until_reached(run: Callable[[], Any], handles: list[Any]) -> Any:
    """The result of `run`, or None if a hook raised `Reached`. The hooks are removed."""
    try:
        return run()
    except Reached:
        return None
    finally:
        for handle in handles:
            handle.remove()


def output_of(model: Any, owner: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The output of the stack that `owner` holds, whose first entry are its final states, of shape (batch_size,
    num_frames, hidden_size). Nothing after it runs.
    """
    outputs: list[Any] = []
    inputs = inputs_of(model, batch) if LABELS in batch else batch

    def catch(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output)
        raise Reached

    run_until_reached(lambda: model(**inputs), [owner.register_forward_hook(catch)])
    return outputs[0]


def calls_of(
    model: Any, layers: Sequence[nn.Module], inputs: Mapping[str, Any], *, same_arguments: bool
) -> tuple[Tensor, list[Context]]:
    """The hidden states that the first of `layers` gets for these inputs, and the other arguments of each.

    Where all get the same arguments, no layer runs.
    """
    seen: list[tuple[Tensor, Context]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            seen.append((args[0], (args[1:], kwargs)))
        else:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            seen.append((kwargs["hidden_states"], ((), rest)))
        if same_arguments or len(seen) == len(layers):
            raise Reached

    handles = [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in layers]
    run_until_reached(lambda: model(**inputs), handles)
    contexts = [context for _, context in seen]
    return seen[0][0], contexts * len(layers) if same_arguments else contexts

"""Training a Whisper-type model from scratch, dense or residual: its vocabulary, its sizes, and its Trainer.

A decoder that learns to attend and an encoder that learns to hear hold each other up at first. A CTC loss on the
encoder may help (Watanabe et al. 2017, https://arxiv.org/abs/1609.06773); its output layer goes when training ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Seq2SeqTrainer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.utils import logging

from ..classes import ResidualWhisperConfig, ResidualWhisperForConditionalGeneration
from ..configuration import ResidualConfig
from ..families import Stack
from ..layers import ResidualLinear
from ..modeling import forward_as
from ..speech.collators import LABEL_PADDING
from .checkpoints import checkpoints_in, fault_of
from .clips import ctc_frames
from .guarded import GuardedTrainer
from .losses import is_number

logger = logging.get_logger(__name__)
END, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
SPECIAL_TOKENS = (END, START, NO_TIMESTAMPS)
SPECTROGRAM_GAIN = 3.5  # Whisper's spectrograms have a standard deviation of about 0.29


@dataclass
class EncoderSizes:
    """The sizes of a new encoder; the defaults are the paper's.

    Raises:
        ValueError: naming the field, for sizes that cannot be.
    """

    encoder_layers: int = field(default=18, metadata={"help": "Number of encoder layers."})
    d_model: int = field(default=512, metadata={"help": "Width of the model."})
    encoder_ffn_dim: int = field(
        default=2048, metadata={"help": "Inner width of the encoder's feed-forwards."}
    )
    attention_heads: int = field(default=8, metadata={"help": "Attention heads."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout."})
    mask_time: float = field(
        default=0.05, metadata={"help": "SpecAugment: part of the frames that masks cover."}
    )
    mask_time_length: int = field(default=10, metadata={"help": "SpecAugment: frames of a mask."})
    mask_bands: float = field(
        default=0.05, metadata={"help": "SpecAugment: part of the bands that masks cover."}
    )
    mask_bands_length: int = field(default=10, metadata={"help": "SpecAugment: bands of a mask."})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("dropout", "mask_time", "mask_bands"):
                if not is_number(value) or value >= 1:
                    raise ValueError(f"`{name}` must be a number from 0 to below 1, got {value!r}")
            elif name == "small_branches":
                if type(value) is not bool:
                    raise ValueError(f"`{name}` must be true or false, got {value!r}")
            elif type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
        if self.d_model % self.attention_heads or self.d_model % 2:
            raise ValueError(
                f"`d_model` must be an even multiple of `attention_heads` ({self.attention_heads}), got {self.d_model}"
            )


@dataclass
class ModelSizes(EncoderSizes):
    """The sizes of a new Whisper. Its decoder has the width and the attention heads of its encoder.

    Raises:
        ValueError: naming the field, for sizes that cannot be.
    """

    decoder_layers: int = field(default=4, metadata={"help": "Number of decoder layers."})
    decoder_ffn_dim: int = field(
        default=2048, metadata={"help": "Inner width of the decoder's feed-forwards."}
    )
    num_mel_bins: int = field(default=80, metadata={"help": "Mel bands of the spectrogram."})
    hop_length: int = field(
        default=160,
        metadata={
            "help": "Samples from one frame of the spectrogram to the next; the encoder has half as many."
        },
    )
    window_seconds: int = field(
        default=24, metadata={"help": "Length that every clip is padded to; longer clips are an error."}
    )
    max_tokens: int = field(
        default=256, metadata={"help": "The most tokens of a text, with its special ones."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        samples = self.window_seconds * WhisperFeatureExtractor().sampling_rate
        if samples % (2 * self.hop_length):
            raise ValueError(
                f"`window_seconds` must be a whole number of encoder frames of {2 * self.hop_length} samples, got "
                f"{self.window_seconds}"
            )

    @property
    def num_frames(self) -> int:
        """Encoder frames of a window."""
        return self.window_seconds * WhisperFeatureExtractor().sampling_rate // (2 * self.hop_length)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> WhisperTokenizer:
    """A byte-level BPE trained on `texts`, with the special tokens of an English-only Whisper. It knows the characters
    of `texts` and no others.

    Raises:
        ValueError: if `texts` is empty, or `vocab_size` is too small for its characters.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    train_bpe(bpe, list(texts), vocab_size, later=SPECIAL_TOKENS)
    vocab = bpe.get_vocab()
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    for token in SPECIAL_TOKENS:
        vocab[token] = len(vocab)
    tokenizer = WhisperTokenizer(vocab=vocab, merges=merges, add_prefix_space=True, pad_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, NO_TIMESTAMPS]})
    return tokenizer


def train_bpe(
    bpe: Tokenizer, texts: Sequence[str], vocab_size: int, *, later: Sequence[str], first: Sequence[str] = ()
) -> None:
    """Trains a BPE on `texts`, whose characters are its alphabet.

    Args:
        bpe: with its `pre_tokenizer`.
        texts: of the training split.
        vocab_size: tokens of the whole vocabulary.
        later: special tokens of it that are added after the training.
        first: special tokens that have the first numbers.

    Raises:
        ValueError: if `texts` is empty, or `vocab_size` is too small for its characters.
    """
    if not texts:
        raise ValueError("the training split must have clips with text, got none")
    split: Any = bpe.pre_tokenizer
    alphabet = {char for text in texts for piece, _ in split.pre_tokenize_str(text) for char in piece}
    num_special = len(first) + len(later)
    if vocab_size < len(alphabet) + num_special:
        raise ValueError(
            f"`vocab_size` must be at least {len(alphabet) + num_special}, for the {len(alphabet)} characters of the "
            f"texts and {num_special} special tokens, got {vocab_size}"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(later),
        special_tokens=list(first),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)


def new_processor(tokenizer: WhisperTokenizer, sizes: ModelSizes) -> WhisperProcessor:
    """The processor of a new model."""
    extractor = WhisperFeatureExtractor(
        feature_size=sizes.num_mel_bins, hop_length=sizes.hop_length, chunk_length=sizes.window_seconds
    )
    return WhisperProcessor(extractor, tokenizer)


def new_model(
    sizes: ModelSizes, tokenizer: WhisperTokenizer, residual_config: ResidualConfig | None = None
) -> Any:
    """A model with random weights, residual if there is a `residual_config`."""
    end = tokenizer.eos_token_id
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_mel_bins": sizes.num_mel_bins,
        "d_model": sizes.d_model,
        "encoder_layers": sizes.encoder_layers,
        "encoder_ffn_dim": sizes.encoder_ffn_dim,
        "encoder_attention_heads": sizes.attention_heads,
        "decoder_layers": sizes.decoder_layers,
        "decoder_ffn_dim": sizes.decoder_ffn_dim,
        "decoder_attention_heads": sizes.attention_heads,
        "max_source_positions": sizes.num_frames,
        "max_target_positions": sizes.max_tokens,
        "dropout": sizes.dropout,
        "init_std": sizes.d_model**-0.5,
        "apply_spec_augment": sizes.mask_time > 0 or sizes.mask_bands > 0,
        "mask_time_prob": sizes.mask_time,
        "mask_time_length": sizes.mask_time_length,
        "mask_feature_prob": sizes.mask_bands,
        "mask_feature_length": sizes.mask_bands_length,
        "decoder_start_token_id": tokenizer.convert_tokens_to_ids(START),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    model: Any
    if residual_config is None:
        model = WhisperForConditionalGeneration(WhisperConfig(**values))
    else:
        config = ResidualWhisperConfig(**values, residual_config=residual_config)
        model = ResidualWhisperForConditionalGeneration(config)
    encoder = model.get_encoder()
    with torch.no_grad():
        # Else a narrow encoder hardly hears the spectrogram beside its positions, which are about seven times as large.
        for convolution, gain in ((encoder.conv1, SPECTROGRAM_GAIN), (encoder.conv2, 2**0.5)):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            convolution.weight.mul_(gain)
    model.generation_config.update(
        is_multilingual=False,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids(NO_TIMESTAMPS),
        max_length=sizes.max_tokens,
    )
    return model


@torch.no_grad()
def start_small(layers: nn.ModuleList, stack: Stack) -> None:
    """Makes the random weights at the end of each residual branch smaller, by the root of the number of branches, so
    that a deep encoder begins close to the identity (Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners", section 2.3).

    Args:
        layers: of an encoder that has just been made; a matrix that several share changes once.
        stack: where their branches end.
    """
    modules = [layer.get_submodule(block.writer) for layer in layers for block in stack.blocks]
    weights = {id(weight): weight for weight in map(_start_of, modules)}
    for weight in weights.values():
        weight.mul_(len(modules) ** -0.5)


def _start_of(module: Any) -> Tensor:
    """The parameter in proportion to which a matrix starts."""
    if not isinstance(module, ResidualLinear):
        return module.weight  # type: ignore[no-any-return]
    if module.shared is None:
        return module.residual_B  # type: ignore[return-value]
    shared: Any = module.shared
    return shared.weight_scale if hasattr(shared, "weight_scale") else shared.weight  # type: ignore[no-any-return]


def check_transcripts(
    clips: Iterable[tuple[str, str]], tokenizer: WhisperTokenizer, sizes: ModelSizes, *, with_ctc: bool
) -> None:
    """Checks every text before training starts.

    Args:
        clips: name and text of each clip.
        tokenizer: the vocabulary.
        sizes: of the model.
        with_ctc: whether the text must fit the encoder's frames too.

    Raises:
        ValueError: naming the clip, for an empty split, a text that is too long, or one with unknown characters.
    """
    for name, text in with_known_characters(clips, partial(_is_unknown, tokenizer=tokenizer)):
        ids = tokenizer(text).input_ids
        spoken = [i for i in ids if i < len(tokenizer) - len(SPECIAL_TOKENS)]
        if len(ids) > sizes.max_tokens:
            raise ValueError(
                f"the text of {name} must have at most `max_tokens` = {sizes.max_tokens} tokens, got {len(ids)}; leave "
                "the clip out or raise `max_tokens`"
            )
        frames = ctc_frames(spoken)
        if with_ctc and frames > sizes.num_frames:
            raise ValueError(
                f"the text of {name} must fit the {sizes.num_frames} encoder frames of a window, got one that needs "
                f"{frames}; raise `vocab_size`, or set `ctc_weight` to 0"
            )


def with_known_characters(
    clips: Iterable[tuple[str, str]], is_unknown: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    """The clips, each by name and text, as long as the vocabulary has their characters.

    Raises:
        ValueError: naming the first clip with unknown characters, or for no clips.
    """
    number = 0
    known: set[str] = set()
    for number, (name, text) in enumerate(clips, start=1):  # noqa: B007
        new = set(text) - known
        unknown = sorted(filter(is_unknown, new))
        if unknown:
            raise ValueError(
                f"the text of {name} must have only characters of the training split, got {''.join(unknown)!r} in "
                f"{text!r}"
            )
        known |= new
        yield name, text
    if not number:
        raise ValueError("every split must have clips, got an empty one")


def _is_unknown(character: str, tokenizer: WhisperTokenizer) -> bool:
    """Whether it is lost, since the vocabulary lacks one of its bytes."""
    found: str = tokenizer.decode(tokenizer(character).input_ids, skip_special_tokens=True)
    return found.strip() != character.strip()


class TokenMeanTrainer(GuardedTrainer):
    """A Trainer whose loss is a mean over the tokens of an optimizer step, so that it is the same for accumulated steps
    and for many processes.
    """

    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor]:
        """The batches of one optimizer step, and their numbers of tokens, averaged over processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = sum((self._count(batch["labels"]).cpu() for batch in batches), torch.zeros(()))
        return batches, self.accelerator.reduce(counts.to(self.args.device), "mean")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch, as its part of the mean. A loss that is not finite stops the run."""
        labels = inputs["labels"]
        is_alone = num_items_in_batch is None or not model.training
        counts = self._count(labels) if is_alone else num_items_in_batch
        loss, outputs = self._loss(model, inputs, counts.clamp(min=1).to(labels.device))
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss must be finite, got {loss.item()} at step {self.state.global_step} for the batch of the "
                f"texts {self._texts_of(inputs)}; lower `learning_rate`, or raise `warmup_steps`"
            )
        return (loss, outputs) if return_outputs else loss

    def _count(self, labels: Tensor) -> Tensor:
        """What the sums of a batch are divided by, added up over an optimizer step."""
        raise NotImplementedError

    def _loss(self, model: nn.Module, inputs: dict[str, Any], counts: Tensor) -> tuple[Tensor, Any]:
        """The loss of a batch, its sums divided by `counts`, and the model's outputs."""
        raise NotImplementedError

    def finish(self, last: int) -> None:
        """Takes the mean of the last checkpoints' weights. All processes call it."""
        load_average(self.model, Path(str(self.args.output_dir)), last)


class ScratchTrainer(TokenMeanTrainer, Seq2SeqTrainer):
    """The loss of the decoder with label smoothing, and beside it CTC on the encoder.

    Args:
        ctc_weight: the weight of CTC, from 0 to 1; the decoder's loss has the rest. Its blank is the end of text.
        args: as of `GuardedTrainer` and `Seq2SeqTrainer`; `label_smoothing_factor` is the decoder's.

    Raises:
        ValueError: for a weight outside of these bounds; during training, for a loss that is not finite.
    """

    def __init__(self, *args: Any, ctc_weight: float = 0.3, **kwargs: Any) -> None:
        if not 0 <= ctc_weight < 1:
            raise ValueError(f"`ctc_weight` must be at least 0 and below 1, got {ctc_weight!r}")
        self.ctc_weight = ctc_weight
        model = kwargs["model"]
        if ctc_weight:
            model.ctc_head = nn.Linear(model.config.d_model, model.config.vocab_size)
        super().__init__(*args, **kwargs)

    def run_settings(self) -> dict[str, Any]:
        return super().run_settings() | {"ctc_weight": self.ctc_weight}

    def _count(self, labels: Tensor) -> Tensor:
        """The tokens that the decoder learns, and those that CTC does: without the special ones."""
        tokens = labels != LABEL_PADDING
        spoken = tokens[:, 1:] & (labels[:, 1:] != self.model.config.eos_token_id)
        return torch.tensor([float(tokens.sum()), float(spoken.sum())])

    def _loss(self, model: nn.Module, inputs: dict[str, Any], counts: Tensor) -> tuple[Tensor, Any]:
        labels = inputs["labels"]
        num_tokens, num_spoken = counts
        with forward_as(self.model, self._forward):
            outputs, ctc_logits = model(input_features=inputs["input_features"], labels=labels)
        loss = F.cross_entropy(
            outputs.logits.flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=LABEL_PADDING,
            label_smoothing=self.args.label_smoothing_factor,
            reduction="sum",
        )
        loss = loss / num_tokens
        if ctc_logits is not None:
            loss = (1 - self.ctc_weight) * loss + self.ctc_weight * self._ctc_loss(
                ctc_logits, labels
            ) / num_spoken
        return loss, outputs

    def _forward(self, input_features: Tensor, labels: Tensor) -> Any:
        """The dense class's own outputs, and CTC's logits; one call, as data parallelism wants it."""
        model: Any = self.model
        outputs = type(model).forward(model, input_features=input_features, labels=labels)
        return outputs, model.ctc_head(outputs.encoder_last_hidden_state) if self.ctc_weight else None

    def _ctc_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over the clips."""
        end = self.model.config.eos_token_id
        spoken = labels[:, 1:]  # without NO_TIMESTAMPS
        lengths = ((spoken != LABEL_PADDING) & (spoken != end)).sum(1)
        log_probs = logits.float().log_softmax(-1).transpose(0, 1)
        frames = torch.full((len(logits),), logits.shape[1], dtype=torch.long)
        targets = spoken.masked_fill(spoken == LABEL_PADDING, end)
        return F.ctc_loss(log_probs, targets, frames, lengths, blank=end, reduction="sum")

    def finish(self, last: int) -> None:
        """Takes the mean of the last checkpoints' weights, and removes CTC's layer. All processes call it."""
        super().finish(last)
        if self.ctc_weight:
            del self.model.ctc_head
            self.ctc_weight = 0.0


def check_average(last: int, args: Any) -> None:
    """Checks before the training that a run keeps the checkpoints whose mean it is to take.

    Raises:
        ValueError: naming the option.
    """
    if last < 1:
        raise ValueError(f"`average_checkpoints` must be at least 1, got {last}")
    kept = math.inf if args.save_total_limit is None else args.save_total_limit
    if last > 1 and (args.save_strategy == "no" or last > kept):
        raise ValueError(
            f"`average_checkpoints` must be at most the number of checkpoints that are kept, got {last} with "
            f"`save_strategy` {str(args.save_strategy.value)!r} and `save_total_limit` {args.save_total_limit}"
        )


def load_average(model: Any, folder: Path, last: int) -> None:
    """Gives a model the mean of the last checkpoints in a run's folder whose weights are complete; one is the model
    itself. A warning says where there are fewer.
    """
    if last == 1:
        return
    folders = [path for path in checkpoints_in(folder) if fault_of(path, weights_alone=True) is None]
    if len(folders) < last:
        logger.warning(
            f"`average_checkpoints` is {last}, and {folder} has {len(folders)} checkpoints with complete weights: the "
            f"model is {'their mean' if folders else 'that of the last step'}; save more often for a mean of more"
        )
    if folders:
        model.load_state_dict(average_checkpoints(folders[-last:]), strict=False)
        model.tie_weights()


def average_checkpoints(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the weights in each folder's `model.safetensors`, in their dtypes."""
    total: dict[str, Tensor] = {}
    for folder in folders:
        for name, value in load_file(folder / "model.safetensors").items():
            total[name] = total[name] + value.double() if name in total else value.double()
    first = load_file(folders[0] / "model.safetensors")
    return {
        name: (value / len(folders)).to(first[name].dtype) if first[name].is_floating_point() else first[name]
        for name, value in total.items()
    }

"""A new Parakeet, dense or residual, to train from scratch: Fast Conformer layers (https://arxiv.org/abs/2305.05084)
with CTC, RNN-T (https://arxiv.org/abs/1211.3711) or TDT (https://arxiv.org/abs/2304.06795) over them.

The Trainer that fine-tunes on transcripts (`trainers.py`) trains it with CTC, too, and averages over clips as the
models of transformers do. `CTCTrainer` averages over tokens, as `TransducerTrainer` does, which trains the other two.
RNN-T's loss is that of torchaudio, as in transformers, which has TDT's itself.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCTC,
    AutoModelForRNNT,
    AutoModelForTDT,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetProcessor,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
    ParakeetTokenizer,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from ..classes import config_class_of
from ..configuration import ResidualConfig
from ..families import FAMILIES, family_of, num_frames_of
from ..speech.collators import LABEL_PADDING
from .scratch import EncoderSizes, TokenMeanTrainer, start_small, train_bpe

Head = Literal["ctc", "rnnt", "tdt"]
CONFIGS: dict[str, Any] = {"ctc": ParakeetCTCConfig, "rnnt": ParakeetRNNTConfig, "tdt": ParakeetTDTConfig}
AUTO_CLASSES: dict[str, Any] = {"ctc": AutoModelForCTC, "rnnt": AutoModelForRNNT, "tdt": AutoModelForTDT}
UNKNOWN, PADDING, BLANK = "<unk>", "<pad>", "<blank>"


@dataclass
class ParakeetSizes(EncoderSizes):
    """The sizes of a new Parakeet.

    Raises:
        ValueError: naming the field, for sizes that cannot be.
    """

    conv_kernel: int = field(default=9, metadata={"help": "Frames that a layer's convolution covers."})
    subsampling: int = field(
        default=8,
        metadata={
            "help": "Frames of the spectrogram, 10 ms each, in a frame of the encoder. Times that the processor of "
            "transformers gives are right for 8 alone."
        },
    )
    subsampling_channels: int = field(
        default=256, metadata={"help": "Channels of the convolutions that make these frames."}
    )
    num_mel_bins: int = field(default=80, metadata={"help": "Mel bands of the spectrogram."})
    small_branches: bool = field(
        default=True,
        metadata={
            "help": "Start each branch of a layer smaller, by the root of the number of branches; a deep encoder "
            "learns sooner by it."
        },
    )
    decoder_layers: int = field(default=1, metadata={"help": "LSTM layers over the text, of RNN-T and TDT."})
    decoder_dim: int = field(default=640, metadata={"help": "Width of that LSTM and of what joins it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subsampling < 2 or self.subsampling & (self.subsampling - 1):
            raise ValueError(f"`subsampling` must be a power of two and at least 2, got {self.subsampling}")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"`conv_kernel` must be odd, got {self.conv_kernel}")


def check_head(head: str) -> None:
    """Checks that a model with this head can be trained here.

    Raises:
        ValueError: for one that does not exist, or whose loss is not installed.
    """
    if head not in get_args(Head):
        raise ValueError(f"`head` must be one of {', '.join(get_args(Head))}, got {head!r}")
    if head == "rnnt":
        try:
            importlib.import_module("torchaudio")
        except (ImportError, OSError) as error:  # OSError where it is built for another device than torch
            raise ValueError(
                f"`head` 'rnnt' needs torchaudio, whose loss transformers uses, and it cannot be imported: {error}. "
                "Install torchaudio as built for the installed torch, or take 'tdt'"
            ) from error


def new_parakeet_processor(
    texts: Iterable[str], vocab_size: int, head: Head, sizes: ParakeetSizes
) -> ParakeetProcessor:
    """The processor of a new model, with a BPE that is trained on `texts` and knows no characters but theirs.

    Raises:
        ValueError: if `texts` is empty, or `vocab_size` is too small for its characters.
    """
    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    bpe.decoder = decoders.Metaspace()  # type: ignore[assignment]
    special = [PADDING] if head == "ctc" else [PADDING, BLANK]
    train_bpe(bpe, [text for text in texts if text], vocab_size, later=special, first=[UNKNOWN])
    tokenizer = ParakeetTokenizer(tokenizer_object=bpe, unk_token=UNKNOWN, pad_token=PADDING)
    tokenizer.add_tokens(special[1:], special_tokens=True)
    return ParakeetProcessor(
        ParakeetFeatureExtractor(feature_size=sizes.num_mel_bins),
        tokenizer,
        blank_token=special[-1],
        decoder_type=head,
    )


def new_parakeet(
    sizes: ParakeetSizes,
    head: Head,
    tokenizer: ParakeetTokenizer,
    residual_config: ResidualConfig | None = None,
) -> Any:
    """A model with random weights, residual if there is a `residual_config`."""
    encoder = ParakeetEncoderConfig(
        hidden_size=sizes.d_model,
        num_hidden_layers=sizes.encoder_layers,
        num_attention_heads=sizes.attention_heads,
        intermediate_size=sizes.encoder_ffn_dim,
        conv_kernel_size=sizes.conv_kernel,
        subsampling_factor=sizes.subsampling,
        subsampling_conv_channels=sizes.subsampling_channels,
        num_mel_bins=sizes.num_mel_bins,
        dropout=sizes.dropout,
        activation_dropout=sizes.dropout,
        attention_dropout=sizes.dropout,
        layerdrop=0.0,
        initializer_range=sizes.d_model**-0.5,
    )
    values: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if head != "ctc":
        values |= {
            "blank_token_id": tokenizer.convert_tokens_to_ids(BLANK),
            "decoder_hidden_size": sizes.decoder_dim,
            "num_decoder_layers": sizes.decoder_layers,
        }
    dense: Any = CONFIGS[head]
    config_class: Any = dense if residual_config is None else config_class_of(FAMILIES[dense.model_type])
    own = {} if residual_config is None else {"residual_config": residual_config}
    model = AUTO_CLASSES[head].from_config(config_class(encoder_config=encoder, **values, **own))
    if head != "ctc":
        model.generation_config.decoder_start_token_id = values["blank_token_id"]
    if is_tdt(model):
        # The logits of durations come after those of tokens, and `generate` would take the largest of all.
        first = len(tokenizer)
        model.generation_config.suppress_tokens = list(range(first, first + len(model.config.durations)))
    if sizes.small_branches:
        start_small(family_of(model).find_encoder(model).layers, family_of(model).encoder)
    add_spec_augment(model, sizes)
    return model


def is_tdt(model: Any) -> bool:
    """Whether a model's transducer says, with each token, how many frames to go on."""
    return hasattr(model.config, "durations")


def add_spec_augment(model: Any, sizes: EncoderSizes) -> None:
    """Masks frames and bands of what a model's encoder reads while it trains (SpecAugment,
    https://arxiv.org/abs/1904.08779), which Parakeet does not do itself. A saved model has no such masks.
    """

    def mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        features: Tensor = kwargs["input_features"]
        kwargs["input_features"] = mask_features(features, sizes)
        return args, kwargs

    if sizes.mask_time or sizes.mask_bands:
        family_of(model).find_encoder(model).register_forward_pre_hook(mask, with_kwargs=True)


def mask_features(features: Tensor, sizes: EncoderSizes) -> Tensor:
    """Features, (batch_size, num_frames, num_mel_bins), in which random frames and bands are 0, their mean."""
    num_clips, num_frames, num_bands = features.shape
    for part, length, size, axis in (
        (sizes.mask_time, sizes.mask_time_length, num_frames, 2),
        (sizes.mask_bands, sizes.mask_bands_length, num_bands, 1),
    ):
        if part and length <= size:
            chosen = _compute_mask_indices((num_clips, size), part, length)
            masked = torch.from_numpy(chosen).to(features.device).unsqueeze(axis)
            features = features.masked_fill(masked, 0.0)
    return features


class CTCTrainer(TokenMeanTrainer):
    """The loss of CTC as a mean over the tokens. A batch is one of `CTCCollator`, (batch_size, num_tokens) labels that
    are padded with -100.

    With `predict_with_generate` among its arguments, an evaluation gives greedy transcripts to `compute_metrics`.

    Raises:
        ValueError: for label smoothing, which this loss does not have.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0 for CTC and for a transducer, got "
                f"{self.args.label_smoothing_factor}"
            )

    def _count(self, labels: Tensor) -> Tensor:
        return (labels != LABEL_PADDING).sum().float()

    def _loss(self, model: nn.Module, inputs: dict[str, Any], counts: Tensor) -> tuple[Tensor, Any]:
        losses, outputs = ctc_losses(self.model, inputs, forward=model)
        unfit = [index for index, loss in enumerate(losses.tolist()) if loss == math.inf]
        if unfit:
            texts = self._texts_of({"labels": inputs["labels"][unfit]})
            raise ValueError(
                f"each text must fit the frames of its clip, got {texts} at step {self.state.global_step}, which do "
                "not; check them against the recordings, leave them out, or lower `subsampling`"
            )
        return losses.sum() / counts, outputs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """The loss of a batch and, if they are asked for, its greedy transcripts and its labels."""
        inputs = dict(self._prepare_inputs(inputs))
        with torch.no_grad():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only or not getattr(self.args, "predict_with_generate", False):
                return loss, None, None
            heard = {name: inputs[name] for name in ("input_features", "attention_mask")}
            return loss, sequences_of(self.model.generate(**heard)), inputs["labels"]


def sequences_of(generated: Any) -> Tensor:
    """Token ids, (batch_size, num_tokens), from what `generate` of any of the three heads gives."""
    return getattr(generated, "sequences", generated)


def ctc_losses(model: Any, batch: dict[str, Tensor], forward: Any = None) -> tuple[Tensor, Any]:
    """CTC's loss of each clip, (batch_size,), summed over its tokens, and the outputs of the model.

    Args:
        model: a Parakeet with CTC.
        batch: of `CTCCollator`. The loss of a text that does not fit its frames is infinite.
        forward: what computes the outputs, such as `model` in a wrapper for many processes; by default `model`.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    outputs = (forward or model)(input_features=batch["input_features"], attention_mask=mask)
    log_probs = outputs.logits.float().log_softmax(-1).transpose(0, 1)
    lengths = (labels != LABEL_PADDING).sum(1)
    num_frames = num_frames_of(model, mask.sum(1))
    blank = model.config.pad_token_id
    losses = F.ctc_loss(log_probs, labels.clamp(min=0), num_frames, lengths, blank, reduction="none")
    return losses, outputs


class TransducerTrainer(CTCTrainer):
    """The loss of a transducer, RNN-T or TDT, otherwise as in `CTCTrainer`."""

    def _loss(self, model: nn.Module, inputs: dict[str, Any], counts: Tensor) -> tuple[Tensor, Any]:
        labels, blank = inputs["labels"], self.model.config.blank_token_id
        # TDT counts the labels that are not padding, and RNN-T those that are not blank.
        padding = self.model.config.pad_token_id if is_tdt(self.model) else blank
        is_padding = labels == LABEL_PADDING
        outputs = model(
            input_features=inputs["input_features"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=F.pad(labels.masked_fill(is_padding, blank), (1, 0), value=blank),
            labels=labels.masked_fill(is_padding, padding),
            output_attention_mask=True,
            reduction="sum",
        )
        return outputs.loss / counts, outputs

"""What `paper.py` trains: a Whisper, or a Parakeet with CTC or a transducer, each behind the same few functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.speech.collators import LABEL_PADDING, CTCCollator, Seq2SeqCollator
from hf_residual_transformer.training.clips import refuse_unfit_clips
from hf_residual_transformer.training.scratch import (
    ModelSizes,
    ScratchTrainer,
    TokenMeanTrainer,
    check_transcripts,
    new_model,
    new_processor,
    train_tokenizer,
    with_known_characters,
)
from hf_residual_transformer.training.scratch_parakeet import (
    CTCTrainer,
    Head,
    ParakeetSizes,
    TransducerTrainer,
    check_head,
    ctc_losses,
    new_parakeet,
    new_parakeet_processor,
    sequences_of,
)


class Architecture:
    """A kind of model."""

    sizes_class: ClassVar[Any]

    def check(self) -> None:
        """Checks that it can be trained here.

        Raises:
            ValueError: if its loss is not installed.
        """

    def processor(self, texts: Iterable[str], vocab_size: int, sizes: Any) -> Any:
        """With a vocabulary that is trained on `texts`."""
        raise NotImplementedError

    def check_texts(
        self, clips: Iterable[tuple[str, str]], processor: Any, sizes: Any, ctc_weight: float
    ) -> None:
        """Checks the text of each clip, which comes with its name, before training starts.

        Raises:
            ValueError: for no clips; naming the clip, for a text that the model cannot learn.
        """
        raise NotImplementedError

    def model(self, sizes: Any, processor: Any, residual: ResidualConfig | None) -> Any:
        """With random weights."""
        raise NotImplementedError

    def check_rows(self, model: Any, processor: Any, rows: Any) -> None:
        """Checks each clip that the model will be measured on, before training starts.

        Raises:
            ValueError: naming the clip, for a text that does not fit its frames.
        """

    def collator(self, processor: Any) -> Any:
        """Makes batches of rows."""
        raise NotImplementedError

    def trainer(self, ctc_weight: float, **kwargs: Any) -> TokenMeanTrainer:
        """The Trainer of a model, with the arguments of `Trainer`."""
        raise NotImplementedError

    def recognise(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Token ids by greedy search, (batch_size, num_tokens)."""
        raise NotImplementedError

    def nats(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """What each reference costs, given its audio: less the logarithm of its probability, in nats, and its number of
        tokens, both (batch_size,). None for a model whose loss is not this.
        """
        return None


class Whisper(Architecture):
    """A decoder attends to the encoder, and can translate too."""

    sizes_class = ModelSizes

    def processor(self, texts: Iterable[str], vocab_size: int, sizes: Any) -> Any:
        return new_processor(train_tokenizer(texts, vocab_size), sizes)

    def check_texts(
        self, clips: Iterable[tuple[str, str]], processor: Any, sizes: Any, ctc_weight: float
    ) -> None:
        check_transcripts(clips, processor.tokenizer, sizes, with_ctc=ctc_weight > 0)

    def model(self, sizes: Any, processor: Any, residual: ResidualConfig | None) -> Any:
        return new_model(sizes, processor.tokenizer, residual)

    def collator(self, processor: Any) -> Any:
        return Seq2SeqCollator(processor, multilingual=False)

    def trainer(self, ctc_weight: float, **kwargs: Any) -> TokenMeanTrainer:
        return ScratchTrainer(ctc_weight=ctc_weight, **kwargs)

    def recognise(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        ids: Tensor = model.generate(input_features=batch["input_features"].to(model.device))
        return ids

    def nats(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        labels = batch["labels"].to(model.device)
        logits = model(input_features=batch["input_features"].to(model.device), labels=labels).logits
        losses = cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return losses.sum(1), (labels != LABEL_PADDING).sum(1)


@dataclass(frozen=True)
class Parakeet(Architecture):
    """Fast Conformer layers under CTC, or under a transducer as in the paper's recogniser."""

    head: Head
    sizes_class = ParakeetSizes

    def check(self) -> None:
        check_head(self.head)

    def processor(self, texts: Iterable[str], vocab_size: int, sizes: Any) -> Any:
        return new_parakeet_processor(texts, vocab_size, self.head, sizes)

    def check_texts(
        self, clips: Iterable[tuple[str, str]], processor: Any, sizes: Any, ctc_weight: float
    ) -> None:
        """Checks that there are clips, and no characters but those of the training split.

        The length of a text is not checked. The loss of a transducer is finite for any, and one that is longer than
        greedy search writes, at most `max_symbols_per_step` tokens at a frame, counts as word errors. That of CTC is
        infinite for a text that does not fit its frames, which stops a run with an error that names the text.
        """
        tokenizer = processor.tokenizer
        for _ in with_known_characters(
            clips, lambda char: tokenizer.unk_token_id in tokenizer(char).input_ids
        ):
            pass

    def check_rows(self, model: Any, processor: Any, rows: Any) -> None:
        if self.head == "ctc":
            refuse_unfit_clips(model, self.collator(processor), (rows[index] for index in range(len(rows))))

    def model(self, sizes: Any, processor: Any, residual: ResidualConfig | None) -> Any:
        return new_parakeet(sizes, self.head, processor.tokenizer, residual)

    def collator(self, processor: Any) -> Any:
        return CTCCollator(processor)

    def trainer(self, ctc_weight: float, **kwargs: Any) -> TokenMeanTrainer:
        return CTCTrainer(**kwargs) if self.head == "ctc" else TransducerTrainer(**kwargs)

    def recognise(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        heard = {name: batch[name].to(model.device) for name in ("input_features", "attention_mask")}
        return sequences_of(model.generate(**heard))

    def nats(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        if self.head != "ctc":
            return None
        batch = {name: values.to(model.device) for name, values in batch.items()}
        return ctc_losses(model, batch)[0], (batch["labels"] != LABEL_PADDING).sum(1)


ARCHITECTURES: dict[str, Architecture] = {
    "whisper": Whisper(),
    "parakeet_ctc": Parakeet("ctc"),
    "parakeet_rnnt": Parakeet("rnnt"),
    "parakeet_tdt": Parakeet("tdt"),
}


def without_weights(sizes: Any, residual: ResidualConfig | None) -> Any:
    """A model of these sizes whose parameters have shapes alone."""
    architecture = next(kind for kind in ARCHITECTURES.values() if kind.sizes_class is type(sizes))
    processor = architecture.processor(["a"], 8, sizes)
    with torch.device("meta"):
        return architecture.model(sizes, processor, residual)

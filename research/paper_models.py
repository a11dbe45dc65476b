"""What `paper.py` trains: a Whisper, or a Parakeet with a transducer, each behind the same few functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.speech.collators import CTCCollator, Seq2SeqCollator
from hf_residual_transformer.training.scratch import (
    ModelSizes,
    ScratchTrainer,
    TokenMeanTrainer,
    check_transcripts,
    new_model,
    new_processor,
    train_tokenizer,
)
from hf_residual_transformer.training.scratch_parakeet import (
    Head,
    ParakeetSizes,
    TransducerTrainer,
    check_head,
    new_parakeet,
    new_parakeet_processor,
)


class WhisperGrid:
    """Encoder and decoder with attention, which can translate too."""

    sizes_class = ModelSizes
    has_four_bits = True

    def check(self) -> None:
        """Whether it can be trained here; this one always can."""

    def processor(self, texts: Iterable[str], vocab_size: int, sizes: Any) -> Any:
        """With a vocabulary that is trained on `texts`."""
        return new_processor(train_tokenizer(texts, vocab_size), sizes)

    def check_texts(
        self, clips: Iterable[tuple[str, str]], processor: Any, sizes: Any, ctc_weight: float
    ) -> None:
        """Checks each clip's text, which comes with its name, before training starts."""
        check_transcripts(clips, processor.tokenizer, sizes, with_ctc=ctc_weight > 0)

    def model(self, sizes: Any, processor: Any, residual: ResidualConfig | None) -> Any:
        """With random weights."""
        return new_model(sizes, processor.tokenizer, residual)

    def collator(self, processor: Any) -> Any:
        """Makes batches."""
        return Seq2SeqCollator(processor, multilingual=False)

    def trainer(self, ctc_weight: float, **kwargs: Any) -> TokenMeanTrainer:
        """The Trainer of a model."""
        return ScratchTrainer(ctc_weight=ctc_weight, **kwargs)

    def recognise(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Token ids by greedy search, (batch_size, num_tokens)."""
        ids: Tensor = model.generate(input_features=batch["input_features"].to(model.device))
        return ids


@dataclass
class ParakeetGrid:
    """Fast Conformer layers under a transducer, as in the paper's recognition."""

    head: Head
    sizes_class = ParakeetSizes
    has_four_bits = False

    def check(self) -> None:
        """Whether it can be trained here.

        Raises:
            ValueError: if the head's loss is not installed.
        """
        check_head(self.head)

    def processor(self, texts: Iterable[str], vocab_size: int, sizes: Any) -> Any:
        """With a vocabulary that is trained on `texts`."""
        return new_parakeet_processor(texts, vocab_size, self.head, sizes.num_mel_bins)

    def check_texts(
        self, clips: Iterable[tuple[str, str]], processor: Any, sizes: Any, ctc_weight: float
    ) -> None:
        """Checks each clip's text, which comes with its name, before training starts."""
        collator = self.collator(processor)
        collator.encode([{"text": text} for _, text in clips])

    def model(self, sizes: Any, processor: Any, residual: ResidualConfig | None) -> Any:
        """With random weights."""
        return new_parakeet(sizes, self.head, processor.tokenizer, residual)

    def collator(self, processor: Any) -> Any:
        """Makes batches."""
        return CTCCollator(processor)

    def trainer(self, ctc_weight: float, **kwargs: Any) -> TokenMeanTrainer:
        """The Trainer of a model; it has no CTC beside the transducer."""
        return TransducerTrainer(**kwargs)

    def recognise(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Token ids by greedy search, (batch_size, num_tokens)."""
        heard = {name: batch[name].to(model.device) for name in ("input_features", "attention_mask")}
        ids: Tensor = model.generate(**heard).sequences
        return ids


GRIDS: dict[str, Any] = {
    "whisper": WhisperGrid(),
    "parakeet_rnnt": ParakeetGrid("rnnt"),
    "parakeet_tdt": ParakeetGrid("tdt"),
}


def without_weights(sizes: Any, residual: ResidualConfig | None) -> Any:
    """A model of these sizes whose parameters have shapes alone."""
    grid = next(grid for grid in GRIDS.values() if grid.sizes_class is type(sizes))
    processor = grid.processor(["a"], 8, sizes)
    with torch.device("meta"):
        return grid.model(sizes, processor, residual)

"""WavLM's attention (https://arxiv.org/abs/2110.13900), with projections that are called.

The class of transformers gives their weights to one function of torch. A matrix that is not called can be neither
observed nor adapted, and FSDP and PEFT act only around a call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.wavlm.modeling_wavlm import WavLMAttention


class CalledWavLMAttention(WavLMAttention):
    """`WavLMAttention` that calls its projections."""

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention whose scores have a bias for each pair of positions.

        Args:
            hidden_states: (batch_size, seq_len, hidden_size).
            attention_mask: true or 1 for frames of speech, (batch_size, seq_len).
            gated_position_bias: (batch_size * num_heads, seq_len, seq_len).

        Returns:
            The output, shaped as `hidden_states`, and the attention weights, (batch_size, num_heads, seq_len, seq_len).
            As in the dense class, these are the mean of all heads, given for each.
        """
        queries, keys, values = (
            projection(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = queries @ keys.transpose(-1, -2) * self.head_dim**-0.5
        scores = scores + gated_position_bias.unflatten(0, (-1, self.num_heads))
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
        weights = F.dropout(torch.softmax(scores, -1), self.dropout, self.training)
        output = self.out_proj((weights @ values).transpose(1, 2).flatten(2))
        return output, weights.mean(1, keepdim=True).expand_as(weights)


def call_projections(model: nn.Module) -> None:
    """Makes every attention of a WavLM call its projections; the outputs stay as they are."""
    for module in model.modules():
        if type(module) is WavLMAttention:
            module.__class__ = CalledWavLMAttention

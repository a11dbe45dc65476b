"""The card says what the model is, with the figures it was given, in metadata that the Hub reads."""

from conftest import tiny_whisper_config
from huggingface_hub import ModelCard

import hf_residual_transformer as hrt
from hf_residual_transformer.evaluation import provenance
from hf_residual_transformer.model_card import write_model_card


def test_the_card_holds_the_measured_figures_and_the_settings(tmp_path):
    model = hrt.ResidualWhisperForConditionalGeneration(
        tiny_whisper_config(residual_config=hrt.ResidualConfig(group_size=2, rank=3))
    )
    path = write_model_card(
        tmp_path,
        model,
        base_model="openai/whisper-base",
        data="ten clips",
        dataset="five clips",
        rows={"dense": {"WER, %": "5.00"}, "distilled": {"WER, %": "6.25"}},
        wer=0.0625,
        details=provenance(),
        distilled=True,
        language=["en"],
    )
    card = ModelCard.load(path)
    assert card.data.base_model == "openai/whisper-base"
    assert card.data.eval_results[0].metric_value == 6.25
    encoder = hrt.parameter_report(model).encoder
    for said in (f"{encoder.unique:,}", "| distilled | 6.25 |", '"rank": 3', "ten clips", "five clips"):
        assert said in card.text

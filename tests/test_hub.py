"""The card says what the model is, with the figures it was given, in metadata that the Hub reads."""

import pytest
from conftest import tiny_whisper_config
from huggingface_hub import ModelCard

import hf_residual_transformer as hrt
from hf_residual_transformer.hub import write_model_card
from hf_residual_transformer.provenance import provenance


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"group_size": 2}, "layers share full matrices and keep a low-rank residual each"),
        ({"group_size": None}, "each layer has matrices of low rank, as in"),
        (
            {"group_size": {"fc1": 1, "fc2": None}, "shared_bits": 4},
            "each layer has its full matrices in 4 bits and a low-rank residual of its own",
        ),
    ],
)
def test_the_card_holds_the_measured_figures_and_the_settings(settings, form, tmp_path):
    model = hrt.ResidualWhisperForConditionalGeneration(
        tiny_whisper_config(residual_config=hrt.ResidualConfig(rank=3, **settings))
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
    encoder = hrt.parameter_report(model).encoder_bytes
    for said in (form, f"{encoder.unique:,}", "| distilled | 6.25 |", '"rank": 3', "ten clips", "five clips"):
        assert said in card.text

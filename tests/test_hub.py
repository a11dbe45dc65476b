"""The card says what the model is, with the figures it was given, in metadata that the Hub reads."""

import pytest
from conftest import tiny_whisper_config
from huggingface_hub import ModelCard

import hf_residual_transformer as hrt
from hf_residual_transformer.hub import write_model_card
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.reporting import format_bytes


def write_card(folder, chosen="distilled", **settings):
    model = hrt.ResidualWhisperForConditionalGeneration(
        tiny_whisper_config(residual_config=hrt.ResidualConfig(rank=3, **settings))
    )
    path = write_model_card(
        folder,
        model,
        base_model="openai/whisper-base",
        data="ten clips",
        dataset="five clips",
        rows={
            "dense": {"WER, %": "5.00"},
            "converted": {"WER, %": "5.75"},
            "distilled": {"WER, %": "6.25"},
        },
        evaluations={"dense": 0.05, "converted": 0.0575, "distilled": 0.0625},
        chosen=chosen,
        details=provenance(),
        distilled=chosen == "distilled",
        language=["en"],
    )
    return hrt.size_report(model), ModelCard.load(path)


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
    sizes, card = write_card(tmp_path, **settings)
    assert card.data.base_model == "openai/whisper-base"
    for said in (form, "| distilled | 6.25 |", '"rank": 3', "ten clips", "five clips"):
        assert said in card.text
    whole, encoder = (
        card.text.index(f"{format_bytes(count.unique)}, {count.ratio:.1%} of the dense")
        for count in (sizes.model_bytes, sizes.encoder_bytes)
    )
    assert whole < encoder


@pytest.mark.parametrize(("chosen", "wer"), [("converted", 5.75), ("distilled", 6.25)])
def test_the_headline_figure_is_that_of_the_saved_weights(chosen, wer, tmp_path):
    _, card = write_card(tmp_path, chosen)
    assert card.data.eval_results[0].metric_value == wer
    assert f'those of the row "{chosen}": their word error rate is {wer:.2f}%' in card.text


def test_a_row_without_an_error_rate_cannot_be_chosen(tmp_path):
    message = r"`chosen` must name a row .*'dense', 'converted', 'distilled'\), got 'tuned'"
    with pytest.raises(ValueError, match=message):
        write_card(tmp_path, "tuned")


def test_a_card_is_whole_or_the_old_one_stays(tmp_path, monkeypatch):
    write_card(tmp_path)
    before = (tmp_path / "README.md").read_text()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_card(tmp_path, "converted")
    assert (tmp_path / "README.md").read_text() == before

"""The card says what the model is, with the figures it was given, in metadata that the Hub reads."""

import json
from argparse import Namespace

import pytest
from conftest import tiny_wav2vec2_config, tiny_whisper_config
from fake_hub import metadata_errors
from huggingface_hub import ModelCard, metadata_eval_result

import hf_residual_transformer as hrt
from hf_residual_transformer.folders import model_bytes
from hf_residual_transformer.hub import Figures, model_card, write_model_card
from hf_residual_transformer.provenance import provenance
from hf_residual_transformer.reporting import format_bytes
from hrt_cli.push import _about

# What an evaluation holds beside its provenance.
RATES = {
    "wer": 0.5,
    "cer": 0.25,
    "clips": 2,
    "stopped_by": None,
    "data": {"dataset": "x", "split": "test"},
}


def write_card(folder, chosen="distilled", **settings):
    model = hrt.ResidualWhisperForConditionalGeneration(
        tiny_whisper_config(residual_config=hrt.ResidualConfig(rank=3, **settings))
    )
    path = write_model_card(
        folder,
        model,
        base_model="openai/whisper-base",
        data="ten clips",
        figures=Figures(
            dataset="five clips",
            rows={
                "dense": {"WER, %": "5.00"},
                "converted": {"WER, %": "5.75"},
                "distilled": {"WER, %": "6.25"},
            },
            evaluations={"dense": 0.05, "converted": 0.0575, "distilled": 0.0625},
            chosen=chosen,
            details=provenance(),
        ),
        distilled=chosen == "distilled",
        license="mit",
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


def test_the_metadata_are_what_the_hub_reads_and_it_accepts_them(tmp_path):
    _, card = write_card(tmp_path)
    assert not metadata_errors(str(card))
    data = card.data.to_dict()
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["language"], data["metrics"]) == ("mit", ["en"], ["wer"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "automatic-speech-recognition")
    expected = metadata_eval_result(
        model_pretty_name=card.data.model_name,
        task_pretty_name="",
        task_id="automatic-speech-recognition",
        metrics_pretty_name="WER (%)",
        metrics_id="wer",
        metrics_value=6.25,
        dataset_pretty_name="five clips",
        dataset_id="audiofolder",
    )
    (found,), (wanted,) = data["model-index"], expected["model-index"]
    del wanted["results"][0]["task"]["name"], wanted["results"][0]["metrics"][0]["verified"]
    assert found == wanted


def test_the_rules_of_the_hub_can_fail():
    head = "---\nlicense: mine\nlanguage: English\nbase_model: a/b/c\nbase_model_relation: smaller\n---\n"
    assert len(metadata_errors(head)) == 4
    assert metadata_errors("no metadata")


def tiny(cls=hrt.ResidualWhisperForConditionalGeneration, config=tiny_whisper_config):
    return cls(config(residual_config=hrt.ResidualConfig(rank=3)))


def test_a_card_says_only_what_is_known():
    card = model_card(tiny())
    assert not metadata_errors(str(card))
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    for said in (
        "No error rate of this model was measured",
        "does not know the recordings",
        "The dense model",
    ):
        assert said in card.text
    assert "None" not in card.text


@pytest.mark.parametrize(
    ("name", "config", "task", "opens"),
    [
        ("ResidualWav2Vec2ForCTC", tiny_wav2vec2_config, "automatic-speech-recognition", "pipeline("),
        ("ResidualWhisperModel", tiny_whisper_config, "feature-extraction", "AutoModel.from_pretrained("),
        (
            "ResidualWhisperForAudioClassification",
            tiny_whisper_config,
            "audio-classification",
            "AutoModelForAudioClassification.from_pretrained(",
        ),
    ],
)
@pytest.mark.parametrize("with_code", [False, True])
def test_the_example_opens_the_class_that_was_saved(name, config, task, opens, with_code):
    model = tiny(getattr(hrt, name), config)
    model.config.carry_code(with_code)
    card = model_card(model, repo_id="me/compact")
    assert card.data.pipeline_tag == task
    assert opens in card.text and '"me/compact"' in card.text
    assert card.text.count("trust_remote_code=True") == int(with_code)
    assert ("Nothing in this repository is code" in card.text) != with_code


def test_a_folder_is_no_base_model_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "whisper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("models/whisper", str(tmp_path / "models" / "whisper")):
        card = model_card(tiny(), base_model=name)
        assert card.data.base_model is None and not metadata_errors(str(card))


def test_a_folder_of_another_machine_is_no_id_on_the_hub_either(tmp_path):
    report = {"model": "bert-base-uncased", "data": {"dataset": "someone/talks", "split": "test"}}
    rates = {"wer": 0.5, "cer": 0.25, "clips": 2, "stopped_by": None, **provenance()}
    args = Namespace(
        model="compact",
        repo_id="compact",
        base_model=None,
        evaluation=None,
        license=None,
        language=None,
        datasets=None,
    )
    path = tmp_path / "report.json"
    for is_path, base_model, dataset in (
        (True, None, None),
        (False, "bert-base-uncased", "someone/talks"),
    ):
        data = {**report["data"], "dataset_is_path": is_path}
        path.write_text(json.dumps({**rates, **report, "model_is_path": is_path, "data": data}))
        assert model_card(tiny(), **_about(args, path)).data.base_model == base_model
        assert Figures.from_evaluation(path).dataset_id == dataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": ["English"]}, r"`language` must be codes of two or three letters.*'English'"),
        ({"datasets": ["my data"]}, r"`datasets` must be an id on the Hub.*'my data'"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        model_card(tiny(), **options)


@pytest.mark.parametrize(
    "change",
    [{"stopped_by": "a bad clip"}, {"wer": None}, {"data": None}],
    ids=lambda change: next(iter(change)),
)
def test_figures_come_from_a_whole_evaluation(change, tmp_path):
    path = tmp_path / "evaluation.json"
    details = provenance()
    path.write_text(json.dumps({**details, **RATES}))
    assert Figures.from_evaluation(path).evaluations == {"this model": 0.5}
    path.write_text(json.dumps({**details, **RATES, **change}))
    with pytest.raises(ValueError, match="`evaluation` must be "):
        Figures.from_evaluation(path)


def test_figures_are_of_the_transcripts_of_the_model_that_gets_the_card(tmp_path):
    path = tmp_path / "evaluation.json"
    known = {**RATES, "model": "outputs/compact", "settings": {"task": "transcribe"}}
    path.write_text(json.dumps({**provenance(), **known}))
    report = tmp_path / "compression.json"
    for folder, repo_id in (("/somewhere/compact", "me/other"), ("moved", "me/compact")):
        args = Namespace(model=folder, repo_id=repo_id, evaluation=path, base_model=None)
        args.license = args.language = args.datasets = None
        assert _about(args, report)["figures"].evaluations == {"this model": 0.5}
    args = Namespace(model="small", repo_id="me/small", evaluation=path, base_model=None)
    args.license = args.language = args.datasets = None
    with pytest.raises(
        ValueError, match=r"must be of the model that gets the card .* is of 'outputs/compact'"
    ):
        _about(args, report)
    for unsaid in ({"model": "."}, {"model": None}):  # of earlier versions, and saved from Python
        path.write_text(json.dumps({**provenance(), **known, **unsaid}))
        assert _about(args, report)["figures"].chosen == "this model"
    path.write_text(json.dumps({**provenance(), **known, "settings": ["task"]}))
    with pytest.raises(ValueError, match=r"must be the evaluation\.json"):
        Figures.from_evaluation(path)
    path.write_text(json.dumps({**provenance(), **known, "settings": {"task": "translate"}}))
    with pytest.raises(ValueError, match=r"must be of transcripts, .* whose task is 'translate'"):
        Figures.from_evaluation(path)


def test_a_card_tells_the_bytes_of_weights_in_float32():
    model = tiny()
    assert "Each number that is not quantised takes 16 bits; everything else" in model_card(model.half()).text
    text = model_card(model.float()).text
    assert f"have 32, and take {format_bytes(model_bytes(model))}; everything else" in text

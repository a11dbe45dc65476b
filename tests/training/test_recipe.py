"""A short distillation is kept only where it helps on clips that it does not train on."""

import pytest
import torch
from test_contract import build, inputs_of
from test_distillation import collate, ctc_data, ctc_pair, whisper_data, whisper_pair
from transformers import AutoConfig

from hf_residual_transformer.training.recipe import short_distillation, without_noise


def distil(pair, data, tmp_path, **options):
    student, teacher = pair()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "seed": 0, **options}
    outcome = short_distillation(student, teacher, data, tmp_path, collator=collate, **settings)
    same = all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    return outcome, same


def test_a_distillation_that_lowers_the_loss_on_validation_clips_is_kept(tmp_path):
    data = ctc_data(8, labels=False)
    outcome, same = distil(ctc_pair, data, tmp_path, validation=data[:4], learning_rate=1e-3)
    assert outcome.loss_after < outcome.loss_before
    assert outcome.is_kept and not same


def test_a_distillation_that_does_not_is_undone(tmp_path):
    data = whisper_data(8, labels=False)
    outcome, same = distil(whisper_pair, data, tmp_path, validation=data[:4], learning_rate=10.0)
    assert outcome.loss_after > outcome.loss_before
    assert not outcome.is_kept and same


def test_a_distillation_that_does_not_is_kept_on_request(tmp_path):
    data = whisper_data(8, labels=False)
    options = {"validation": data[:4], "learning_rate": 10.0, "keep": "always"}
    outcome, same = distil(whisper_pair, data, tmp_path, **options)
    assert outcome.is_kept and not same
    with pytest.raises(ValueError, match="`keep` must be one of better, always, got 'best'"):
        distil(whisper_pair, data, tmp_path, keep="best")


def test_without_validation_clips_the_result_is_kept(tmp_path):
    outcome, same = distil(ctc_pair, ctc_data(8, labels=False), tmp_path, learning_rate=1e-3)
    assert outcome.is_kept and not same and outcome.loss_before is None


NOISE = {
    "whisper": (
        "dropout",
        "encoder_layerdrop",
        "decoder_layerdrop",
        "attention_dropout",
        "activation_dropout",
    ),
    "wav2vec2": (
        "hidden_dropout",
        "layerdrop",
        "attention_dropout",
        "activation_dropout",
        "feat_proj_dropout",
        "final_dropout",
    ),
}


@pytest.mark.parametrize("family", NOISE)
def test_a_student_by_name_has_no_dropout_no_layerdrop_and_no_specaugment(family, tmp_path):
    """In training mode it gives what it gives in eval mode, whatever noise its checkpoint has."""
    noise = dict.fromkeys(NOISE[family], 0.5) | {"mask_time_prob": 0.5, "mask_feature_prob": 0.5}
    noise |= {"mask_time_length": 2, "mask_feature_length": 2, "apply_spec_augment": True}
    model = build(family, **noise)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs_of(family)).logits
        torch.manual_seed(0)
        assert not torch.allclose(model.train()(**inputs_of(family)).logits, expected, atol=1e-3)
        overrides = without_noise(AutoConfig.from_pretrained(tmp_path))
        student = type(model).from_pretrained(tmp_path, **overrides).train()
        torch.testing.assert_close(student(**inputs_of(family)).logits, expected)

"""What is new in a Parakeet from scratch: its masks, its vocabulary, and the loss of a transducer over many batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_families import MELS, dense_model
from torch import nn
from transformers import (
    AutoModelForTDT,
    AutoProcessor,
    SeamlessM4TFeatureExtractor,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.speech.collators import CTCCollator
from hf_residual_transformer.training.arguments import DistillationArguments
from hf_residual_transformer.training.clips import _frames_of, refuse_unfit_clips
from hf_residual_transformer.training.scratch_parakeet import (
    CTCTrainer,
    ParakeetSizes,
    TransducerTrainer,
    check_head,
    ctc_losses,
    mask_features,
    new_parakeet,
    new_parakeet_processor,
)
from hf_residual_transformer.training.trainers import CTCDistillationTrainer

TEXTS = ["one two", "three", "seven nine"]
TINY = {"encoder_layers": 3, "d_model": 16, "encoder_ffn_dim": 32, "attention_heads": 2, "num_mel_bins": 16}
TINY |= {"subsampling": 4, "subsampling_channels": 4, "decoder_dim": 16, "dropout": 0.0}


def made(head="tdt", **changes):
    sizes = ParakeetSizes(**TINY | changes)
    processor = new_parakeet_processor(TEXTS, 30, head, sizes)
    torch.manual_seed(0)
    return new_parakeet(sizes, head, processor.tokenizer, ResidualConfig.paper(3, 2)), processor


def rows():
    torch.manual_seed(1)
    lengths = (9_000, 16_000, 12_000)
    return [
        {"audio": {"array": torch.randn(length).numpy(), "sampling_rate": 16_000}, "text": text}
        for length, text in zip(lengths, TEXTS)
    ]


@pytest.mark.parametrize(
    "residual",
    [
        None,
        ResidualConfig.paper(3, 2),
        ResidualConfig(group_size=None, rank=4),
        ResidualConfig(group_size=3, rank=2, shared_bits=4),
    ],
    ids=str,
)
def test_branches_start_small_and_what_several_layers_share_once(residual):
    def start(**changes):
        sizes = ParakeetSizes(**TINY | {"d_model": 32} | changes)
        processor = new_parakeet_processor(TEXTS, 30, "ctc", sizes)
        torch.manual_seed(0)
        return new_parakeet(sizes, "ctc", processor.tokenizer, residual).encoder.layers

    plain, small = start(small_branches=False), start()
    ends = ("feed_forward1.linear2", "self_attn.o_proj", "conv.pointwise_conv2", "feed_forward2.linear2")
    for before, after in zip(plain, small, strict=True):
        others = dict(before.named_modules())
        for path, module in after.named_modules():
            if hasattr(module, "weight") and module.weight is not None:
                factor = 12**-0.5 if path in ends else 1.0
                torch.testing.assert_close(module.weight, others[path].weight * factor)


def test_small_branches_are_true_or_false():
    with pytest.raises(ValueError, match="`small_branches` must be true or false, got 1"):
        ParakeetSizes(**TINY | {"small_branches": 1})


def ctc_trainer(residual, folder, **options):
    sizes = ParakeetSizes(**TINY)
    processor = new_parakeet_processor(TEXTS, 30, "ctc", sizes)
    args = Seq2SeqTrainingArguments(
        str(folder),
        max_steps=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        remove_unused_columns=False,
    )
    torch.manual_seed(0)
    model = new_parakeet(sizes, "ctc", processor.tokenizer, residual)
    collator = CTCCollator(processor)
    return CTCTrainer(model=model, args=args, train_dataset=rows(), data_collator=collator, **options)


@pytest.mark.parametrize(
    ("residual", "rates"),
    [
        (ResidualConfig.paper(3, 2), {1e-3, 1e-3 / 3**0.5}),
        (ResidualConfig.paper(2, 2), {1e-3, 1e-3 / 2**0.5}),  # the third layer is a group of its own
    ],
    ids=str,
)
def test_what_several_layers_share_has_its_rate_divided_by_the_root_of_their_number(
    residual, rates, tmp_path
):
    divided = ctc_trainer(residual, tmp_path, divide_shared_rate=True)
    divided.train()
    rate_of = {
        id(parameter): group["initial_lr"]
        for group in divided.optimizer.param_groups
        for parameter in group["params"]
    }
    weights = dict(divided.model.named_parameters())
    assert rate_of.keys() == {id(parameter) for parameter in weights.values()}
    assert set(rate_of.values()) == rates
    shared = [parameter for name, parameter in weights.items() if ".shared." in name and ".1." not in name]
    assert {rate_of[id(parameter)] for parameter in shared} == {min(rates)}
    own = [parameter for name, parameter in weights.items() if ".shared." not in name]
    assert {rate_of[id(parameter)] for parameter in own} == {1e-3}
    # A checkpoint remembers it, and goes on in the same way alone.
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="divide_shared_rate"):
        ctc_trainer(residual, tmp_path).train(resume_from_checkpoint=checkpoint)
    again = ctc_trainer(residual, tmp_path, divide_shared_rate=True)
    again.train(resume_from_checkpoint=checkpoint)
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=0)


@pytest.mark.parametrize("residual", [None, ResidualConfig(group_size=None, rank=4)], ids=str)
def test_a_divided_rate_is_refused_where_nothing_is_shared(residual, tmp_path):
    with pytest.raises(ValueError, match=r"`divide_shared_rate` must be false for a model whose .* got true"):
        ctc_trainer(residual, tmp_path, divide_shared_rate=True).train()


def test_a_divided_rate_is_refused_beside_other_rates(tmp_path):
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-3)
    with pytest.raises(
        ValueError, match="`divide_shared_rate` must be false beside an optimizer of one's own"
    ):
        ctc_trainer(ResidualConfig.paper(3, 2), tmp_path, divide_shared_rate=True, optimizers=(sgd, None))
    rates = DistillationArguments(learning_rates={"shared": 5e-4})
    with pytest.raises(ValueError, match="`divide_shared_rate` must be false beside `learning_rates`"):
        CTCDistillationTrainer(
            model=ctc_trainer(ResidualConfig.paper(3, 2), tmp_path).model,
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            distillation=rates,
            divide_shared_rate=True,
        )


def test_the_loss_of_each_clip_adds_up_to_that_of_the_model():
    model, processor = made("ctc")
    model.config.ctc_loss_reduction = "sum"
    batch = CTCCollator(processor)(rows())
    with torch.no_grad():
        losses, _ = ctc_losses(model.eval(), batch)
        padded = batch | {
            "labels": torch.where(batch["labels"] < 0, model.config.pad_token_id, batch["labels"])
        }
        torch.testing.assert_close(losses.sum(), model(**padded).loss)
        alone = [ctc_losses(model, CTCCollator(processor)([row]))[0] for row in rows()]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head", ["ctc", "tdt"])
def test_a_vocabulary_gives_its_texts_back_and_is_saved(head, tmp_path):
    _, processor = made(head)
    processor.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = saved.tokenizer(text).input_ids
        # As CTC gives them: a blank between two that are equal.
        blank = saved.tokenizer.pad_token_id
        apart = [
            i
            for pair in pairwise([*ids, None])
            for i in ([pair[0], blank] if pair[0] == pair[1] else [pair[0]])
        ]
        assert saved.batch_decode([apart if head == "ctc" else ids], skip_special_tokens=True) == [text]
    assert len(saved.tokenizer) == 30


def test_masks_cover_their_part_while_the_model_trains_and_nothing_afterwards():
    sizes = ParakeetSizes(
        **TINY | {"mask_time": 0.3, "mask_time_length": 5, "mask_bands": 0.25, "mask_bands_length": 4}
    )
    masked = mask_features(torch.ones(4, 200, 16), sizes)
    frames, bands = (masked == 0).all(2), (masked == 0).all(1)
    assert 0.1 < frames.float().mean() < 0.4
    assert 0 < bands.float().mean() <= 0.5
    assert bool((masked[~(frames[:, :, None] | bands[:, None, :])] == 1).all())

    model, processor = made(mask_time=0.3, mask_bands=0.3, mask_time_length=5, mask_bands_length=4)
    batch = CTCCollator(processor)(rows())
    seen = []
    model.encoder.subsampling.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    heard = {name: batch[name] for name in ("input_features", "attention_mask")}
    model.train()
    model.get_audio_features(**heard)
    model.eval()
    model.get_audio_features(**heard)
    assert (seen[0] == 0).float().mean() > (seen[1] == 0).float().mean() + 0.05
    assert torch.equal(seen[1], batch["input_features"])


class Wrapped(nn.Module):
    """A model as many processes have it: what it knows beside its forward pass is out of reach."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        return self.module(**inputs)


def trainer_of(model, processor, folder, **options):
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder), use_cpu=True, remove_unused_columns=False, report_to=[], **options
    )
    trainer_class = CTCTrainer if hasattr(model, "ctc_head") else TransducerTrainer
    return trainer_class(
        model=model,
        args=args,
        data_collator=CTCCollator(processor),
        processing_class=processor,
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=lambda predicted: {"shape": predicted.predictions.shape[0]},
    )


@pytest.mark.parametrize("head", ["ctc", "tdt"])
def test_the_loss_of_a_step_is_the_mean_over_its_tokens_however_it_is_cut(head, tmp_path):
    model, processor = made(head, mask_time=0.0, mask_bands=0.0)
    trainer = trainer_of(model, processor, tmp_path)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # its statistics are those of a batch
    collator = CTCCollator(processor)
    whole, *parts = (collator(part) for part in (rows(), rows()[:1], rows()[1:]))
    _, number = trainer.get_batch_samples(iter([whole]), 1, torch.device("cpu"))
    assert number == sum(len(processor.tokenizer(text).input_ids) for text in TEXTS)
    one = trainer.compute_loss(model, whole, num_items_in_batch=number)
    two = sum(trainer.compute_loss(model, part, num_items_in_batch=number) for part in parts)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    several = trainer.compute_loss(Wrapped(model), whole, num_items_in_batch=number)
    torch.testing.assert_close(several, one)


def test_ctc_names_a_text_that_does_not_fit_its_frames(tmp_path):
    model, processor = made("ctc")
    row = rows()[0] | {"text": "one two three seven nine " * 4}
    with pytest.raises(
        ValueError, match=r"must fit the frames of its clip, got .*one two three seven .*at step 0"
    ):
        trainer_of(model, processor, tmp_path).compute_loss(model, CTCCollator(processor)([row]))


def test_an_evaluation_gives_greedy_transcripts_and_a_bad_loss_names_its_texts(tmp_path):
    model, processor = made()
    trainer = trainer_of(model, processor, tmp_path, predict_with_generate=True)
    found = trainer.evaluate()
    assert found["eval_shape"] == len(TEXTS)
    assert found["eval_loss"] > 0
    with torch.no_grad():
        model.joint.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"loss must be finite, got nan .* texts .*'seven nine'"):
        trainer.compute_loss(model, CTCCollator(processor)(rows()))


def test_a_head_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="`head` must be one of ctc, rnnt, tdt, got 'aed'"):
        check_head("aed")


def test_a_tdt_writes_tokens_alone_whatever_its_weights_and_after_a_reload(tmp_path):
    model, processor = made()
    heard = CTCCollator(processor)(rows())
    heard = {name: heard[name] for name in ("input_features", "attention_mask")}
    with torch.no_grad():
        model.joint.head.bias[-len(model.config.durations) :] += 100.0  # durations beat all tokens
    model.save_pretrained(tmp_path)
    for recogniser in (model.eval(), AutoModelForTDT.from_pretrained(tmp_path)):
        assert recogniser.generate(**heard).sequences.max() < len(processor.tokenizer)


@pytest.mark.parametrize("head", ["ctc", "tdt"])
@pytest.mark.parametrize("texts", [["", "one two"], ["", ""]])
def test_clips_without_words_are_learnt_as_silence(texts, head, tmp_path):
    model, processor = made(head)
    trainer = trainer_of(model, processor, tmp_path)
    batch = CTCCollator(processor)([row | {"text": text} for row, text in zip(rows(), texts)])
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    assert loss > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_label_smoothing_is_refused(tmp_path):
    model, processor = made()
    with pytest.raises(
        ValueError, match=r"`label_smoothing_factor` must be 0 for CTC and for a .*, got 0\.1"
    ):
        trainer_of(model, processor, tmp_path, label_smoothing_factor=0.1)


def test_the_frames_of_a_clip_are_those_of_the_encoder():
    for subsampling in (2, 4, 8):
        model, processor = made("ctc", subsampling=subsampling)
        collator = CTCCollator(processor)
        for length in (4_001, 8_000, 15_999):
            row = rows()[1]
            row["audio"]["array"] = row["audio"]["array"][:length]
            batch = collator([row])
            heard = {name: batch[name] for name in ("input_features", "attention_mask")}
            mask = model.eval().encoder(**heard, output_attention_mask=True).attention_mask
            assert _frames_of(model, processor.feature_extractor, length, "clip") == mask.sum()


def test_a_clip_of_one_frame_is_named():
    model, processor = made("ctc")
    row = rows()[0] | {"text": ""}
    row["audio"]["array"] = row["audio"]["array"][:200]
    row["audio"]["path"] = "click.wav"
    with pytest.raises(
        ValueError, match=r"click\.wav .* must be long enough for 2 frames .*, got 200 samples"
    ):
        refuse_unfit_clips(model, CTCCollator(processor), [row])


def test_frames_are_known_where_the_extractor_does_not_say_its_hop():
    model = dense_model("wav2vec2-bert")
    extractor = SeamlessM4TFeatureExtractor(feature_size=MELS, num_mel_bins=MELS)
    assert _frames_of(model, extractor, 16_000, "clip") == 49

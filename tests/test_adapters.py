"""Adapters of PEFT: the low rank becomes one and back, and others train and merge on top of residual layers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import add_adapter_or_skip, randomize_, whisper_processor
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from test_contract import assert_same_outputs, build, encoder_of, inputs_of
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, pipeline

from hf_residual_transformer import ResidualConfig
from hf_residual_transformer.adapters import add_lora, from_lora, reach, save_adapter, without_low_rank
from hf_residual_transformer.modeling import residual_linears

RANKS = ResidualConfig(
    group_size=2, rank=3, rank_pattern={"layers.1.*.q_proj": 5, "v_proj": 0}, diagonal="all"
)
PROJECTIONS = ["q_proj", "v_proj"]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def logits_of(model, family):
    with torch.no_grad():
        return model(**inputs_of(family)).logits


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
@pytest.mark.parametrize("base_is_dense", [True, False], ids=["dense base", "shared base"])
def test_the_low_rank_becomes_an_adapter_and_back_exactly(family, base_is_dense, tmp_path):
    model = build(family, RANKS)
    base = without_low_rank(model)
    base = base.merge() if base_is_dense else base
    save_adapter(model, tmp_path, "base")
    again = from_lora(base, tmp_path)
    close(logits_of(again, family), logits_of(model, family))
    ranks = {path: linear.rank for path, linear in residual_linears(model) if linear.rank}
    assert {path: linear.rank for path, linear in residual_linears(again) if linear.rank} == ranks
    again.save_pretrained(tmp_path / "again")
    close(logits_of(type(model).from_pretrained(tmp_path / "again"), family), logits_of(model, family))
    if not base_is_dense:
        assert not any(linear.rank for _, linear in residual_linears(base))
        twice = from_lora(again, tmp_path)  # joins the low rank a second time
        assert all(linear.rank == 2 * ranks.get(path, 0) for path, linear in residual_linears(twice))


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_plain_peft_loads_the_adapter_over_the_dense_base(family, tmp_path):
    model = build(family, RANKS)
    without_low_rank(model).merge().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    auto = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForCTC
    base = auto.from_pretrained(tmp_path / "base")
    assert type(base).__module__.startswith("transformers.")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    close(logits_of(loaded, family), logits_of(model, family))
    if family == "whisper":  # `load_adapter` of the dense wav2vec2 is another, for languages
        close(logits_of(auto.from_pretrained(tmp_path / "adapter"), family), logits_of(model, family))
    close(logits_of(loaded.merge_and_unload(), family), logits_of(model, family))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_lora_reaches_residual_matrices_trains_alone_and_merges_without_touching_u(family, bits, tmp_path):
    model = build(family, ResidualConfig(group_size=2, rank=2, shared_bits=bits))
    before = copy.deepcopy(model.state_dict())
    adapted = add_lora(model, 2, target_modules=PROJECTIONS, init_lora_weights=False)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert sum("encoder.layers.0" in name for name in trained) == 4
    loss = adapted(**inputs_of(family)).loss
    loss.backward()
    assert all(p.grad.any() for name, p in adapted.named_parameters() if name in trained)
    expected = logits_of(adapted, family)
    assert not torch.allclose(
        expected, logits_of(build(family, ResidualConfig(2, 2, shared_bits=bits)), family)
    )
    adapted.merge_adapter()
    torch.testing.assert_close(logits_of(adapted, family), expected, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    close(logits_of(adapted, family), expected)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(build(family))
    torch.testing.assert_close(logits_of(merged, family), expected, rtol=1e-4, atol=1e-4)
    for key, value in merged.state_dict().items():
        if ".shared." in key:
            assert torch.equal(value, before[key]), key
    merged.save_pretrained(tmp_path)
    assert_same_outputs(type(merged).from_pretrained(tmp_path), merged, family, atol=0)
    assert_same_outputs(merged.merge(), merged, family)


def test_the_auto_class_opens_an_adapters_folder_over_a_residual_wav2vec2(tmp_path):
    build("wav2vec2").save_pretrained(tmp_path / "base")
    adapted = add_lora(
        AutoModelForCTC.from_pretrained(tmp_path / "base"),
        2,
        target_modules=PROJECTIONS,
        init_lora_weights=False,
    )
    adapted.save_pretrained(tmp_path / "adapter")
    close(
        logits_of(AutoModelForCTC.from_pretrained(tmp_path / "adapter"), "wav2vec2"),
        logits_of(adapted, "wav2vec2"),
    )


def test_an_adapters_folder_over_a_residual_model_opens_through_auto_classes_and_pipeline(tmp_path):
    model = build("whisper")
    model.processor = whisper_processor()
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "base")
    adapted = add_lora(base, 2, target_modules=PROJECTIONS, init_lora_weights=False)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved and all(".lora_" in key and "residual_" not in key for key in saved)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "adapter")
    close(logits_of(loaded, "whisper"), logits_of(adapted, "whisper"))
    whisper_processor().save_pretrained(tmp_path / "adapter")
    recogniser = pipeline("automatic-speech-recognition", model=str(tmp_path / "adapter"))
    assert type(recogniser.model) is type(model)
    close(logits_of(recogniser.model, "whisper"), logits_of(adapted, "whisper"))
    onto = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "base")
    onto.load_adapter(str(tmp_path / "adapter"))
    close(logits_of(onto, "whisper"), logits_of(adapted, "whisper"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_lora_has_the_dtype_of_the_layer_where_there_was_no_low_rank(dtype):
    model = build("wav2vec2", ResidualConfig(group_size=2, rank=0)).to(dtype)
    adapted = add_lora(model, 2, target_modules=PROJECTIONS, init_lora_weights=False)
    merged = adapted.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    inputs = {name: value for name, value in inputs_of("wav2vec2").items() if name != "labels"}
    with torch.no_grad():
        assert merged(**inputs | {"input_values": inputs["input_values"].to(dtype)}).logits.isfinite().all()


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_an_adapter_loads_by_its_id_on_the_hub(family, tmp_path, monkeypatch):
    adapted = add_lora(build(family), 2, target_modules=PROJECTIONS, init_lora_weights=False)
    repository = tmp_path / "models--someone--adapter"
    for number, branch in enumerate(("main", "other")):
        adapted.save_pretrained(repository / "snapshots" / (str(number) * 40))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(str(number) * 40)
        expected = logits_of(adapted, family)
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter.mul_(1.0 + parameter.requires_grad)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    onto = build(family)
    onto.load_adapter("someone/adapter", adapter_kwargs={"revision": "other"})
    close(logits_of(onto, family), expected)


def test_dora_and_saved_modules_train_on_top_and_only_a_low_rank_merges():
    model = build("wav2vec2")
    adapted = add_lora(model, 2, target_modules=PROJECTIONS, use_dora=True, modules_to_save=["lm_head"])
    randomize_(adapted)
    adapted(**inputs_of("wav2vec2")).loss.backward()
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("magnitude" in name for name in names) and any("modules_to_save" in name for name in names)
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="must be a plain LoRA without a bias to be merged"):
        adapted.merge_and_unload()


def test_saved_modules_are_in_the_adapters_folder_and_in_the_merged_model(tmp_path):
    build("wav2vec2").save_pretrained(tmp_path / "base")
    adapted = add_lora(
        AutoModelForCTC.from_pretrained(tmp_path / "base"),
        2,
        target_modules=PROJECTIONS,
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save.default.weight.add_(1.0)
    expected = logits_of(adapted, "wav2vec2")
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCTC.from_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", config=reach_of(tmp_path / "adapter"))
    close(logits_of(again, "wav2vec2"), expected)
    merged = again.merge_and_unload()
    assert type(merged) is type(build("wav2vec2")) and type(merged.lm_head) is torch.nn.Linear
    torch.testing.assert_close(logits_of(merged, "wav2vec2"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.lm_head.weight, before["lm_head.weight"] + 1.0)
    assert all(torch.equal(merged.state_dict()[key], before[key]) for key in before if ".shared." in key)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_model_with_an_adapter_is_not_merged_to_a_dense_one(is_deleted):
    model = build("whisper")
    add_adapter_or_skip(model, LoraConfig(r=2, target_modules=PROJECTIONS))
    if is_deleted:
        model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"`merge` must be of a Residual.* without an adapter"):
        model.merge()


def reach_of(folder):
    return reach(LoraConfig.from_pretrained(str(folder)))


def test_a_whisper_trains_and_generates_through_peft():
    model = build("whisper", ResidualConfig(group_size=2, rank=2, shared_bits=4))
    adapted = add_lora(model, 2)
    inputs = inputs_of("whisper")
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = adapted(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tokens = adapted.generate(input_features=inputs["input_features"], max_new_tokens=3)
    merged = adapted.merge_and_unload()
    assert torch.equal(tokens, merged.generate(inputs["input_features"], max_new_tokens=3))


def test_dora_over_residual_layers_equals_dora_over_the_merged_model():
    model = build("wav2vec2")
    config = {"r": 2, "target_modules": PROJECTIONS, "use_dora": True}
    dense = get_peft_model(model.merge(), LoraConfig(**config))
    mine = get_peft_model(model, reach(LoraConfig(**config)))
    weights = {name: p for name, p in dense.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in weights.values():
            parameter.add_(0.1 * torch.rand_like(parameter))
    for name, parameter in mine.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    torch.testing.assert_close(
        logits_of(mine, "wav2vec2"), logits_of(dense, "wav2vec2"), rtol=1e-4, atol=1e-5
    )


def test_adapters_that_cannot_become_a_low_rank_are_refused_by_name(tmp_path):
    model = build("wav2vec2")
    adapted = add_lora(model, 2, target_modules=PROJECTIONS, use_dora=True)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`adapter` must be a plain LoRA .* use_dora True"):
        from_lora(build("wav2vec2"), tmp_path)
    with pytest.raises(ValueError, match="`task_type` must be None"):
        add_lora(build("whisper"), 2, task_type="SEQ_2_SEQ_LM")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="`task_type` must be None"):
        reach(config)
    add_adapter_or_skip(build("whisper"), config)  # where no model of PEFT stands around it, it does no harm
    save_adapter(build("wav2vec2"), tmp_path / "plain", "base")
    with pytest.raises(ValueError, match="`base` must be a dense model with a residual form"):
        from_lora(torch.nn.Linear(2, 2), tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (r"lora_B\.bias", {"lora_bias": True}),
        ("embed_tokens", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("trainable_tokens", {"trainable_token_indices": {"embed_tokens": [1, 2]}}),
    ],
)
def test_parts_of_an_adapter_that_are_no_low_rank_are_refused_by_name(name, options, tmp_path):
    base = build("whisper").merge()
    options = {"target_modules": PROJECTIONS, **options}
    get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"low ranks of linear matrices alone .*got '.*{name}"):
        from_lora(base, tmp_path)


def test_scaling_of_an_imported_adapter_counts(tmp_path):
    base = build("wav2vec2").merge()
    plain = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=10, use_rslora=True, target_modules=PROJECTIONS)
    )
    randomize_(plain)
    plain.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    residual = from_lora(base, tmp_path)
    torch.testing.assert_close(
        logits_of(residual, "wav2vec2"), logits_of(loaded, "wav2vec2"), rtol=1e-5, atol=1e-5
    )
    roles = set(encoder_of(residual).shared)
    assert roles == {"attention_q_proj", "attention_v_proj"}


def alike(found, expected):
    """Equal but for rounding, for logits of any size."""
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def whole(rank=2):
    """A Whisper all of whose parts have few bits."""
    few = ResidualConfig(group_size=1, rank=rank, shared_bits=4, scale_bits=8)
    return build("whisper", few, decoder_residual_config=few, embedding_bits=8)


def train_a_little(adapted):
    adapted.train()
    learns = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for _ in range(2):
        adapted(**inputs_of("whisper")).loss.backward()
        with torch.no_grad():
            for parameter in learns:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return adapted.eval()


def test_a_lora_merges_into_a_model_with_a_table_in_few_bits_which_opens_again(tmp_path):
    model = whole()
    adapted = train_a_little(add_lora(model, 2))
    expected = logits_of(adapted, "whisper")
    merged = adapted.merge_and_unload()
    assert merged.config.tie_word_embeddings, "PEFT would say otherwise"
    with pytest.raises(AttributeError, match="`tie_word_embeddings` must be true"):
        merged.config.tie_word_embeddings = False
    alike(
        logits_of(without_low_rank(merged).merge(), "whisper"), logits_of(without_low_rank(merged), "whisper")
    )
    dense = merged.merge()
    assert dense.config.tie_word_embeddings
    assert dense.proj_out.weight is dense.model.decoder.embed_tokens.weight
    alike(logits_of(dense, "whisper"), expected)
    merged.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tie_word_embeddings"]
    alike(logits_of(type(model).from_pretrained(tmp_path), "whisper"), expected)
    # Folders that were written before this was looked at open, too.
    (tmp_path / "config.json").write_text(json.dumps(saved | {"tie_word_embeddings": False}))
    alike(logits_of(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path), "whisper"), expected)


@pytest.mark.parametrize("rank", [31, 0])
def test_a_merged_adapter_gives_no_more_ranks_than_a_matrix_can_have(rank, tmp_path):
    model = build("whisper", ResidualConfig(group_size=2, rank=rank, diagonal="none"))
    before = {path: linear.rank for path, linear in residual_linears(model)}
    alone = logits_of(model, "whisper")
    adapted = randomize_adapter(add_lora(model, 40, target_modules=r".*\.encoder\.layers\..*\.[qv]_proj"))
    expected = logits_of(adapted, "whisper")
    adapted.merge_adapter()
    alike(logits_of(adapted, "whisper"), expected)
    adapted.unmerge_adapter()
    assert {path.replace("base_layer.", "").removesuffix(".base_layer"): linear.rank
            for path, linear in residual_linears(model)} == before  # fmt: skip
    with adapted.disable_adapter():
        alike(logits_of(adapted, "whisper"), alone)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    ranks = {linear.rank for path, linear in residual_linears(merged) if path.endswith(("q_proj", "v_proj"))}
    assert ranks == {32}
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    alike(logits_of(again, "whisper"), expected)
    base = build("whisper", ResidualConfig(group_size=2, rank=rank, diagonal="none"))
    alike(logits_of(from_lora(base, tmp_path / "adapter"), "whisper"), expected)


def randomize_adapter(adapted):
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return adapted


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(kind, tmp_path):
    model = build("wav2vec2", ResidualConfig(group_size=2, rank=2))
    dense = model.merge()
    with pytest.raises(ValueError, match=f"`init_lora_weights` must not change .* got '{kind}'"):
        add_lora(model, 2, init_lora_weights=kind)
    before = logits_of(dense, "wav2vec2")
    adapted = add_lora(dense, 2, init_lora_weights=kind)
    alike(logits_of(adapted, "wav2vec2"), before)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"got one with `init_lora_weights` '{kind}'"):
        from_lora(build("wav2vec2", ResidualConfig(group_size=2, rank=2)), tmp_path)


def test_a_table_in_few_bits_may_learn_beside_an_adapter_and_its_output_alone_may_not(tmp_path):
    for names in (["proj_out"], ["embed_tokens", "proj_out"]):
        with pytest.raises(ValueError, match="leave it out of `modules_to_save`"):
            add_lora(whole(), 2, modules_to_save=names)
    with pytest.raises(ValueError, match="`trainable_token_indices` must be left out"):
        add_lora(whole(), 2, trainable_token_indices={"embed_tokens": [1, 2]})
    model = whole()
    table = model.get_input_embeddings().weight.clone()
    adapted = train_a_little(add_lora(model, 2, modules_to_save=["embed_tokens"]))
    assert not torch.equal(model.get_output_embeddings().weight, table)
    expected = logits_of(adapted, "whisper")
    merged = adapted.merge_and_unload()
    alike(logits_of(merged, "whisper"), expected)
    merged.save_pretrained(tmp_path)
    alike(logits_of(type(model).from_pretrained(tmp_path), "whisper"), expected)
    copied = copy.deepcopy(model)
    assert copied.proj_out.__dict__["_model"] is copied


def test_a_table_in_few_bits_keeps_its_number_of_tokens():
    model = whole()
    number = model.config.vocab_size
    assert model.resize_token_embeddings(number) is model.get_input_embeddings()
    with pytest.raises(ValueError, match=f"`new_num_tokens` must be {number} .* got {number + 3}"):
        model.resize_token_embeddings(number + 3)


def test_peft_says_which_other_adapters_residual_layers_cannot_have():
    model = build("whisper", RANKS)
    with pytest.raises(ValueError, match="ResidualLinear"):
        model.add_adapter(IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


def test_a_rebuilt_model_has_a_generation_config_of_its_own():
    model = build("whisper", RANKS)
    without_low_rank(model).generation_config.max_new_tokens = 3
    assert model.generation_config.max_new_tokens != 3


ENCODER = r".*\.encoder\.layers\..*\.[qv]_proj"


def test_a_refused_adapter_leaves_the_model_as_it_was():
    # Some matrices are dense, and PEFT would reach them first.
    model = build("whisper", ResidualConfig(target_modules=("q_proj",), group_size=2, rank=2))
    refused = [(model, {"init_lora_weights": "pissa"}), (whole(), {"modules_to_save": ["proj_out"]})]
    for one, options in refused:
        before = copy.deepcopy(one.state_dict())
        with pytest.raises(ValueError, match=r"`init_lora_weights` must not|`modules_to_save`"):
            add_lora(one, 2, **options)
        with pytest.raises(ValueError, match=r"`init_lora_weights` must not|`modules_to_save`"):
            one.add_adapter(LoraConfig(r=2, target_modules=PROJECTIONS, **options))
        assert before.keys() == one.state_dict().keys()
        assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
    add_adapter_or_skip(model, LoraConfig(r=2, target_modules=PROJECTIONS))


def test_a_model_that_peft_has_half_changed_is_not_saved(tmp_path):
    model = build("whisper", ResidualConfig(target_modules=("q_proj",), group_size=2, rank=2))
    with pytest.raises(
        ValueError, match="`init_lora_weights` must not"
    ):  # without the model, it is seen too late
        get_peft_model(model, reach(LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights="pissa")))
    with pytest.raises(ValueError, match="layers of PEFT without an adapter"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("rank", [3, 30])
def test_padded_factors_are_taken_away_as_they_were_merged(rank):
    model = build("whisper", ResidualConfig(group_size=2, rank=rank, diagonal="none"))
    before = logits_of(model, "whisper")
    adapted = randomize_adapter(add_lora(model, 2, target_modules=ENCODER))
    prepare_model_for_compiled_hotswap(adapted, target_rank=6)  # `r` stays 2
    expected = logits_of(adapted, "whisper")
    adapted.merge_adapter()
    alike(logits_of(adapted, "whisper"), expected)
    adapted.unmerge_adapter()
    alike(logits_of(adapted, "whisper"), expected)
    with adapted.disable_adapter():
        alike(logits_of(adapted, "whisper"), before)


def test_a_model_may_be_cast_between_merge_and_unmerge():
    model = build("whisper", ResidualConfig(group_size=2, rank=31, diagonal="none"))
    adapted = randomize_adapter(add_lora(model, 4, target_modules=ENCODER))
    adapted.merge_adapter()
    adapted.double()
    adapted.unmerge_adapter()
    assert {linear.residual_A.dtype for _, linear in residual_linears(model)} == {torch.float64}


def test_an_adapter_that_is_not_finite_is_named_where_factors_are_computed_anew():
    model = build("whisper", ResidualConfig(group_size=2, rank=31, diagonal="none"))
    adapted = randomize_adapter(add_lora(model, 4, target_modules=ENCODER))
    first = next(p for name, p in adapted.named_parameters() if "lora_A" in name)
    first.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the adapter 'default' must be finite"):
        adapted.merge_adapter()


@pytest.mark.parametrize("targets", [["q_proj", "fc1", "fc2"], r".*(q_proj|fc1|fc2)"])
@pytest.mark.parametrize("excluded", [None, ["k_proj"], r".*decoder.*"])
def test_adapters_reach_matrices_whose_bank_has_their_name(targets, excluded, tmp_path):
    dense = build("whisper").merge()
    options = {"target_modules": targets, "exclude_modules": excluded, "init_lora_weights": False}
    on_dense = get_peft_model(copy.deepcopy(dense), LoraConfig(r=2, **options))
    adapted = add_lora(build("whisper"), 2, **options)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in on_dense.named_parameters() if p.requires_grad]
    on_dense.save_pretrained(tmp_path)
    model = build("whisper")
    model.load_adapter(str(tmp_path))
    alike(logits_of(model, "whisper"), logits_of(on_dense, "whisper"))

"""The contract of every family: what any tiny model of it must show, however its layers look."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import REPO, fresh_process, randomize_
from family_table import table
from safetensors.torch import load_file
from tiny_families import SETTINGS, dense_model, inputs_for
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

import hf_residual_transformer as hrt
from hf_residual_transformer import ResidualConfig, classes
from hf_residual_transformer.compression import refinement
from hf_residual_transformer.compression.conversion import _make_linear
from hf_residual_transformer.compression.inputs import (
    MEMORY,
    _Loan,
    frozen_view,
    mask_of,
    output_of,
    to_model,
    with_labels,
    without_memory,
)
from hf_residual_transformer.compression.statistics import Group, LogitsObjective, collect
from hf_residual_transformer.families import FAMILIES, REFUSED, Block, LayerStack
from hf_residual_transformer.layers import ChannelsFirst
from hf_residual_transformer.modeling import residual_linears

NAMES = list(FAMILIES)
# One family for each kind of encoder; the others have the same encoder under another head.
KINDS = [
    name
    for name in NAMES
    if name not in ("parakeet_encoder", "parakeet_rnnt", "parakeet_tdt", "lasr_encoder")
]
KINDS = [
    name for name in KINDS if name not in ("nemotron_asr_streaming_encoder", "nemotron3_5_asr", "cohere_asr")
]
# Padding changes what these models of transformers compute, by convolutions or norms that have no mask.
CHANGED_BY_PADDING = (
    "data2vec-audio",
    "wav2vec2-conformer",
    "speech_to_text",
    "moonshine",
    "moonshine_streaming",
)
ENCODER = {"parts": ("encoder",), "progress": False, "iterations": 1}


@dataclass(frozen=True)
class Case:
    """A dense model with random components and its inputs, which tests do not change."""

    name: str
    dense: Any
    inputs: dict[str, Tensor]

    @property
    def residual_class(self) -> Any:
        return next(
            cls
            for cls in classes.model_classes_of(FAMILIES[self.name]).values()
            if cls.dense_class() is type(self.dense)
        )

    def states(self, model: Any) -> Tensor:
        """The encoder's final states at frames of speech, (num_frames, hidden_size)."""
        owner = FAMILIES[self.name].find_encoder(model)
        with torch.no_grad():
            output = output_of(model, owner, to_model(model, self.inputs))
        mask = mask_of(model, output, self.inputs)
        return output[0].flatten(0, 1) if mask is None else output[0][mask]

    def error(self, model: Any) -> float:
        """Of the final states, relative to those of the dense model."""
        states = self.states(self.dense)
        return float((self.states(model) - states).norm() / states.norm())

    def compressed(self, residual: ResidualConfig | None, **options: Any) -> Any:
        """A residual model of the dense one."""
        options = {**options, "progress": False, "iterations": 1}
        return self.residual_class.from_dense(self.dense, residual, [self.inputs], **options)


@functools.cache
def case(name: str) -> Case:
    return Case(name, dense_model(name), inputs_for(name))


@functools.cache
def residual(name: str) -> Any:
    """A model whose components are all random, of layers that share."""
    config = case(name).residual_class.config_class.from_dense_config(
        case(name).dense.config, ResidualConfig(group_size=2, rank=4, diagonal="all")
    )
    torch.manual_seed(0)
    return randomize_(case(name).residual_class(config))


def encoder_of(name: str, model: Any) -> Any:
    return FAMILIES[name].find_encoder(model)


def outputs_of(model: Any, name: str) -> Tensor:
    """What the model gives first, such as logits."""
    with torch.no_grad():
        return model(**case(name).inputs, **decoder_inputs(name))[0]


def decoder_inputs(name: str) -> dict[str, Any]:
    if case(name).dense.config.is_encoder_decoder and hasattr(case(name).dense, "get_decoder"):
        return {"decoder_input_ids": torch.tensor([[1, 3, 4], [1, 5, 6]])}
    return {}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_gradients_equal_those_of_the_merged_model(name):
    """The merged matrices are checked against the components, which are random."""
    model = residual(name)
    dense = model.merge()
    encoders = encoder_of(name, model), encoder_of(name, dense)
    assert type(dense) is type(case(name).dense)
    for path, linear in residual_linears(encoders[0]):
        expected = linear.shared.weight + linear.residual_B @ linear.residual_A
        expected.diagonal().add_(linear.diagonal)
        twin = encoders[1].get_submodule(path).weight
        torch.testing.assert_close(twin.detach(), expected.detach().view_as(twin))
    for twin, encoder in zip((model, dense), encoders):
        twin.zero_grad()
        output_of(twin, encoder, case(name).inputs)[0].square().sum().backward()
    torch.testing.assert_close(case(name).states(model), case(name).states(dense), rtol=1e-4, atol=1e-5)
    for path, linear in residual_linears(encoders[0]):
        gradient = encoders[1].get_submodule(path).weight.grad.view(linear.out_features, linear.in_features)
        of_B = gradient @ linear.residual_A.detach().T
        torch.testing.assert_close(
            linear.residual_B.grad, of_B, rtol=1e-3, atol=1e-4 * float(of_B.abs().max())
        )
        assert linear.residual_B.grad.any() and linear.residual_A.grad.any() and linear.diagonal.grad.any(), (
            path
        )
        assert linear.shared.weight.grad.any(), path
    model.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_model_has_equal_outputs(name):
    torch.testing.assert_close(
        outputs_of(residual(name), name), outputs_of(residual(name).merge(), name), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_model_keeps_the_dtype_and_device_of_buffers_that_are_not_saved(name):
    for place in ("cpu", "meta"):
        model = copy.deepcopy(residual(name)).to(place, torch.bfloat16)
        expected = dict(model.named_buffers())
        for path, buffer in model.merge().named_buffers():
            assert (buffer.dtype, buffer.device) == (expected[path].dtype, expected[path].device), path
            assert place == "meta" or torch.equal(buffer, expected[path]), path


def test_a_merged_speech2text_of_16_bits_runs():
    model = copy.deepcopy(residual("speech_to_text")).bfloat16()
    inputs = {**case("speech_to_text").inputs, **decoder_inputs("speech_to_text")}
    inputs["input_features"] = inputs["input_features"].bfloat16()
    torch.testing.assert_close(model.merge()(**inputs)[0], model(**inputs)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_compression_is_exact_at_full_rank_and_its_error_falls_with_the_rank(name):
    of = case(name)
    errors = [
        of.error(of.compressed(ResidualConfig(group_size=2, rank=rank, diagonal="none")))
        for rank in (2, 12, 32)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_a_budget_is_met(name):
    model = case(name).compressed(None, budget=0.6, parts=("encoder",), shared_bits=(4,))
    ratio = hrt.size_report(model).encoder_bytes.ratio
    assert 0.55 < ratio <= 0.6
    assert case(name).error(model) < 0.1


@pytest.mark.parametrize("name", KINDS)
def test_a_fitted_branch_need_not_run_again(name, monkeypatch):
    config = ResidualConfig(group_size=1, rank=4, diagonal="none")
    has_decoder = len([stack for stack in FAMILIES[name].stacks if stack.is_in(case(name).dense)]) > 1
    options = {"decoder_residual_config": config} if has_decoder else {}
    skipped: list[nn.Module] = []
    skip = refinement.forward_as
    monkeypatch.setattr(
        refinement, "forward_as", lambda module, forward: skipped.append(module) or skip(module, forward)
    )
    found = case(name).compressed(config, **options).state_dict()
    assert skipped
    skipped.clear()
    monkeypatch.setattr(Block, "module", "")
    expected = case(name).compressed(config, **options).state_dict()
    assert not skipped
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading_keeps_one_u_in_the_file_and_in_memory(name, tmp_path):
    model = residual(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    banks = [key for key in saved if ".shared." in f".{key}"]
    modules = {path.split(".", 2)[2] for path, _ in residual_linears(encoder_of(name, model))}
    assert len(banks) == len(modules)
    state = model.state_dict()
    autos = classes.dense_names(FAMILIES[name])
    auto = next(auto for auto in (*classes.RECOGNIZERS, AutoModel) if auto in autos)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    layers = encoder_of(name, loaded).layers
    path = next(iter(modules))
    assert layers[0].get_submodule(path).shared is layers[1].get_submodule(path).shared
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(outputs_of(model, name), outputs_of(loaded, name))


FRESH = """
import sys, torch
import hf_residual_transformer
from transformers import AutoModel
folder = sys.argv[1]
for name in sys.argv[2:]:
    model = AutoModel.from_pretrained(f"{folder}/{name}")
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/{name}.pt"))[0], f"{folder}/{name}.out")
"""


def test_a_fresh_process_loads_every_kind(tmp_path):
    names = [name for name in KINDS if not decoder_inputs(name)]
    expected = {}
    for name in names:
        model = next(iter(classes.model_classes_of(FAMILIES[name]).values()))(residual(name).config)
        randomize_(model).save_pretrained(tmp_path / name)
        torch.save(case(name).inputs, tmp_path / f"{name}.pt")
        expected[name] = outputs_of(model, name)
    done = fresh_process(["-c", FRESH, tmp_path, *names], tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    for name in names:
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.out"), expected[name], rtol=1e-5, atol=1e-5)


class Fixed:
    """An objective whose gradients are the same for a recording alone and in a padded batch."""

    def __init__(self, source: LayerStack, mask_model: Any) -> None:
        self.source, self.mask_model = source, mask_model

    def __call__(self, model: Any, batch: dict[str, Tensor], _leaves: list[Tensor]) -> Tensor:
        output = output_of(model, self.source.owner, batch)
        final, mask = output[0], mask_of(model, output, batch)
        probe = torch.randn(final.shape[1:], generator=torch.Generator().manual_seed(0)).expand(final.shape)
        return (final * probe * (1.0 if mask is None else mask[..., None])).sum()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "whisper"])
def test_padding_changes_no_statistic(name):
    """The second recording of the batch is padded; alone it is not."""
    of = case(name)
    length = int(of.inputs["attention_mask"][1].sum())
    alone = Case(name, of.dense, {key: value[1:, :length] for key, value in of.inputs.items()})
    expected = alone.states(of.dense)
    found = of.states(of.dense)[-len(expected) :]
    changes = not torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert changes == (name in CHANGED_BY_PADDING)
    if changes:
        return
    view = frozen_view(case(name).dense)
    _make_linear(view, FAMILIES[name])
    source = LayerStack(FAMILIES[name].encoder, view)
    groups = [Group(path, 1, (layer,)) for path in source.stack.modules for layer in range(len(source))]

    def statistics(batches: list[dict[str, Tensor]]) -> dict[Any, Any]:
        return collect(source, view, groups, batches, Fixed(source, view), progress=False)

    together = statistics([case(name).inputs])
    whole, short = (
        {key: value[row : row + 1, :end] for key, value in case(name).inputs.items()}
        for row, end in ((0, None), (1, length))
    )
    alone = statistics([whole, short])
    positions = {path for block in source.stack.blocks for path in block.positions}
    for (layer, path), entry in together.items():
        if path in positions:  # which are those of the longest recording
            continue
        twin = alone[layer, path]
        for found, expected in ((entry.products, twin.products), (entry.gradients, twin.gradients)):
            close = {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
            torch.testing.assert_close(found, expected, **close)
        assert entry.weight > 0, path


@pytest.mark.parametrize("name", KINDS)
def test_statistics_are_those_of_each_matrixs_inputs_and_gradients(name):
    """A matrix's gradient is the sum of outer products, which the moments must be able to give: for errors of rank one,
    `(v^T dW u)^2` is at most what the statistics say, and for one frame equal.
    """
    view = frozen_view(case(name).dense)
    _make_linear(view, FAMILIES[name])
    source = LayerStack(FAMILIES[name].encoder, view)
    seen: dict[tuple[int, str], list[Tensor]] = {}
    wanted = [(0, path) for path in source.stack.modules]

    def keep(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            first = isinstance(module, ChannelsFirst)
            rows = [states.transpose(1, 2) if first else states for states in (args[0], output)]
            seen[key] = [rows[0].detach().flatten(0, -2), rows[1].retain_grad() or rows[1]]

        return hook

    groups = [Group(path, 1, (0,)) for path in source.stack.modules]
    found = collect(source, view, groups, [case(name).inputs], Fixed(source, view), progress=False)
    for parameter in view.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    handles = [source.linear(*key).register_forward_hook(keep(key)) for key in wanted]
    Fixed(source, view)(view, case(name).inputs, []).backward()
    for handle in handles:
        handle.remove()
    for key, (inputs, _) in seen.items():
        gradient = source.linear(*key).weight.grad
        # Cauchy-Schwarz between the two moments bounds each entry of their product.
        entry = found[key]
        assert gradient.any(), key
        bound = entry.gradients.diagonal()[:, None] * (inputs.double().square().sum(0))
        assert (gradient.double().square() <= bound * (1 + 1e-5) + 1e-12).all(), key
        torch.testing.assert_close(float(entry.gradients.trace()), float(entry.weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_auto_class_that_knows_the_dense_family_knows_the_residual_one(name):
    dense_config = CONFIG_MAPPING[name](**SETTINGS[name])
    config_class = classes.config_class_of(FAMILIES[name])
    config = config_class.from_dense_config(dense_config, ResidualConfig(group_size=2, rank=2))
    assert type(AutoConfig.for_model(config_class.model_type)) is config_class
    known = [auto for auto in classes.AUTO_MODELS if type(dense_config) in auto._model_mapping]
    assert known == list(classes.dense_names(FAMILIES[name]))
    for auto in known:
        model = auto.from_config(config)
        assert type(model).__name__ == f"Residual{auto._model_mapping[type(dense_config)].__name__}"
        assert getattr(hrt, type(model).__name__) is type(model)
        assert sum(1 for _ in residual_linears(model)) > 0
    for auto, mapping in classes.PROCESSING.items():
        dense = mapping.get(type(dense_config), None)
        assert dense is None or (auto.__name__ and mapping[config_class] is dense)


def test_a_family_without_a_residual_form_is_refused_by_name_with_the_reason():
    from transformers import SEWDConfig, SEWDForCTC

    dense = SEWDForCTC(SEWDConfig(**SETTINGS["sew"], pos_att_type=("c2p",), position_buckets=8))
    with pytest.raises(ValueError, match=r"got SEWDForCTC, a sew-d: its attention uses the same"):
        hrt.compress(dense, None, processor=object(), start="svd")
    assert not set(REFUSED) & set(FAMILIES)
    assert set(REFUSED) <= set(CONFIG_MAPPING)


@pytest.mark.skipif(not (REPO / "docs" / "families.md").is_file(), reason="documents are not here")
def test_the_page_lists_every_family_with_its_auto_classes_and_matrices():
    page = (REPO / "docs" / "families.md").read_text()
    assert "\n".join(table()) in page


@pytest.mark.parametrize("name", KINDS)
def test_a_dense_model_whose_layers_stay_in_16_bits_gives_the_same_compact_one(name, monkeypatch):
    """The weights of a module are in float32 while it runs, and those of no other."""
    of = Case(name, copy.deepcopy(case(name).dense).bfloat16(), case(name).inputs)
    has_decoder = name in ("whisper", "speech_to_text", "moonshine", "moonshine_streaming")
    labels = {"labels": torch.tensor([[3, 4, 5, 6, 2], [7, 8, 2, -100, -100]])} if has_decoder else {}
    options = {"shared_bits": (4, 8), "progress": False, "iterations": 1}
    options |= {"budget": 0.95} if has_decoder else {"budget": 0.6, "parts": ("encoder",)}
    from_dense = functools.partial(
        of.residual_class.from_dense, of.dense, None, [{**of.inputs, **labels}], **options
    )
    expected = from_dense()
    running: list[nn.Module] = []
    kept: dict[nn.Module, dict[str, Any]] = {}
    together: set[int] = set()
    begin, end = _Loan.begin, _Loan.end

    def begins(loan: Any, module: nn.Module, *args: Any) -> None:
        running.append(module)
        kept[module] = {key: value for key, value in module._parameters.items() if value is not None}
        together.add(len([one for one in running if one not in [*module.modules()]]))
        begin(loan, module, *args)
        assert all(value.dtype == torch.float32 for value in module.parameters(recurse=False))

    def ends(loan: Any, module: nn.Module, *args: Any) -> None:
        end(loan, module, *args)
        assert all(module._parameters[name] is value for name, value in kept[module].items())
        running.remove(module)

    monkeypatch.setattr(_Loan, "begin", begins)
    monkeypatch.setattr(_Loan, "end", ends)
    found = from_dense(device="cpu")
    assert {value.dtype for of_module in kept.values() for value in of_module.values()} >= {torch.bfloat16}
    assert not running and together <= {0, 1} and 0 in together
    assert (found.dtype, expected.dtype, of.dense.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert found.config.to_dict() == expected.config.to_dict()
    others = expected.merge().state_dict()
    for key, value in found.bfloat16().merge().state_dict().items():
        if name != "moonshine":
            torch.testing.assert_close(
                value, others[key], rtol=0.01, atol=0.01 * float(value.abs().max()), msg=key
            )
            continue
        # On a processor with AVX2 alone, a weight of this model lies between two integers and is rounded to the other,
        # and the weights and biases after it make up for that.
        most = 0.02 if value.dim() > 1 else 0.05
        assert (value - others[key]).float().norm() <= most * value.float().norm(), key


# Most of a tiny Moonshine is its convolutions, which stay dense. Where a row is one block, 8-bit scales save nothing.
@pytest.mark.parametrize("name", ["wav2vec2", "parakeet_ctc"])
def test_a_size_is_of_the_whole_model_where_the_encoder_alone_becomes_compact(name):
    report = hrt.size_report(case(name).compressed(None, budget=0.9, shared_bits=(4, 8)))
    assert 0.8 < report.model_bytes.ratio <= 0.9
    assert report.encoder_bytes.ratio < report.model_bytes.ratio


@pytest.mark.parametrize(
    ("name", "budget"), [("speech_to_text", 0.62), ("moonshine", 0.85), ("moonshine_streaming", 0.9)]
)
def test_the_whole_model_becomes_compact_where_the_decoder_is_known(name, budget):
    of = case(name)
    labels = torch.tensor([[3, 4, 5, 6, 2], [7, 8, 2, -100, -100]])
    model = of.residual_class.from_dense(
        of.dense, None, [{**of.inputs, "labels": labels}], budget=budget, shared_bits=(8,), progress=False
    )
    report = hrt.size_report(model)
    assert set(report.parts) >= {"encoder layers", "decoder layers"}
    assert report.model_bytes.ratio <= budget
    inputs = {**of.inputs, "labels": labels}
    with torch.no_grad():
        found, expected, merged = (twin(**inputs) for twin in (model, of.dense, model.merge()))
    torch.testing.assert_close(found.logits, merged.logits, rtol=1e-4, atol=1e-4)
    change = (found.logits - expected.logits).norm() / expected.logits.norm()
    assert 0 < change < 0.25
    generated = [twin.generate(**of.inputs, max_new_tokens=4) for twin in (model, model.merge())]
    assert torch.equal(*generated)


@pytest.mark.parametrize("name", ["whisper", "speech_to_text", "moonshine"])
def test_a_decoders_statistics_are_those_with_an_encoder_that_runs_each_time(name):
    view = frozen_view(case(name).dense)
    _make_linear(view, FAMILIES[name])
    encoder, decoder = (LayerStack(stack, view) for stack in FAMILIES[name].stacks)
    batch = {**case(name).inputs, "labels": torch.tensor([[3, 4, 5, 6, 2], [7, 8, 2, -100, -100]])}
    known = with_labels(view, encoder.owner, [batch], progress=False)
    assert (MEMORY in known[0]) == (name == "whisper")  # other decoders read more than the states
    groups = [Group(path, None, (0,), "decoder") for path in decoder.stack.modules]
    found, expected = (
        collect(decoder, view, groups, batches, LogitsObjective(decoder, encoder), progress=False)
        for batches in (known, [without_memory(one) for one in known])
    )
    for key, entry in found.items():
        assert entry.weight > 0, key
        torch.testing.assert_close(entry.products, expected[key].products)
        torch.testing.assert_close(entry.gradients, expected[key].gradients)

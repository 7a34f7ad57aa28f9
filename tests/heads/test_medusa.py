"""Medusa heads on a model: sizes, the start, the bond, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specdec.heads import MedusaConfig, MedusaHeads
from specdec.heads.output_embedding import OutputEmbedding
from tests.tiny_models import VOCAB, new_model, tiny_model


def trained(heads: MedusaHeads, seed: int = 0) -> MedusaHeads:
    """Heads in which every number differs from every other."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
    return heads


def states(model: Any, *shape: int, seed: int = 1) -> Tensor:
    """Hidden states to try heads on."""
    hidden = OutputEmbedding(model).hidden_size
    return torch.randn(*shape, hidden, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def one_by_one(heads: MedusaHeads, hidden: Tensor) -> Tensor:
    """The heads' definition, head by head and layer by layer."""
    outputs = []
    for head in range(heads.config.num_heads):
        x = hidden.to(heads.dtype)
        for weight, bias in zip(heads.weights, heads.biases, strict=True):
            x = x + nn.functional.silu(nn.functional.linear(x, weight[head], bias[head]))
        own = None if heads.projections is None else heads.projections[head]
        outputs.append(heads.output_embedding(x) if own is None else nn.functional.linear(x, own))
    return torch.stack(outputs)


def with_padded_vocabulary() -> Any:
    model = new_model("llama")
    model.resize_token_embeddings(VOCAB, pad_to_multiple_of=64)
    return model


def lora(**settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(new_model("llama"), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))


MODELS = {
    "untied": lambda: new_model("llama", tie_word_embeddings=False),
    "tied": lambda: new_model("gpt2"),
    "padded": with_padded_vocabulary,
    "lora": lambda: lora(target_modules=["q_proj", "v_proj"]),
    "lora on the output embedding": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "peft with an output embedding of its own": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", MODELS)
def test_each_head_starts_as_the_model_itself(name: str, version: str) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    heads = MedusaHeads.for_model(model, num_heads=3, num_layers=2, version=version)
    hidden = states(model, 2, 5)
    expected = model.get_output_embeddings()(hidden)
    logits = heads(hidden)
    assert logits.shape == (3, 2, 5, expected.shape[-1])
    for head in logits:
        torch.testing.assert_close(head, expected, rtol=0, atol=1e-6)
    assert heads.config.vocab_size == expected.shape[-1]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_start_is_what_the_model_picks() -> None:
    model = tiny_model("llama")
    heads = MedusaHeads.for_model(model)
    output = model(input_ids=torch.tensor([[5, 6, 7, 8]]), output_hidden_states=True)
    for logits in heads(output.hidden_states[-1]):
        torch.testing.assert_close(logits, output.logits)


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (0,)])
def test_batched_heads_are_the_heads_one_by_one(shape: tuple[int, ...], version: str) -> None:
    model = tiny_model("llama")
    heads = trained(MedusaHeads.for_model(model, num_heads=3, num_layers=2, version=version))
    hidden = states(model, *shape)
    assert heads.features(hidden).shape == (3, *hidden.shape)
    assert heads(hidden).shape == (3, *shape, VOCAB)
    torch.testing.assert_close(heads(hidden), one_by_one(heads, hidden))
    torch.testing.assert_close(heads.project(heads.features(hidden)), heads(hidden))


def assert_nothing_is_shared(heads: MedusaHeads, hidden: Tensor) -> None:
    """Changes each head of each parameter in turn: no other number and no other head's logits may change."""
    start, logits = [parameter.detach().clone() for parameter in heads.parameters()], heads(hidden)
    for index, parameter in enumerate(heads.parameters()):
        for head in range(heads.config.num_heads):
            parameter.data[head] += 1
            for other, (now, then) in enumerate(zip(heads.parameters(), start, strict=True)):
                changed = [not torch.equal(*pair) for pair in zip(now, then, strict=True)]
                assert changed == [(other, row) == (index, head) for row in range(heads.config.num_heads)]
            changed = [not torch.equal(*pair) for pair in zip(heads(hidden), logits, strict=True)]
            assert changed == [row == head for row in range(heads.config.num_heads)]
            parameter.data[head] = start[index][head]


@pytest.mark.parametrize("version", ["1", "2"])
def test_no_head_or_layer_shares_weights_with_another(version: str) -> None:
    model = tiny_model("llama")
    heads = MedusaHeads.for_model(model, num_heads=3, num_layers=2, version=version)
    assert_nothing_is_shared(heads, states(model, 4))


def test_sharing_would_be_seen() -> None:
    model = tiny_model("llama")
    layers = MedusaHeads.for_model(model, num_heads=3, num_layers=2)
    layers.weights[1].data = layers.weights[0].data
    with pytest.raises(AssertionError):
        assert_nothing_is_shared(layers, states(model, 4))
    among_heads = MedusaHeads.for_model(model, num_heads=3, version="1")
    assert among_heads.projections is not None
    among_heads.projections.data = among_heads.projections.data[:1].expand(3, -1, -1)
    with pytest.raises(AssertionError):
        assert_nothing_is_shared(among_heads, states(model, 4))


def test_gradients_differ_by_head_and_layer_and_stay_out_of_the_target() -> None:
    model = new_model("llama").requires_grad_(False)
    heads = trained(MedusaHeads.for_model(model, num_heads=3, num_layers=2))
    weight_of_head = torch.tensor([1.0, 0.8, 0.64])[:, None, None]
    (heads(states(model, 4)).log_softmax(-1)[..., 7, None] * weight_of_head).sum().backward()
    gradients = [part for parameter in heads.weights for part in parameter.grad]
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)
    assert not any(
        torch.equal(one, other) for i, one in enumerate(gradients) for other in gradients[:i] if one is not other
    )
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_heads_on_a_half_precision_target(dtype: torch.dtype) -> None:
    model = new_model("llama").to(dtype)
    heads = trained(MedusaHeads.for_model(model, num_heads=2))
    hidden = states(model, 3)
    assert heads.dtype == torch.float32
    assert heads.features(hidden).dtype == torch.float32
    assert heads(hidden).dtype == dtype
    torch.testing.assert_close(heads(hidden), one_by_one(heads, hidden))
    own = MedusaHeads.for_model(model, num_heads=2, version="1")
    assert own(hidden).dtype == torch.float32
    torch.testing.assert_close(own(hidden)[1].to(dtype), model.lm_head(hidden), rtol=0, atol=2e-2)


def test_parameters_in_another_precision() -> None:
    heads = MedusaHeads.for_model(tiny_model("llama"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}
    assert heads(states(tiny_model("llama"), 3)).dtype == torch.float32


class Packed(nn.Module):
    """An output embedding whose weight can not be read as a matrix, as quantised ones are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self._linear = [linear]

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._linear[0](hidden)
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_output_embedding_is_called_not_read(dtype: torch.dtype) -> None:
    model = new_model("llama", tie_word_embeddings=False).to(dtype)
    plain = model.lm_head
    model.set_output_embeddings(Packed(plain))
    heads = MedusaHeads.for_model(model, num_heads=2)
    hidden = states(model, 3)
    assert (heads.config.hidden_size, heads.config.vocab_size) == (plain.in_features, plain.out_features)
    torch.testing.assert_close(heads(hidden)[1], plain(hidden))
    with pytest.raises(ValueError, match=r"quantised or sharded.*use version 2 heads"):
        MedusaHeads.for_model(model, version="1")


def test_projections_can_not_be_copied_where_there_is_more_than_a_matrix() -> None:
    model = new_model("llama", tie_word_embeddings=False)
    model.lm_head.bias = nn.Parameter(torch.ones(VOCAB))
    hidden = states(model, 3)
    torch.testing.assert_close(MedusaHeads.for_model(model)(hidden)[0], model.lm_head(hidden))
    with pytest.raises(ValueError, match=r"has a bias.*use version 2 heads"):
        MedusaHeads.for_model(model, version="1")

    adapted = lora(target_modules=["lm_head"], init_lora_weights=False)
    torch.testing.assert_close(MedusaHeads.for_model(adapted)(hidden)[0], adapted.get_output_embeddings()(hidden))
    with pytest.raises(ValueError, match="merge its adapter first"):
        MedusaHeads.for_model(adapted, version="1")


def test_bind_names_both_sizes() -> None:
    heads = MedusaHeads.for_model(tiny_model("llama"))
    with pytest.raises(
        ValueError, match=rf"vocabulary {VOCAB} against the model's 128.*MedusaHeads.for_model"
    ) as error:
        heads.bind(with_padded_vocabulary())
    assert "hidden size" not in str(error.value)
    hidden = heads.config.hidden_size
    other = MedusaHeads(MedusaConfig(hidden + 8, VOCAB + 1, base_model_name_or_path="some/model"))
    sizes = rf"hidden size {hidden + 8} against.*{hidden}, vocabulary {VOCAB + 1} against.*{VOCAB}"
    with pytest.raises(ValueError, match=rf"made for some/model.*{sizes}"):
        other.bind(tiny_model("llama"))
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        heads.bind(tiny_model("llama").model)
    with pytest.raises(ValueError, match="no output embedding"):
        heads.bind(nn.Linear(2, 2))


def test_unknown_vocabulary_is_learnt_from_the_model() -> None:
    model = tiny_model("llama")
    heads = MedusaHeads(MedusaConfig(OutputEmbedding(model).hidden_size, None))
    assert heads.bind(model).config.vocab_size == VOCAB
    with pytest.raises(ValueError, match=f"vocabulary {VOCAB} against the model's 128"):
        heads.bind(with_padded_vocabulary())


def test_binding_again_takes_the_model_as_it_is_now() -> None:
    model = new_model("llama", tie_word_embeddings=False)
    heads = MedusaHeads.for_model(model)
    assert heads.bind(model) is heads
    hidden = states(model, 2)
    model.lm_head = copy.deepcopy(model.lm_head)
    model.lm_head.weight.data.normal_()
    torch.testing.assert_close(heads.bind(model)(hidden)[0], model.lm_head(hidden))


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_targets_embedding_is_no_part_of_the_heads(version: str) -> None:
    model = new_model("llama")
    heads = MedusaHeads.for_model(model, num_heads=2, num_layers=2, version=version)
    own = {"weights.0", "weights.1", "biases.0", "biases.1"} | ({"projections"} if version == "1" else set())
    assert set(heads.state_dict()) == own
    assert {name for name, _ in heads.named_parameters()} == own
    assert all(isinstance(module, (MedusaHeads, nn.ParameterList)) for module in heads.modules())
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in heads.parameters()}
    heads.to(torch.bfloat16).requires_grad_(False)
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_copies_and_pickles_leave_the_target_behind() -> None:
    model = tiny_model("llama")
    heads = trained(MedusaHeads.for_model(model, num_heads=2))
    file = io.BytesIO()
    torch.save(heads, file)
    file.seek(0)
    copies = [copy.deepcopy(heads), pickle.loads(pickle.dumps(heads)), torch.load(file, weights_only=False)]  # noqa: S301
    own_bytes = sum(parameter.numel() * 4 for parameter in heads.parameters())
    assert file.getbuffer().nbytes < own_bytes + VOCAB * heads.config.hidden_size * 4
    hidden = states(model, 3)
    for other in copies:
        with pytest.raises(ValueError, match=r"not bound to a model; call heads\.bind"):
            other(hidden)
        torch.testing.assert_close(other.bind(model)(hidden), heads(hidden), rtol=0, atol=0)
    assert heads(hidden) is not None


def test_heads_do_not_keep_the_model() -> None:
    model = new_model("llama", tie_word_embeddings=False)
    heads = MedusaHeads.for_model(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert heads(torch.zeros(1, heads.config.hidden_size)).shape == (4, 1, VOCAB)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"hidden_size": 2.5}, "hidden_size=2.5"),
        ({"version": "3"}, "version='3'"),
        ({"version": "1", "vocab_size": None}, "vocab_size=None"),
        ({"num_heads": True}, "num_heads=True"),
    ],
)
def test_sizes_that_can_not_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MedusaConfig(**({"hidden_size": 8, "vocab_size": 16} | changes))


def test_heads_under_autocast() -> None:
    model = tiny_model("llama")
    heads = trained(MedusaHeads.for_model(model, num_heads=2))
    hidden = states(model, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads(hidden)
    torch.testing.assert_close(logits.float(), heads(hidden), rtol=0.1, atol=0.1)

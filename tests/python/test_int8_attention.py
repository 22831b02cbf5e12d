"""Attention in parts computes what torch's whole attention does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from halfstep.int8_attention import SplitAttention, SplitEncoder, SplitEncoderLayer, replace_attention
from int8_attention_cases import (
    BATCH,
    HEADS,
    KEYS,
    LEFT_ALIGNED,
    QUERIES,
    WIDTH,
    attention,
    calls_of_products,
    close,
    encoder,
    hidden,
    inference,
    inputs,
    randomized,
    replaced,
)
from torch import nn
from torch.nn.utils import parametrizations


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with inference():
        yield


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """torch's fast path turns float masks into NaN and hidden rows into zeros."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


ATTN_MASKS: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "bool": lambda: hidden(QUERIES, KEYS),
    "bool-heads": lambda: hidden(BATCH * HEADS, QUERIES, KEYS),
    "float": lambda: torch.randn(QUERIES, KEYS),
    "float-heads": lambda: torch.randn(BATCH * HEADS, QUERIES, KEYS),
}
KEY_MASKS: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "bool": lambda: hidden(BATCH, KEYS),
    "float": lambda: torch.randn(BATCH, KEYS),
}
OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "bias-kv-zero": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 16, "vdim": 20},
    "widths-bias-kv": {"kdim": 16, "add_bias_kv": True, "bias": False},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_weights_are_torchs(options: dict, batch_first: bool, no_fast_path: None) -> None:
    module = attention(batch_first=batch_first, **options)
    split = replaced(module)
    for attn_mask, key_mask in itertools.product(ATTN_MASKS.values(), KEY_MASKS.values()):
        masks = {"attn_mask": attn_mask(), "key_padding_mask": key_mask()}
        given = inputs(batch_first, key_width=module.kdim, value_width=module.vdim)
        for needed, averaged in ((True, True), (True, False), (False, True)):
            asked = {"need_weights": needed, "average_attn_weights": averaged, **masks}
            expected, expected_weights = module(*given, **asked)
            output, weights = split(*given, **asked)
            assert close(output, expected)
            assert (weights is None) == (not needed)
            assert weights is None or close(weights, expected_weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 16}])
def test_inputs_without_a_batch(options: dict, batch_first: bool, no_fast_path: None) -> None:
    module = attention(batch_first=batch_first, **options)
    split = replaced(module)
    given = [x[0] for x in inputs(True, key_width=module.kdim)]
    for attn_mask in (None, hidden(QUERIES, KEYS), torch.randn(HEADS, QUERIES, KEYS)):
        for key_mask, needed in itertools.product((None, hidden(KEYS)), (True, False)):
            for averaged in (True, False):
                asked = {
                    "attn_mask": attn_mask,
                    "key_padding_mask": key_mask,
                    "need_weights": needed,
                    "average_attn_weights": averaged,
                }
                for result, expected in zip(split(*given, **asked), module(*given, **asked), strict=True):
                    assert (result is None) == (expected is None)
                    assert result is None or close(result, expected)


@pytest.mark.parametrize("needed", [True, False])
def test_self_attention_is_that_of_the_fast_path(needed: bool) -> None:
    module = attention(batch_first=True)
    split = replaced(module)
    x = torch.randn(BATCH, KEYS, WIDTH)
    for masks in ({}, {"key_padding_mask": hidden(BATCH, KEYS)}, {"attn_mask": hidden(KEYS, KEYS)}):
        output, weights = split(x, x, x, need_weights=needed, **masks)
        expected, expected_weights = module(x, x, x, need_weights=needed, **masks)
        assert close(output, expected)
        assert (weights is None) == (not needed)
        assert weights is None or close(weights, expected_weights)


@pytest.mark.parametrize("key_mask", [None, "last"])
@pytest.mark.parametrize("needed", [True, False])
def test_the_causal_hint(needed: bool, key_mask: str | None, no_fast_path: None) -> None:
    module = attention(batch_first=True)
    split = replaced(module)
    x = torch.randn(BATCH, KEYS, WIDTH)
    causal = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    padding = None if key_mask is None else torch.arange(KEYS).expand(BATCH, KEYS) >= KEYS - 2
    asked = {"attn_mask": causal, "key_padding_mask": padding, "need_weights": needed}
    output, _ = split(x, x, x, is_causal=True, **asked)
    assert close(output, module(x, x, x, is_causal=True, **asked)[0])
    assert close(output, split(x, x, x, **asked)[0])
    assert not close(output, split(x, x, x)[0], 1e-2)


def test_with_the_hint_alone_the_mask_is_not_read(no_fast_path: None) -> None:
    module = attention(batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH)
    asked = {"attn_mask": hidden(KEYS, KEYS), "is_causal": True, "need_weights": False}
    assert close(replaced(module)(x, x, x, **asked)[0], module(x, x, x, **asked)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, no_fast_path: None) -> None:
    module = attention(batch_first=True).to(dtype)
    split = replaced(module)
    given = [x.to(dtype) for x in inputs(True)]
    mask = hidden(QUERIES, KEYS)
    relative = 1e-14 if dtype == torch.float64 else 1e-2
    assert close(split(*given, attn_mask=mask)[0], module(*given, attn_mask=mask)[0], relative)
    # A mask that stayed float32 when the model became half: torch's own attention refuses it.
    assert split(*given, attn_mask=torch.randn(QUERIES, KEYS))[0].dtype == dtype


def test_the_attributes_stay() -> None:
    for module in (attention(batch_first=True), attention(kdim=16, vdim=8), attention(add_bias_kv=True)):
        split = replaced(module)
        assert isinstance(split, SplitAttention)
        for name in (
            "embed_dim",
            "kdim",
            "vdim",
            "num_heads",
            "head_dim",
            "batch_first",
            "dropout",
            "add_zero_attn",
            "_qkv_same_embed_dim",
        ):
            assert getattr(split, name) == getattr(module, name), name
        for part in (split.q_proj, split.k_proj, split.v_proj, split.out_proj):
            assert type(part) is nn.Linear
        assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in module.parameters())


def test_frozen_weights_stay_frozen() -> None:
    assert not any(p.requires_grad for p in replaced(attention().requires_grad_(False)).parameters())
    assert all(p.requires_grad for p in replaced(attention()).parameters())


def test_the_weights_are_copies() -> None:
    module = attention()
    split, _, _ = replace_attention(module)
    before = split.q_proj.weight.clone()
    module.in_proj_weight.zero_()
    assert torch.equal(split.q_proj.weight, before)
    assert split.q_proj.weight.untyped_storage().nbytes() == before.numel() * before.element_size()


def test_bad_arguments_are_refused() -> None:
    split = replaced(attention(batch_first=True))
    query, key, value = inputs(True)
    with pytest.raises(ValueError, match=r"is_causal=True without attn_mask"):
        split(query, key, value, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask is \[7, 5\], expected \[5, 7\] or \[12, 5, 7\]"):
        split(query, key, value, attn_mask=hidden(KEYS, QUERIES))
    with pytest.raises(ValueError, match=r"attn_mask is \[3, 5, 7\]"):
        split(query, key, value, attn_mask=hidden(BATCH, QUERIES, KEYS))
    with pytest.raises(ValueError, match=r"key_padding_mask is \[3, 5\], expected \[3, 7\]"):
        split(query, key, value, key_padding_mask=hidden(BATCH, QUERIES))
    with pytest.raises(TypeError, match=r"torch.int64, expected torch.bool"):
        split(query, key, value, attn_mask=hidden(QUERIES, KEYS).long())
    with pytest.raises(ValueError, match="have 3, 2 and 3 dimensions"):
        split(query, key[0], value)
    with pytest.raises(ValueError, match="have 4, 4 and 4 dimensions"):
        split(query[None], key[None], value[None])
    with pytest.raises(ValueError, match="expected the same batch"):
        split(query[:2], key, value)
    with pytest.raises(ValueError, match="as many keys as values"):
        split(query, key, value[:, :4])
    nested = torch.nested.nested_tensor([query[0], query[1, :3]])
    with pytest.raises(ValueError, match="nested tensor"):
        split(nested, nested, nested)


def test_training_works() -> None:
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True), 2)
    split = replaced(module)
    x = torch.randn(BATCH, KEYS, WIDTH)
    padding = torch.arange(KEYS).expand(BATCH, KEYS) >= KEYS - 2
    with torch.enable_grad():
        output, expected = split(x, src_key_padding_mask=padding), module(x, src_key_padding_mask=padding)
        assert close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
    own = split.layers[0].self_attn
    gradients = torch.cat([part.weight.grad for part in (own.q_proj, own.k_proj, own.v_proj)])
    assert close(gradients, module.layers[0].self_attn.in_proj_weight.grad, 1e-5)
    dropping = replaced(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.5, batch_first=True))
    assert dropping.training
    assert not torch.equal(dropping(x), dropping(x))
    attending = replaced(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5))
    assert not torch.equal(attending(x, x, x)[0], attending(x, x, x)[0])
    assert not torch.equal(attending(x, x, x, need_weights=False)[0], attending(x, x, x, need_weights=False)[0])


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "activation", ["relu", "gelu", F.silu, nn.GELU(), Squared()], ids=["relu", "gelu", "silu", "GELU", "squared"]
)
def test_encoder_layers(activation: object, norm_first: bool, batch_first: bool) -> None:
    options = {"activation": activation, "norm_first": norm_first, "batch_first": batch_first}
    layer = randomized(nn.TransformerEncoderLayer(WIDTH, HEADS, 40, **options)).eval()
    split = replaced(layer)
    assert isinstance(split, SplitEncoderLayer)
    assert {name for name, _ in split.named_children()} == {name for name, _ in layer.named_children()}
    x = torch.randn(KEYS, KEYS, WIDTH)
    causal = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    for asked in (
        {},
        {"src_mask": hidden(KEYS, KEYS)},
        {"src_key_padding_mask": hidden(KEYS, KEYS)},
        {"src_mask": hidden(KEYS, KEYS), "src_key_padding_mask": hidden(KEYS, KEYS)},
        {"src_mask": causal, "is_causal": True},
    ):
        assert close(split(x, **asked), layer(x, **asked))
    assert close(split(x[0]), layer(x[0]))


@pytest.mark.parametrize("options", [{}, {"activation": nn.GELU("tanh")}], ids=str)
def test_encoder_layers_where_the_fast_path_is_wrong(options: dict, no_fast_path: None) -> None:
    """It computes NaN for float masks, and the other gelu."""
    layer = randomized(nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True, **options)).eval()
    split = replaced(layer)
    x, mask = torch.randn(BATCH, KEYS, WIDTH), torch.randn(KEYS, KEYS)
    assert close(split(x, src_mask=mask), layer(x, src_mask=mask))


GAPS = torch.tensor([[0, 0, 1, 0, 1, 1, 1], [0] * 7, [0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
ONE_EMPTY = torch.arange(KEYS).expand(BATCH, KEYS) >= torch.tensor([[KEYS], [4], [0]])


NESTED = [{}, {"activation": "gelu"}]
NOT_NESTED = [{"norm_first": True}, {"bias": False}, {"batch_first": False}]
CASES = [
    *itertools.product([*NESTED, *NOT_NESTED], [None, LEFT_ALIGNED, GAPS]),
    *itertools.product(NESTED, [ONE_EMPTY]),  # torch gives NaN for it unless it nests
]


@pytest.mark.parametrize(("options", "padding"), CASES)
@pytest.mark.parametrize("form", ["bool", "float"])
def test_encoders_with_padding(options: dict, form: str, padding: torch.Tensor | None) -> None:
    """The padding is compared too: torch writes zeros there if it nests, and models may average over them."""
    model = encoder(**options)
    split = replaced(model)
    assert isinstance(split, SplitEncoder)
    x = torch.randn(BATCH, KEYS, WIDTH)
    if not options.get("batch_first", True):
        x = x.transpose(0, 1)
    if padding is not None and form == "float":
        padding = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    expected = model(x, src_key_padding_mask=padding)
    assert torch.isfinite(expected).all()
    assert close(split(x, src_key_padding_mask=padding), expected, 2e-6)
    pooled = split(x, src_key_padding_mask=padding).mean(1)
    assert close(pooled, expected.mean(1), 2e-6)


def test_encoders_that_do_not_nest(no_fast_path: None) -> None:
    model = encoder()
    split = replaced(model)
    x = torch.randn(BATCH, KEYS, WIDTH)
    assert close(split(x, src_key_padding_mask=LEFT_ALIGNED), model(x, src_key_padding_mask=LEFT_ALIGNED), 2e-6)
    mask, causal = torch.randn(KEYS, KEYS), torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    assert close(split(x, mask=mask), model(x, mask=mask), 2e-6)
    for hint in (None, True, False):
        assert close(split(x, mask=causal, is_causal=hint), model(x, mask=causal, is_causal=hint), 2e-6)
    both = {"mask": causal, "src_key_padding_mask": LEFT_ALIGNED}
    assert close(split(x, **both), model(x, **both), 2e-6)
    assert close(split(x[0]), model(x[0]), 2e-6)


def test_masks_together_are_not_nested() -> None:
    model = encoder()
    split = replaced(model)
    x = torch.randn(BATCH, KEYS, WIDTH)
    both = {"mask": torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1), "src_key_padding_mask": LEFT_ALIGNED}
    assert close(split(x, **both), model(x, **both), 2e-6)


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoders_and_whole_transformers(norm_first: bool) -> None:
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 32, batch_first=True, norm_first=norm_first).eval()
    split, names, left = replace_attention(copy.deepcopy(randomized(model)))
    assert left == {}
    assert {"encoder", "encoder.layers.1", "decoder.layers.0.self_attn", "decoder.layers.1.multihead_attn"} <= {*names}
    assert "decoder.layers.0" not in names
    source, target = torch.randn(BATCH, KEYS, WIDTH), torch.randn(BATCH, QUERIES, WIDTH)
    asked = {
        "tgt_mask": torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1),
        "src_key_padding_mask": LEFT_ALIGNED,
        "memory_key_padding_mask": LEFT_ALIGNED,
    }
    assert close(split(source, target, **asked), model(source, target, **asked), 2e-6)
    calls = calls_of_products(split, source, target)
    assert len(calls) == 2 * 6 + 2 * 10
    assert set(calls.values()) == {1}


def test_only_torchs_own_classes_are_replaced() -> None:
    class Attention(nn.MultiheadAttention):
        pass

    class Layer(nn.TransformerEncoderLayer):
        pass

    class Encoder(nn.TransformerEncoder):
        pass

    model = nn.ModuleDict(
        {
            "sub": Attention(WIDTH, HEADS),
            "hooked": attention(),
            "hooked_part": attention(),
            "parametrized": parametrizations.weight_norm(attention(), "in_proj_weight"),
            "parametrized_part": attention(),
            "replaced_forward": attention(),
            "other_part": attention(),
            "plain": attention(),
            "layers": nn.TransformerEncoder(Layer(WIDTH, HEADS, 32, batch_first=True), 1),
            "encoder": Encoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True), 1),
        }
    ).eval()
    model["hooked"].register_forward_pre_hook(lambda module, args: None)
    model["hooked_part"].out_proj.register_forward_hook(lambda module, args, output: None)
    parametrizations.weight_norm(model["parametrized_part"].out_proj)
    model["replaced_forward"].forward = model["plain"].forward
    model["other_part"].out_proj = nn.Identity()
    model["other_part"].out_proj.weight = model["other_part"].out_proj.bias = None
    kept = dict(model.named_children())
    x = torch.randn(BATCH, KEYS, WIDTH)
    padding = LEFT_ALIGNED.contiguous()
    expected = {name: model[name](x, src_key_padding_mask=padding) for name in ("layers", "encoder")}
    result, names, left = replace_attention(model)
    assert result is model
    assert names == [
        "plain",
        "layers",
        "layers.layers.0.self_attn",
        "encoder.layers.0",
        "encoder.layers.0.self_attn",
    ]
    assert {name: why.split(";")[0] for name, why in left.items()} == {
        "sub": "its class Attention may compute something else than its base does",
        "hooked": "it has hooks",
        "hooked_part": "it has hooks",
        "parametrized": "it is parametrized",
        "parametrized_part": "it is parametrized",
        "replaced_forward": "its forward has been replaced",
        "other_part": "its out_proj is a Identity",
        "layers.layers.0": "its class Layer may compute something else than its base does",
        "encoder": "its class Encoder may compute something else than its base does",
    }
    assert all(model[name] is kept[name] for name in left if "." not in name)
    # What is left works around what is replaced, the padding in the subclass of the encoder excepted.
    assert "their padding is not 0" in left["encoder"]
    assert close(model["layers"](x, src_key_padding_mask=padding), expected["layers"])
    output = model["encoder"](x, src_key_padding_mask=padding)
    assert close(output[~padding], expected["encoder"][~padding])
    assert set(calls_of_products(model["encoder"], x).values()) == {1}
    assert set(calls_of_products(model["layers"], x).values()) == {1}


def test_hooked_encoder_layers_keep_their_hooks() -> None:
    model = encoder(1)
    seen: list[torch.Size] = []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer = model.layers[0]
    x = torch.randn(BATCH, KEYS, WIDTH)
    expected = model(x)
    result, names, left = replace_attention(model)
    assert names == ["", "layers.0.self_attn"]
    assert left == {"layers.0": "it has hooks"}
    assert result.layers[0] is layer
    seen.clear()
    assert close(result(x), expected)
    assert seen == [x.shape]


def test_encoders_without_a_change_are_left_alone() -> None:
    class Attention(nn.MultiheadAttention):
        pass

    class Layer(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(WIDTH, HEADS, 32, batch_first=True)
            self.self_attn = Attention(WIDTH, HEADS, batch_first=True)

    model = nn.TransformerEncoder(Layer(), 1).eval()
    result, names, left = replace_attention(model)
    assert result is model
    assert names == []
    assert set(left) == {"layers.0", "layers.0.self_attn"}
    assert model.use_nested_tensor


def test_shared_modules_stay_shared() -> None:
    shared = attention(batch_first=True)
    model = nn.ModuleDict({"first": shared, "group": nn.ModuleList([shared, attention()])})
    result, names, left = replace_attention(model)
    assert names == ["first", "group.1"]
    assert left == {}
    assert result["first"] is result["group"][0]
    assert isinstance(result["first"], SplitAttention)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32)
    twice, names, _ = replace_attention(nn.Sequential(layer, layer))
    assert names == ["0", "0.self_attn"]
    assert twice[0] is twice[1]


def test_models_without_attention_and_models_replaced_before() -> None:
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(attention()))
    assert replace_attention(model) == (model, [], {})
    split = replaced(encoder())
    assert replace_attention(split) == (split, [], {})

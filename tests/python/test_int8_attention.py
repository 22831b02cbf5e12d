"""Attention in parts computes what torch's whole attention does, and its parts become int8."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from halfstep.int8_attention import SplitAttention, SplitEncoder, SplitEncoderLayer, replace_attention
from halfstep.int8_layers import Int8Linear, pack
from torch import nn
from torch.nn.utils import parametrizations

WIDTH, HEADS, BATCH, QUERIES, KEYS = 24, 4, 3, 5, 7


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*enable_nested_tensor is True.*")
        warnings.filterwarnings("ignore", message=".*prototype stage.*")
        warnings.filterwarnings("ignore", message=".*mismatched.*is deprecated.*")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # these are small products: on a busy machine threads wait for each other
        yield
        torch.set_num_threads(threads)


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """torch's fast path turns float masks into NaN and hidden rows into zeros."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def close(result: torch.Tensor, expected: torch.Tensor, relative: float = 1e-6) -> bool:
    """Whether the norm of the difference is within `relative` of the expected norm."""
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    return bool((result.double() - expected.double()).norm() <= relative * expected.double().norm())


def attention(**options: object) -> nn.MultiheadAttention:
    """An attention whose biases are not torch's zeros."""
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    return randomized(module)


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def replaced(model: nn.Module) -> nn.Module:
    result, names, left = replace_attention(copy.deepcopy(model))
    assert names
    assert left == {}
    return result


def inputs(batch_first: bool, keys: int = KEYS, key_width: int = WIDTH, value_width: int = WIDTH) -> list[torch.Tensor]:
    query, key, value = (
        torch.randn(BATCH, QUERIES, WIDTH),
        torch.randn(BATCH, keys, key_width),
        torch.randn(BATCH, keys, value_width),
    )
    return [query, key, value] if batch_first else [x.transpose(0, 1).contiguous() for x in (query, key, value)]


def hidden(*shape: int) -> torch.Tensor:
    """A bool mask that leaves every query its first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


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
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, nn.GELU(), Squared()], ids=str)
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


def encoder(layers: int = 3, **options: object) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **{"batch_first": True, **options})
    return randomized(nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH))).eval()


LEFT_ALIGNED = torch.arange(KEYS).expand(BATCH, KEYS) >= torch.tensor([[KEYS], [4], [1]])
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


def calls_of_products(model: nn.Module, *args: torch.Tensor) -> dict[str, int]:
    """How often a call of the model calls each of its nn.Linear."""
    calls = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in calls]
    model(*args)
    for handle in handles:
        handle.remove()
    return calls


class Vit(nn.Module):
    """A small vision transformer: [batch, 3, 32, 32] -> [batch, 10]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, activation="gelu", batch_first=True, norm_first=True, dropout=0.0
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.encoder(x))[:, 0])


def vit() -> Vit:
    return randomized(Vit()).eval()


def test_a_vision_transformer_and_the_calls_of_its_products() -> None:
    model = vit()
    split = replaced(model)
    images = torch.randn(4, 3, 32, 32)
    assert close(split(images), model(images), 2e-6)
    whole = calls_of_products(model, images)  # why all this is there
    assert {count for name, count in whole.items() if name.endswith("out_proj")} == {0}
    calls = calls_of_products(split, images)
    assert len(calls) == 4 * 6 + 1
    assert set(calls.values()) == {1}
    assert "encoder.layers.3.self_attn.out_proj" in calls
    assert "encoder.layers.0.linear2" in calls


def with_int8(model: nn.Module) -> nn.Module:
    """Put an int8 layer in the place of every nn.Linear."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Int8Linear(pack(layer.weight, layer.bias)))
    return model


def test_int8_products_change_little() -> None:
    model = vit()
    int8 = with_int8(replaced(model))
    assert sum(isinstance(layer, Int8Linear) for layer in int8.modules()) == 4 * 6 + 1
    images = torch.randn(8, 3, 32, 32)
    expected, output = model(images), int8(images)
    assert close(output, expected, 0.03)
    assert not close(output, expected, 1e-4)


@pytest.mark.parametrize("sequence", ["batch", "none", "first"])
def test_attention_in_int8(sequence: str) -> None:
    module = attention(batch_first=sequence != "first")
    int8 = with_int8(replaced(module))
    given = inputs(sequence != "first")
    if sequence == "none":
        given = [x[0] for x in given]
    for needed in (True, False):
        output, weights = int8(*given, need_weights=needed)
        expected, expected_weights = module(*given, need_weights=needed)
        assert close(output, expected, 0.03)
        assert weights is None or close(weights, expected_weights, 0.03)


def script(model: nn.Module, *args: torch.Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def fx(model: nn.Module, *args: torch.Tensor) -> nn.Module:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (SplitAttention, Int8Linear)) or super().is_leaf_module(module, name)

    graph = Tracer().trace(model)
    for node in graph.nodes:
        node.type = None  # annotations that are strings, as here, cannot be scripted after a trace
    traced = torch.fx.GraphModule(model, graph)
    assert "encoder.layers.0.linear1" in {node.target for node in traced.graph.nodes if node.op == "call_module"}
    return traced


WAYS = {
    "script": script,
    "script-fx": lambda model, *args: script(fx(model, *args)),
    "trace": lambda model, *args: torch.jit.trace(model, args),
    "export": lambda model, *args: torch.export.export(model, args, strict=False).module(),
    "export-strict": lambda model, *args: torch.export.export(model, args, strict=True).module(),
    "compile": lambda model, *args: torch.compile(model, backend="eager", fullgraph=True),
    "deepcopy": lambda model, *args: copy.deepcopy(model),
    "pickle": lambda model, *args: pickle.loads(pickle.dumps(model)),
    "fx": fx,
}


class Pooled(nn.Module):
    """A text classifier that averages over the padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(activation="gelu")
        self.attention = attention(batch_first=True)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        attended, weights = self.attention(x, x, x, key_padding_mask=padding)
        if weights is not None:
            x = x + attended * weights.mean()
        return x.mean(1)


# A strict export of torch 2.11 knows no objects that are attributes of modules within the model.
@pytest.mark.parametrize("way", [way for way in WAYS if way != "export-strict"])
def test_every_way_to_run_an_int8_model(way: str) -> None:
    images = torch.randn(4, 3, 32, 32)
    model = with_int8(replaced(vit()))
    expected = model(images)
    assert close(WAYS[way](model, images)(images), expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_a_model(way: str) -> None:
    images = torch.randn(4, 3, 32, 32)
    model = vit()
    result = WAYS[way](replaced(model), images)
    assert close(result(images), model(images), 2e-6)
    if way == "script-fx":  # after a trace TorchScript does not know that the weights are there
        return
    text = Pooled().eval()
    arguments = (torch.randn(BATCH, KEYS, WIDTH), LEFT_ALIGNED.contiguous())
    result = WAYS[way](replaced(text), *arguments)
    assert close(result(*arguments), text(*arguments), 2e-6)
    other = (arguments[0], LEFT_ALIGNED.flip(0).contiguous())
    assert close(result(*other), text(*other), 2e-6)


def test_dynamic_shapes_are_exported() -> None:
    text = Pooled().eval()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    dims = {0: batch, 1: length}
    arguments = (torch.randn(BATCH, KEYS, WIDTH), LEFT_ALIGNED.contiguous())
    program = torch.export.export(replaced(text), arguments, dynamic_shapes=(dims, dims), strict=False)
    x, padding = torch.randn(4, 9, WIDTH), torch.arange(9).expand(4, 9) >= torch.tensor([[9], [2], [5], [7]])
    assert close(program.module()(x, padding), text(x, padding), 2e-6)


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

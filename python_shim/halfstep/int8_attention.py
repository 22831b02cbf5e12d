"""Attention whose products are layers of their own, in place of torch's, so that each of them can become int8.

torch's `MultiheadAttention` computes with the weights of its children and never calls them; in inference the fast paths
of `TransformerEncoderLayer` and `TransformerEncoder` do so too. The modules here compute the same by calling
`q_proj`, `k_proj`, `v_proj`, `out_proj`, `linear1` and `linear2`, whatever these are. They can be scripted, exported,
compiled, copied, pickled and traced by `torch.fx`, which calls `attend` and the functions on masks whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from halfstep.calls import HOOKS


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask as a tensor to add to scores: a bool one, in which True hides, as 0 and -inf.

    TypeError for integers.
    """
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"an attention mask is {mask.dtype}, expected torch.bool or a floating-point type")
    return mask.to(dtype)


def zero_padding(output: torch.Tensor, padding: torch.Tensor, check: bool) -> torch.Tensor:
    """Return output [batch, sequence, features] with zeros where the additive mask padding [batch, sequence] is -inf.

    check: only if no sequence goes on behind padding. Another output than a batch is returned as it is.
    """
    if output.dim() != 3:
        return output
    hidden = torch.isneginf(padding)
    if check:
        hidden = hidden & (hidden.cummax(1)[0] == hidden).all()
    return output.masked_fill(hidden.unsqueeze(-1), 0.0)


def refuse_nested(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise ValueError for nested tensors, before a product is given one."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError("attention got a nested tensor, expected a padded one and key_padding_mask")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    batch_first: bool,
    key_padding_mask: torch.Tensor | None,
    need_weights: bool,
    attn_mask: torch.Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what attention does between its products: the output before the last one, and the weights or None.

    q, k, v are projected and of the shapes that nn.MultiheadAttention takes, and so is the output; the other arguments
    are its too. ValueError and TypeError as SplitAttention says.
    """
    if q.dim() not in (2, 3) or k.dim() != q.dim() or v.dim() != q.dim():
        raise ValueError(
            f"query, key and value have {q.dim()}, {k.dim()} and {v.dim()} dimensions, expected 3 each, or 2 without a "
            "batch"
        )
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True without attn_mask, expected the causal mask of which it is a hint")
    batched = q.dim() == 3
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    sequence_first = batched and not batch_first
    if k.size(1 if sequence_first else 0) != q.size(1 if sequence_first else 0) or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"query is {list(q.shape)}, key {list(k.shape)} and value {list(v.shape)}, expected the same batch, and as "
            "many keys as values"
        )
    q = _heads(q, heads, sequence_first)
    k = _heads(k, heads, sequence_first)
    v = _heads(v, heads, sequence_first)
    # As in torch: with the hint alone, the mask is not read.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = _mask(q, k.size(2), None if causal else attn_mask, key_padding_mask)
    keys = k.size(2)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, _row(bias_k, k)], 2)
        v = torch.cat([v, _row(bias_v, v)], 2)
    if add_zero_attn:
        k = F.pad(k, (0, 0, 0, 1))
        v = F.pad(v, (0, 0, 0, 1))
    if mask is not None and k.size(2) != keys:
        mask = F.pad(mask, (0, k.size(2) - keys))

    weights: torch.Tensor | None = None
    if need_weights:
        scores = torch.matmul(q * q.size(3) ** -0.5, k.transpose(-2, -1))
        if mask is not None:
            scores = scores + mask
        shares = F.dropout(torch.softmax(scores, -1), dropout, dropout > 0.0)
        output = torch.matmul(shares, v)
        weights = shares.mean(1) if average_attn_weights else shares
    else:
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    output = (output.permute(2, 0, 1, 3) if sequence_first else output.transpose(1, 2)).flatten(2)
    if not batched:
        output = output.squeeze(0)
        if weights is not None:
            weights = weights.squeeze(0)
    return output, weights


def _heads(x: torch.Tensor, heads: int, sequence_first: bool) -> torch.Tensor:
    """Return x as [batch, heads, sequence, head_dim]."""
    x = x.unflatten(2, (heads, -1))
    return x.permute(1, 2, 0, 3) if sequence_first else x.transpose(1, 2)


def _row(bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return bias [1, 1, embed_dim] as one more key or value of each sequence of `like`, which _heads() made."""
    return bias.view(1, like.size(1), 1, like.size(3)).expand(like.size(0), -1, -1, -1).to(like.dtype)


def _mask(
    q: torch.Tensor, keys: int, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the sum of both masks, which broadcasts to [batch, heads, queries, keys]."""
    batch, heads, queries = q.size(0), q.size(1), q.size(2)
    mask: torch.Tensor | None = None
    if attn_mask is not None:
        expected = [queries, keys] if attn_mask.dim() == 2 else [batch * heads, queries, keys]
        if list(attn_mask.shape) != expected:
            raise ValueError(
                f"attn_mask is {list(attn_mask.shape)}, expected {[queries, keys]} or {[batch * heads, queries, keys]}"
            )
        mask = additive_mask(attn_mask, q.dtype)
        mask = mask.unflatten(0, (batch, heads)) if mask.dim() == 3 else mask.unsqueeze(0).unsqueeze(0)
    if key_padding_mask is not None:
        if list(key_padding_mask.shape) != [batch, keys]:
            raise ValueError(f"key_padding_mask is {list(key_padding_mask.shape)}, expected {[batch, keys]}")
        padding = additive_mask(key_padding_mask, q.dtype).unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else mask + padding
    return mask


torch.fx.wrap("refuse_nested")
torch.fx.wrap("attend")
torch.fx.wrap("additive_mask")
torch.fx.wrap("zero_padding")


class SplitAttention(nn.Module):
    """nn.MultiheadAttention with the products in nn.Linear children `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    Arguments, results and shapes are those of nn.MultiheadAttention outside of its fast path: a float mask is added to
    the scores, and a query from which all keys are hidden gets NaN as weights. Nested tensors are refused.
    Raises ValueError for shapes that do not fit and for `is_causal` without `attn_mask`, TypeError for integer masks.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim = source.embed_dim
        self.kdim = source.kdim
        self.vdim = source.vdim
        self._qkv_same_embed_dim = source._qkv_same_embed_dim
        self.num_heads = source.num_heads
        self.head_dim = source.head_dim
        self.dropout = float(source.dropout)
        self.batch_first = source.batch_first
        self.add_zero_attn = source.add_zero_attn
        weights = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.detach().chunk(3)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        if not source.out_proj.weight.requires_grad:
            self.requires_grad_(False)
        self.bias_k = source.bias_k
        self.bias_v = source.bias_v
        # By these the modules of torch see that they cannot take their fast path.
        self.register_parameter("in_proj_weight", None)
        self.register_parameter("in_proj_bias", None)
        self.train(source.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return output and weights; the weights are None unless asked for."""
        refuse_nested(query, key, value)
        attended = attend(
            self.q_proj(query),
            self.k_proj(key),
            self.v_proj(value),
            self.num_heads,
            self.batch_first,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout if self.training else 0.0,
        )
        weights: torch.Tensor | None = None  # what a trace knows too
        if need_weights:
            weights = attended[1]
        return self.out_proj(attended[0]), weights

    def extra_repr(self) -> str:
        """Return what stands in the printed model."""
        return f"{self.embed_dim}, heads={self.num_heads}, batch_first={self.batch_first}"


class SplitEncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer without its fast path, around the children of `source`."""

    def __init__(self, source: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm_first = source.norm_first
        self.activation_relu_or_gelu = source.activation_relu_or_gelu
        for name in ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2"):
            self.add_module(name, getattr(source, name))
        self.activation = source.activation
        self.training = source.training

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Return the layer's output, of the shape of src."""
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _sa_block(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        attended = self.self_attn(
            x,
            x,
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )
        return self.dropout1(attended[0])

    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class SplitEncoder(nn.Module):
    """nn.TransformerEncoder without nested tensors, around the layers and norm of `source`.

    Where torch would nest the sequences in inference, the padding of the last layer's output is 0 as it is there; torch
    does so without gradients only, here it does not depend on them. A mask is never tested for being causal.
    """

    def __init__(self, source: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers = source.layers
        self.num_layers = source.num_layers
        self.norm = source.norm
        self.enable_nested_tensor = source.enable_nested_tensor
        self.use_nested_tensor = getattr(source, "use_nested_tensor", False)
        self.mask_check = getattr(source, "mask_check", True)
        self.training = source.training

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """Return the last layer's output, normalized if there is a norm."""
        if src_key_padding_mask is not None:
            src_key_padding_mask = additive_mask(src_key_padding_mask, src.dtype)
        if mask is not None:
            mask = additive_mask(mask, src.dtype)
        causal = False if is_causal is None else is_causal
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=causal)
        nests = self.use_nested_tensor and not self.training and torch.backends.mha.get_fastpath_enabled()
        if nests and mask is None and src_key_padding_mask is not None and not torch.is_autocast_enabled():
            output = zero_padding(output, src_key_padding_mask, self.mask_check)
        if self.norm is not None:
            output = self.norm(output)
        return output


_SPLIT = {
    nn.MultiheadAttention: SplitAttention,
    nn.TransformerEncoderLayer: SplitEncoderLayer,
    nn.TransformerEncoder: SplitEncoder,
}
ATTENTION = tuple(_SPLIT)  # the classes of torch whose code may read the weights of their layers and not call them


def replace_attention(model: nn.Module) -> tuple[nn.Module, list[str], dict[str, str]]:
    """Replace torch's attention, encoder layers and encoders in `model`, in place; the caller owns the model.

    Returns the model (another module if it is itself replaced), the names of the replaced modules, and for each one
    that is left its name and why. A module in several places stays one module, and has the first of its names.
    Encoders in which nothing is replaced are left without a word. Decoders call their children: only the attention in
    them is replaced.
    """
    order = [name for name, _ in model.named_modules()]
    replacement = _Replacement()
    model = replacement.visit(model, "")
    return model, sorted(replacement.replaced, key=order.index), replacement.left


class _Replacement:
    """One walk through a model."""

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self.left: dict[str, str] = {}
        self._results: dict[int, nn.Module] = {}
        self._visited: list[nn.Module] = []  # alive until the end, so that no id is given twice

    def visit(self, module: nn.Module, name: str) -> nn.Module:
        """Return what stands for this module, with all within it replaced."""
        if id(module) in self._results:
            return self._results[id(module)]
        self._results[id(module)] = module
        self._visited.append(module)
        for child_name, child in module._modules.items():
            if child is not None:
                result = self.visit(child, f"{name}.{child_name}" if name else child_name)
                if result is not child:
                    setattr(module, child_name, result)
        kind = next((kind for kind in _SPLIT if isinstance(module, kind)), None)
        if kind is None:
            return module
        if kind is nn.TransformerEncoder and not any(type(inner) in _SPLIT.values() for inner in module.modules()):
            return module
        if reason := _obstacle(module, kind):
            if kind is nn.TransformerEncoder:
                module.use_nested_tensor = False
                reason += "; it does not nest sequences any more, so that their padding is not 0 in its output"
            self.left[name] = reason
            return module
        self.replaced.append(name)
        self._results[id(module)] = _SPLIT[kind](module)
        return self._results[id(module)]


def _obstacle(module: nn.Module, kind: type[nn.Module]) -> str:
    """Return "" or why this module cannot be replaced."""
    parts = [module, module.out_proj] if kind is nn.MultiheadAttention else [module]
    if any(map(parametrize.is_parametrized, parts)):
        return "it is parametrized"
    if type(module) is not kind:
        return f"its class {type(module).__name__} may compute something else than its base does"
    if any(getattr(part, hooks, None) for part in parts for hooks in HOOKS):
        return "it has hooks"
    if any("forward" in part.__dict__ for part in parts):
        return "its forward has been replaced"
    if kind is nn.MultiheadAttention:
        if type(module.out_proj) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return f"its out_proj is a {type(module.out_proj).__name__}"
        for name, tensor in module.named_parameters():
            if type(tensor) is not nn.Parameter or tensor.layout != torch.strided:
                return f"its {name} is a {type(tensor).__name__} of layout {tensor.layout}"
    return ""


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a layer with copies of weight [out, in] and bias [out]."""
    layer = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer

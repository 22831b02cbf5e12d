"""How to call each op that autocast treats: arguments by the op's name, for test_autocast_ops.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Inputs:
    """Makes the floating-point inputs of one call, whose dtypes take turns; integers come beside it."""

    def __init__(self, device: str, *dtypes: torch.dtype) -> None:
        self.device, self.dtypes, self.made = device, dtypes, 0

    def _typed(self, tensor: torch.Tensor) -> torch.Tensor:
        self.made += 1
        return tensor.to(self.dtypes[(self.made - 1) % len(self.dtypes)])

    def __call__(self, *shape: int) -> torch.Tensor:
        """Between 0.2 and 0.8: inside the domain of acos, log, erfinv and of probabilities."""
        return self._typed(torch.rand(shape, device=self.device) * 0.6 + 0.2)

    def definite(self) -> torch.Tensor:
        """A symmetric positive definite 4x4 matrix."""
        return self._typed(torch.eye(4, device=self.device) + 0.1)

    def zeros(self, *shape: int) -> torch.Tensor:
        """Class indices and positions."""
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def matrix(t: Inputs) -> tuple[Any, ...]:
    return (t(4, 4),)


def definite(t: Inputs) -> tuple[Any, ...]:
    return (t.definite(),)


def pair(t: Inputs) -> tuple[Any, ...]:
    return t(4, 4), t(4, 4)


def vectors(t: Inputs) -> tuple[Any, ...]:
    return t(4), t(4)


def convolution(dimensions: int, *rest: Any, transposed: bool = False) -> Callable[[Inputs], tuple[Any, ...]]:
    channels = (2, 3) if transposed else (3, 2)
    return lambda t: (t(1, 2, *(5,) * dimensions), t(*channels, *(3,) * dimensions), *rest)


def cell(gates: int, states: int = 1) -> Callable[[Inputs], tuple[Any, ...]]:
    """A recurrent cell of width 4; an LSTM's states are a list."""

    def make(t: Inputs) -> tuple[Any, ...]:
        state = [t(2, 4), t(2, 4)] if states == 2 else t(2, 4)
        return t(2, 4), state, t(gates * 4, 4), t(gates * 4, 4), t(gates * 4), t(gates * 4)

    return make


def image(dimensions: int, *rest: Any) -> Callable[[Inputs], tuple[Any, ...]]:
    return lambda t: (t(1, 2, *(6,) * dimensions), *rest)


def cudnn_rnn(t: Inputs) -> tuple[Any, ...]:
    # mode 2 is LSTM: one layer of width 4, weights and biases of input and state
    weights = [t(16, 4), t(16, 4), t(16), t(16)]
    return (t(3, 2, 4), weights, 4, None, t(1, 2, 4), t(1, 2, 4), 2, 4, 0, 1, False, 0.0, True, False, [], None)


def onednn_rnn(t: Inputs) -> tuple[Any, ...]:
    # reverse, batch sizes, mode (2 is LSTM), width, layers, has biases, bidirectional, batch first, train
    rest = (False, [], 2, 4, 1, True, False, False, False)
    return t(3, 2, 4), t(16, 4), t(16, 4), t(16), t(16), t(1, 2, 4), t(1, 2, 4), *rest


def attention(t: Inputs) -> tuple[Any, ...]:
    return t(1, 2, 8, 8), t(1, 2, 8, 8), t(1, 2, 8, 8)


def native_attention(t: Inputs) -> tuple[Any, ...]:
    return t(2, 3, 8), t(2, 3, 8), t(2, 3, 8), 8, 4, t(24, 8), t(24), t(8, 8), t(8)


def connectionist(t: Inputs, lengths: Callable[[list[int]], Any]) -> tuple[Any, ...]:
    targets = torch.ones(2, 2, dtype=torch.int64, device=t.device)
    return t(5, 2, 4), targets, lengths([5, 5]), lengths([2, 2])


def lu(t: Inputs) -> tuple[Any, ...]:
    return t(4, 1), t.definite(), torch.arange(1, 5, dtype=torch.int32, device=t.device)


ELEMENTWISE = "acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh softplus tan prod sum trace"
DEFINITE = (
    "cholesky cholesky_inverse inverse pinverse linalg_cholesky linalg_cholesky_ex linalg_cond linalg_eig linalg_eigh "
    "linalg_eigvals linalg_eigvalsh linalg_inv linalg_inv_ex linalg_matrix_sqrth linalg_qr "
    "linalg_svd linalg_svdvals geqrf svd qr _lu_with_info nuclear_norm linalg_matrix_norm.str_ord"
)
LOSSES = "binary_cross_entropy binary_cross_entropy_with_logits huber_loss kl_div l1_loss mse_loss smooth_l1_loss"
PAIRS = (
    "atan2 cdist cosine_similarity dist hinge_embedding_loss linalg_vecdot linear matmul mm polar pow.Tensor_Tensor "
    "soft_margin_loss"
)
FOURIER = "fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_rfft fft_rfft2 fft_rfftn"

# Arguments that the schema's defaults do not complete.
CASES: dict[str, Callable[[Inputs], tuple[Any, ...]]] = {
    **dict.fromkeys(ELEMENTWISE.split(), matrix),
    **dict.fromkeys(DEFINITE.split(), definite),
    **dict.fromkeys(LOSSES.split(), pair),
    **dict.fromkeys(FOURIER.split(), matrix),
    **dict.fromkeys(PAIRS.split(), pair),
    **dict.fromkeys(("dot", "vdot"), vectors),
    # products
    "_addmm_activation": lambda t: (t(4), t(4, 4), t(4, 4)),
    "addmm": lambda t: (t(4, 4), t(4, 4), t(4, 4)),
    "addmv": lambda t: (t(4), t(4, 4), t(4)),
    "addr": lambda t: (t(4, 4), t(4), t(4)),
    "addbmm": lambda t: (t(4, 4), t(2, 4, 4), t(2, 4, 4)),
    "baddbmm": lambda t: (t(2, 4, 4), t(2, 4, 4), t(2, 4, 4)),
    "bmm": lambda t: (t(2, 4, 4), t(2, 4, 4)),
    "mv": lambda t: (t(4, 4), t(4)),
    "einsum": lambda t: ("ij,jk->ik", [t(4, 4), t(4, 4)]),
    "chain_matmul": lambda t: ([t(4, 4), t(4, 4), t(4, 4)],),
    "linalg_multi_dot": lambda t: ([t(4, 4), t(4, 4), t(4, 4)],),
    "prelu": lambda t: (t(4, 4), t(1)),
    "bilinear": lambda t: (t(2, 4), t(2, 4), t(3, 4, 4), t(3)),
    "tensordot": lambda t: (t(4, 4), t(4, 4), [1], [0]),
    # convolutions, cells and attention
    "conv1d": convolution(1),
    "conv2d": convolution(2),
    "conv3d": convolution(3),
    "conv1d.padding": convolution(1, None, [1], "valid"),
    "conv2d.padding": convolution(2, None, [1], "valid"),
    "conv3d.padding": convolution(3, None, [1], "valid"),
    "conv_transpose1d": convolution(1, transposed=True),
    "conv_transpose2d.input": convolution(2, transposed=True),
    "conv_transpose3d.input": convolution(3, transposed=True),
    "conv_tbc": lambda t: (t(5, 1, 2), t(3, 2, 3), t(3)),
    "convolution": convolution(2, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    "_convolution": convolution(2, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, True, True, True),
    "_convolution.deprecated": convolution(2, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, True, True),
    "cudnn_convolution": convolution(2, [0, 0], [1, 1], [1, 1], 1, False, True, True),
    "cudnn_convolution_transpose": convolution(
        2, [0, 0], [0, 0], [1, 1], [1, 1], 1, False, True, True, transposed=True
    ),
    "lstm_cell": cell(4, states=2),
    "gru_cell": cell(3),
    "rnn_relu_cell": cell(1),
    "rnn_tanh_cell": cell(1),
    "_thnn_fused_lstm_cell": lambda t: (t(2, 16), t(2, 16), t(2, 4)),
    "_thnn_fused_gru_cell": lambda t: (t(2, 12), t(2, 12), t(2, 4)),
    "_cudnn_rnn": cudnn_rnn,
    "mkldnn_rnn_layer": onednn_rnn,
    "scaled_dot_product_attention": attention,
    "_scaled_dot_product_flash_attention": attention,
    "_native_multi_head_attention": native_attention,
    # norms and sums
    "layer_norm": lambda t: (t(4, 4), [4]),
    "native_layer_norm": lambda t: (t(4, 4), [4], None, None, 1e-5),
    "rms_norm": lambda t: (t(4, 4), [4]),
    "group_norm": lambda t: (t(2, 4, 4), 2),
    "norm.Scalar": matrix,
    "norm.ScalarOpt_dim": lambda t: (t(4, 4), 2, [1]),
    "frobenius_norm.dim": lambda t: (t(4, 4), [1]),
    "nuclear_norm.dim": lambda t: (t.definite(), [0, 1]),
    "linalg_vector_norm": matrix,
    "linalg_matrix_norm": lambda t: (t(4, 4), 1),
    "renorm": lambda t: (t(4, 4), 2, 0, 1.0),
    "softmax.int": lambda t: (t(4, 4), 1),
    "log_softmax.int": lambda t: (t(4, 4), 1),
    "logsumexp": lambda t: (t(4, 4), [1]),
    "cumprod": lambda t: (t(4, 4), 1),
    "cumsum": lambda t: (t(4, 4), 1),
    "prod.dim_int": lambda t: (t(4, 4), 1),
    "sum.dim_IntList": lambda t: (t(4, 4), [1]),
    "quantile": lambda t: (t(4, 4), t(2)),
    "nanquantile": lambda t: (t(4, 4), t(2)),
    "quantile.scalar": lambda t: (t(4, 4), 0.5),
    "nanquantile.scalar": lambda t: (t(4, 4), 0.5),
    "pow.Scalar": lambda t: (2.0, t(4, 4)),
    "pow.Tensor_Scalar": lambda t: (t(4, 4), 1.5),
    "pdist": matrix,
    # losses
    "cross_entropy_loss": lambda t: (t(2, 4), t.zeros(2)),
    "nll_loss": lambda t: (t(2, 4), t.zeros(2)),
    "nll_loss2d": lambda t: (t(2, 4, 3, 3), t.zeros(2, 3, 3)),
    "multi_margin_loss": lambda t: (t(2, 4), t.zeros(2)),
    "multilabel_margin_loss": lambda t: (t(2, 4), t.zeros(2, 4)),
    "multilabel_margin_loss_forward": lambda t: (t(2, 4), t.zeros(2, 4), 1),
    "poisson_nll_loss": lambda t: (t(4, 4), t(4, 4), True, False, 1e-8, 1),
    "cosine_embedding_loss": lambda t: (t(4, 4), t(4, 4), t.zeros(4) + 1),
    "margin_ranking_loss": lambda t: (t(4), t(4), t(4)),
    "triplet_margin_loss": lambda t: (t(4, 4), t(4, 4), t(4, 4)),
    "ctc_loss.IntList": lambda t: connectionist(t, list),
    "ctc_loss.Tensor": lambda t: connectionist(t, lambda lengths: torch.tensor(lengths, device=t.device)),
    # promotion
    "addcdiv": lambda t: (t(4), t(4), t(4)),
    "addcmul": lambda t: (t(4), t(4), t(4)),
    "cat": lambda t: ([t(4), t(4)],),
    "stack": lambda t: ([t(4), t(4)],),
    "cross": lambda t: (t(4, 3), t(4, 3), 1),
    "index_copy": lambda t: (t(4), 0, t.zeros(1), t(1)),
    "index_put": lambda t: (t(4), [t.zeros(1)], t(1)),
    "scatter_add": lambda t: (t(4), 0, t.zeros(1), t(1)),
    # images
    "grid_sampler": lambda t: (t(1, 2, 6, 6), t(1, 3, 3, 2), 0, 0, False),
    "grid_sampler_2d": lambda t: (t(1, 2, 6, 6), t(1, 3, 3, 2), 0, 0, False),
    "_grid_sampler_2d_cpu_fallback": lambda t: (t(1, 2, 6, 6), t(1, 3, 3, 2), 0, 0, False),
    "grid_sampler_3d": lambda t: (t(1, 2, 6, 6, 6), t(1, 3, 3, 3, 3), 0, 0, False),
    "avg_pool3d": image(3, [2, 2, 2]),
    "max_pool3d": image(3, [2, 2, 2]),
    "adaptive_avg_pool3d": image(3, [2, 2, 2]),
    "adaptive_max_pool3d": image(3, [2, 2, 2]),
    "fractional_max_pool2d": lambda t: (t(1, 2, 6, 6), [2, 2], [3, 3], t(1, 2, 2)),
    "fractional_max_pool3d": lambda t: (t(1, 2, 6, 6, 6), [2, 2, 2], [3, 3, 3], t(1, 2, 3)),
    "max_unpool2d": lambda t: (t(1, 1, 2, 2), t.zeros(1, 1, 2, 2), [4, 4]),
    "max_unpool3d": lambda t: (t(1, 1, 2, 2, 2), t.zeros(1, 1, 2, 2, 2), [4, 4, 4], [2, 2, 2], [0, 0, 0]),
    "reflection_pad1d": lambda t: (t(1, 2, 6), [1, 1]),
    "reflection_pad2d": image(2, [1] * 4),
    "replication_pad1d": lambda t: (t(1, 2, 6), [1, 1]),
    "replication_pad2d": image(2, [1] * 4),
    "replication_pad3d": image(3, [1] * 6),
    **{f"upsample_{kind}1d": image(1, [12], *rest) for kind, rest in (("nearest", ()), ("linear", (False,)))},
    **{f"upsample_{kind}2d": image(2, [12, 12], False) for kind in ("bilinear", "bicubic")},
    **{f"_upsample_{kind}2d_aa": image(2, [12, 12], False) for kind in ("bilinear", "bicubic")},
    "upsample_trilinear3d": image(3, [12, 12, 12], False),
    "upsample_nearest2d": image(2, [12, 12]),
    "upsample_nearest3d": image(3, [12, 12, 12]),
    "_upsample_nearest_exact1d": image(1, [12]),
    "_upsample_nearest_exact2d": image(2, [12, 12]),
    "_upsample_nearest_exact3d": image(3, [12, 12, 12]),
    # linear algebra and signals
    "cholesky_solve": lambda t: (t(4, 1), t.definite()),
    "lu_solve": lu,
    "linalg_solve": lambda t: (t.definite(), t(4)),
    "linalg_lstsq": lambda t: (t.definite(), t(4, 1)),
    "linalg_householder_product": lambda t: (t(4, 4), t(4)),
    "orgqr": lambda t: (t(4, 4), t(4)),
    "ormqr": lambda t: (t(4, 4), t(4), t(4, 4)),
    "linalg_tensorinv": lambda t: (t.definite(), 1),
    "linalg_tensorsolve": lambda t: (t.definite(), t(4)),
    "triangular_solve": lambda t: (t(4, 1), t.definite()),
    "linalg_cond.p_str": lambda t: (t.definite(), "fro"),
    "linalg_matrix_rank": lambda t: (t.definite(), 0.5),
    "linalg_matrix_rank.atol_rtol_float": definite,
    "linalg_matrix_rank.atol_rtol_tensor": definite,
    "linalg_matrix_rank.tol_tensor": lambda t: (t.definite(), t()),
    "view_as_complex": lambda t: (t(4, 2),),
    "fft_hfft": matrix,
    "fft_irfft": matrix,
    "fft_irfft2": matrix,
    "fft_irfftn": matrix,
    "stft": lambda t: (t(16), 4, None, None, None, False, True, True),
    "stft.center": lambda t: (t(16), 4, None, None, None, True, "reflect", False, True, True),
    "fake_quantize_per_tensor_affine": lambda t: (t(4), 0.1, 0, 0, 255),
}

// The list of counted operations. Contract: operation_list.h.
#include "operation_list.h"

#include <algorithm>
#include <vector>

namespace halfstep::torch_ops {
namespace {

// Names of ATen without overload. Where `x` is here, x_ (in place) is counted as it, and so is what begins with
// `x_backward`, under its own name. Functions that are made of others (linear, conv2d, layer_norm) are here too: what
// they are made of depends on device and torch version, and of a nest the innermost counts. Not here is what may turn
// out to do nothing (dropout, einsum, sum_to_size), since it would count then.
constexpr std::string_view kAten[] = {
    // Matrix products.
    "_addmm_activation", "_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_scaled_mm", "_scaled_mm_v2",
    "_trilinear", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bilinear", "bmm", "dot", "ger", "inner", "kron",
    "linalg_matmul", "linalg_vecdot", "linear", "matmul", "mkldnn_linear", "mm", "mv", "outer", "tensordot", "vdot",
    // Convolutions.
    "_conv_depthwise2d", "_convolution", "_mps_convolution", "_nnpack_spatial_convolution", "_slow_conv2d",
    "_slow_conv2d_forward", "conv1d", "conv2d", "conv3d", "conv_depthwise3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "convolution", "convolution_overrideable", "cudnn_convolution",
    "cudnn_convolution_add_relu", "cudnn_convolution_relu", "cudnn_convolution_transpose", "miopen_convolution",
    "miopen_convolution_add_relu", "miopen_convolution_relu", "miopen_convolution_transpose",
    "miopen_depthwise_convolution", "mkldnn_convolution", "slow_conv3d", "slow_conv3d_forward", "slow_conv_dilated2d",
    "slow_conv_dilated3d", "slow_conv_transpose2d", "slow_conv_transpose3d", "thnn_conv2d",
    // Attention.
    "_efficient_attention", "_efficient_attention_forward", "_flash_attention", "_flash_attention_forward",
    "_native_multi_head_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable",
    "_transformer_encoder_layer_fwd", "scaled_dot_product_attention",
    // Recurrent layers.
    "_cudnn_rnn", "_thnn_differentiable_gru_cell", "_thnn_differentiable_lstm_cell", "_thnn_fused_gru_cell",
    "_thnn_fused_lstm_cell", "gru", "gru_cell", "lstm", "lstm_cell", "miopen_rnn", "mkldnn_rnn_layer", "rnn_relu",
    "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell",
    // Norms.
    "_batch_norm_impl_index", "_batch_norm_no_update", "_batch_norm_with_update", "_batch_norm_with_update_functional",
    "_fused_rms_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "_weight_norm", "_weight_norm_differentiable", "_weight_norm_interface",
    "batch_norm", "batch_norm_elemt", "batch_norm_gather_stats", "batch_norm_gather_stats_with_counts",
    "batch_norm_stats", "batch_norm_update_stats", "cudnn_batch_norm", "group_norm", "instance_norm", "layer_norm",
    "miopen_batch_norm", "native_batch_norm", "native_group_norm", "native_layer_norm", "rms_norm",
    // Softmax.
    "_log_softmax", "_masked_softmax", "_safe_softmax", "_softmax", "log_softmax", "softmax",
    // Losses.
    "_ctc_loss", "_cudnn_ctc_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss",
    "cross_entropy_loss", "ctc_loss", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "margin_ranking_loss",
    "mse_loss", "multi_margin_loss", "multilabel_margin_loss", "multilabel_margin_loss_forward", "nll_loss",
    "nll_loss2d", "nll_loss2d_forward", "nll_loss_forward", "nll_loss_nd", "poisson_nll_loss", "smooth_l1_loss",
    "soft_margin_loss", "triplet_margin_loss",
    // Activations.
    "_prelu_kernel", "celu", "elu", "gelu", "glu", "glu_jvp", "hardshrink", "hardsigmoid", "hardswish", "hardtanh",
    "infinitely_differentiable_gelu", "leaky_relu", "log_sigmoid", "log_sigmoid_forward", "mish", "prelu", "relu",
    "relu6", "rrelu_with_noise", "rrelu_with_noise_functional", "selu", "sigmoid", "silu", "softplus", "softshrink",
    "tanh", "threshold",
    // Elementwise arithmetic.
    "_add_relu", "_masked_scale", "abs", "absolute", "acos", "acosh", "add", "addcdiv", "addcmul", "arccos", "arccosh",
    "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "clamp",
    "clamp_max", "clamp_min", "clip", "copysign", "cos", "cosh", "deg2rad", "digamma", "div", "divide", "erf", "erfc",
    "erfinv", "exp", "exp2", "expm1", "fix", "float_power", "floor", "floor_divide", "fmax", "fmin", "fmod", "frac",
    "hypot", "i0", "igamma", "igammac", "ldexp", "lerp", "lgamma", "log", "log10", "log1p", "log2", "logaddexp",
    "logaddexp2", "logit", "maximum", "minimum", "mul", "multiply", "mvlgamma", "nan_to_num", "native_dropout", "neg",
    "negative", "polygamma", "pow", "rad2deg", "reciprocal", "remainder", "round", "rsqrt", "rsub", "sgn", "sign",
    "sin", "sinc", "sinh", "special_entr", "special_erfcx", "special_expit", "special_i0e", "special_i1", "special_i1e",
    "special_log_ndtr", "special_ndtr", "special_ndtri", "special_xlog1py", "special_xlogy", "special_zeta", "sqrt",
    "square", "sub", "subtract", "tan", "true_divide", "trunc", "xlogy",
    // Reductions, scans and distances.
    "_cdist", "_cdist_forward", "_euclidean_dist", "_logcumsumexp", "_pdist", "_pdist_forward", "amax", "amin",
    "aminmax", "cdist", "cosine_similarity", "cumprod", "cumsum", "dist", "frobenius_norm", "linalg_matrix_norm",
    "linalg_norm", "linalg_vector_norm", "logcumsumexp", "logsumexp", "max", "mean", "min", "nanmean", "nansum",
    "native_norm", "norm", "norm_except_dim", "nuclear_norm", "pairwise_distance", "prod", "renorm", "std", "std_mean",
    "sum", "var", "var_mean",
    // Pooling and interpolation.
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "affine_grid_generator", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cudnn_grid_sampler",
    "fractional_max_pool2d", "fractional_max_pool3d", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d",
    "max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices", "max_pool3d",
    "max_pool3d_with_indices", "max_unpool2d", "max_unpool3d", "mkldnn_max_pool2d", "mkldnn_max_pool3d",
    "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d",
    // Embeddings.
    "_embedding_bag", "_embedding_bag_dense", "_embedding_bag_forward_only", "_embedding_bag_per_sample_weights",
    "_embedding_bag_sparse", "embedding", "embedding_bag", "embedding_dense", "embedding_sparse"};

constexpr std::string_view kHalfstep[] = {
    "cross_entropy", "cross_entropy_forward", "group_norm", "layer_norm", "norm", "norm_forward", "rms_norm",
};

// Both sorted together, with their namespaces.
std::vector<std::string> sorted_names() {
  std::vector<std::string> names;
  for (const std::string_view name : kAten) names.push_back("aten::" + std::string(name));
  for (const std::string_view name : kHalfstep) names.push_back("halfstep::" + std::string(name));
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

std::string listed_operation(std::string_view name) {
  static const std::vector<std::string> names = sorted_names();
  if (name.ends_with('_')) name.remove_suffix(1);
  const std::string_view forward = name.substr(0, name.find("_backward"));
  return std::binary_search(names.begin(), names.end(), forward) ? std::string(name) : std::string();
}

}  // namespace halfstep::torch_ops

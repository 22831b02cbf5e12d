// The model of tests/data/encoder_*.json, which tests/python/test_policy.py writes in Python.
#pragma once

#include <torch/torch.h>

namespace halfstep::test {

struct AttentionImpl : torch::nn::Module {
  AttentionImpl()
      : query(register_module("query", torch::nn::Linear(8, 8))),
        key(register_module("key", torch::nn::Linear(8, 8))),
        value(register_module("value", torch::nn::Linear(8, 8))),
        out(register_module("out", torch::nn::Linear(torch::nn::LinearOptions(8, 8).bias(false)))) {}
  torch::nn::Linear query, key, value, out;
};
TORCH_MODULE(Attention);

struct BlockImpl : torch::nn::Module {
  BlockImpl()
      : attention(register_module("attention", Attention())),
        norm(register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})))),
        mlp(register_module("mlp", torch::nn::Sequential(torch::nn::Linear(8, 16), torch::nn::GELU(),
                                                         torch::nn::Dropout(0.1), torch::nn::Linear(16, 8)))) {}
  Attention attention;
  torch::nn::LayerNorm norm;
  torch::nn::Sequential mlp;
};
TORCH_MODULE(Block);

// Parameters of its own, containers without, every kind of layer that has another base class, and a shared module.
struct EncoderImpl : torch::nn::Module {
  EncoderImpl() {
    register_parameter("position", torch::zeros({4, 8}));
    embedding = register_module("embedding", torch::nn::Embedding(16, 8));
    convolution = register_module("convolution", torch::nn::Conv1d(torch::nn::Conv1dOptions(8, 8, 1)));
    batch_norm = register_module("batch_norm", torch::nn::BatchNorm1d(8));
    recurrent = register_module("recurrent", torch::nn::LSTM(8, 8));
    blocks = register_module("blocks", torch::nn::ModuleList(Block(), Block()));
    tied = register_module("tied", blocks->ptr<BlockImpl>(1)->attention->value);
    head = register_module("head", torch::nn::Linear(8, 4));
  }
  torch::nn::Embedding embedding = nullptr;
  torch::nn::Conv1d convolution = nullptr;
  torch::nn::BatchNorm1d batch_norm = nullptr;
  torch::nn::LSTM recurrent = nullptr;
  torch::nn::ModuleList blocks = nullptr;
  torch::nn::Linear tied = nullptr;
  torch::nn::Linear head = nullptr;
};
TORCH_MODULE(Encoder);

}  // namespace halfstep::test

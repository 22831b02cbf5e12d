// Times each tile of the Hopper int8 product over many sizes, for bench/int8_tiles.py, which fits the table of
// csrc/cuda/int8_hopper.cu to them. Prints "rows terms channels tile microseconds", a tile of -1 being what the table
// takes. With a zero point, a bias and bfloat16 output; replayed from a CUDA graph.
//
// "halfstep_int8_tiles layers" times the products of transformers instead, each with its own epilogue: "rows terms
// channels epilogue", and the microseconds of each tile; the one that the table takes is marked.
//
// "halfstep_int8_tiles conv" times convolutions: "batch size channels out kernel stride", the microseconds of
// int8_conv2d, and those of each tile that takes them.
#include <algorithm>
#include <cstdio>
#include <random>
#include <string_view>
#include <type_traits>
#include <vector>

#include "int8_tiles.h"
#include "try.h"

namespace {

using halfstep::Int8Epilogue;
using halfstep::Int8LinearShape;
using halfstep::cuda::Int8Tile;

// The same value everywhere would be multiplied faster than real data is: bits that stay take no power.
template <class T>
T* device_memory(std::size_t count) {
  std::vector<T> values(std::min(count, std::size_t{1} << 24));
  std::mt19937 random;
  for (T& value : values) {
    if constexpr (std::is_same_v<T, float>) {
      value = 1e-3F * static_cast<float>(random() % 16);
    } else if constexpr (sizeof(T) == 2) {
      value = static_cast<T>(0x3C00 + random() % 0x400);  // halves of either kind between 0.007 and 2
    } else {
      value = static_cast<T>(random());
    }
  }
  void* memory = nullptr;
  HS_CUDA_TRY(cudaMalloc(&memory, count * sizeof(T)));
  for (std::size_t i = 0; i < count; i += values.size())
    HS_CUDA_TRY(cudaMemcpy(static_cast<T*>(memory) + i, values.data(), std::min(values.size(), count - i) * sizeof(T),
                           cudaMemcpyHostToDevice));
  return static_cast<T*>(memory);
}

template <class Run>
double microseconds(cudaStream_t stream, const Run& run) {
  constexpr int kCalls = 20;
  run();
  HS_CUDA_TRY(cudaStreamSynchronize(stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t calls = nullptr;
  HS_CUDA_TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kCalls; ++i) run();
  HS_CUDA_TRY(cudaStreamEndCapture(stream, &graph));
  HS_CUDA_TRY(cudaGraphInstantiate(&calls, graph, 0));
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  HS_CUDA_TRY(cudaEventCreate(&begin));
  HS_CUDA_TRY(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < 6; ++round) {
    HS_CUDA_TRY(cudaEventRecord(begin, stream));
    HS_CUDA_TRY(cudaGraphLaunch(calls, stream));
    HS_CUDA_TRY(cudaEventRecord(end, stream));
    HS_CUDA_TRY(cudaEventSynchronize(end));
    float milliseconds = 0.0F;
    HS_CUDA_TRY(cudaEventElapsedTime(&milliseconds, begin, end));
    if (round > 0) times.push_back(milliseconds);
  }
  HS_CUDA_TRY(cudaGraphExecDestroy(calls));
  HS_CUDA_TRY(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return 1e3 * static_cast<double>(times[times.size() / 2]) / kCalls;
}

struct Memory {
  std::int8_t* input = device_memory<std::int8_t>(64 * 112 * 112 * 128);
  std::int8_t* weight = device_memory<std::int8_t>(8192 * 8192);
  float* scales = device_memory<float>(8192);
  float* bias = device_memory<float>(8192);
  std::uint16_t* out = device_memory<std::uint16_t>(16384 * 8192);
  std::uint16_t* residual = device_memory<std::uint16_t>(16384 * 1024);
  std::int32_t* weight_sums = device_memory<std::int32_t>(8192);

  Int8Epilogue epilogue() const {
    Int8Epilogue epilogue{.input = {.scale = 0.01F}, .weight_scales = scales, .bias = bias};
    epilogue.out = {out, halfstep::Int8OutKind::kFloat, halfstep::DType::kBFloat16, {}};
    return epilogue;
  }
};

void run_tile(Int8Tile tile, const Int8LinearShape& shape, const Memory& memory, const Int8Epilogue& epilogue,
              cudaStream_t stream) {
  if (!halfstep::cuda::int8_linear_by_tile(tile, shape, memory.input, memory.weight, memory.weight_sums, epilogue,
                                           {stream}))
    throw halfstep::InvalidArgument("this GPU or this library has no Hopper product");
}

void time_products(const Memory& memory, cudaStream_t stream) {
  Int8Epilogue epilogue = memory.epilogue();
  epilogue.input.zero_point = 5;
  for (const std::int64_t rows : {33, 64, 128, 197, 256, 512, 1024, 2048, 4096, 8192, 12608, 16384})
    for (const std::int64_t terms : {256, 768, 1024, 3072, 4096})
      for (const std::int64_t channels : {256, 768, 1024, 3072, 4096}) {
        const Int8LinearShape shape{rows, terms, channels};
        for (int tile = -1; tile < halfstep::cuda::kInt8Tiles; ++tile) {
          const Int8Tile chosen = tile < 0 ? halfstep::cuda::int8_tile_for(shape, 132) : static_cast<Int8Tile>(tile);
          std::printf("%lld %lld %lld %d %.3f\n", static_cast<long long>(rows), static_cast<long long>(terms),
                      static_cast<long long>(channels), tile,
                      microseconds(stream, [&] { run_tile(chosen, shape, memory, epilogue, stream); }));
        }
      }
}

// Those of a layer of BERT-base and of ViT-B, in the order in which they run.
void time_layers(const Memory& memory, cudaStream_t stream) {
  struct Layer {
    const char* name;
    std::int64_t terms, channels;
    bool shifted = false;
    bool gelu = false;  // to int8
    bool residual = false;
  };
  constexpr Layer kLayers[] = {
      {.name = "bias", .terms = 768, .channels = 2304},
      {.name = "zero point", .terms = 768, .channels = 2304, .shifted = true},
      {.name = "residual", .terms = 768, .channels = 768, .residual = true},
      {.name = "zero point, gelu, int8", .terms = 768, .channels = 3072, .shifted = true, .gelu = true},
      {.name = "zero point, residual", .terms = 3072, .channels = 768, .shifted = true, .residual = true}};
  for (const std::int64_t rows : {197, 1024, 8192, 12608})
    for (const Layer& layer : kLayers) {
      const Int8LinearShape shape{rows, layer.terms, layer.channels};
      Int8Epilogue epilogue = memory.epilogue();
      if (layer.shifted) epilogue.input.zero_point = 5;
      if (layer.residual) {
        epilogue.residual = memory.residual;
        epilogue.residual_dtype = halfstep::DType::kBFloat16;
      }
      if (layer.gelu) {
        epilogue.activation = halfstep::Activation::kGelu;
        epilogue.out = {memory.out, halfstep::Int8OutKind::kInt8, halfstep::DType::kFloat32, {0.02F, -100}};
      }
      std::printf("%lld %lld %lld %s:", static_cast<long long>(rows), static_cast<long long>(layer.terms),
                  static_cast<long long>(layer.channels), layer.name);
      const Int8Tile chosen = halfstep::cuda::int8_tile_for(shape, 132);
      for (int i = 0; i < halfstep::cuda::kInt8Tiles; ++i) {
        const auto tile = static_cast<Int8Tile>(i);
        const double time = microseconds(stream, [&] { run_tile(tile, shape, memory, epilogue, stream); });
        std::printf(" %.2f%s", time, tile == chosen ? "*" : "");
      }
      std::printf("\n");
    }
}

// Those of ResNet-50 and of small images, square, padded by half of the kernel.
void time_convolutions(const Memory& memory, cudaStream_t stream) {
  struct Sizes {
    std::int64_t batch, size, channels, out, kernel, stride;
  };
  constexpr Sizes kSizes[] = {{64, 56, 64, 64, 3, 1},    {64, 56, 128, 128, 3, 2}, {64, 28, 128, 128, 3, 1},
                              {64, 28, 256, 256, 3, 2},  {64, 14, 256, 256, 3, 1}, {64, 14, 512, 512, 3, 2},
                              {64, 7, 512, 512, 3, 1},   {64, 56, 256, 512, 1, 2}, {64, 14, 1024, 2048, 1, 2},
                              {1, 56, 64, 64, 3, 1},     {1, 14, 256, 256, 3, 1},  {16, 32, 32, 32, 3, 1},
                              {256, 16, 128, 128, 5, 1}, {8, 112, 16, 32, 3, 1}};
  for (const Sizes& s : kSizes) {
    const std::int64_t out = (s.size + 2 * (s.kernel / 2) - s.kernel) / s.stride + 1;
    const halfstep::Int8ConvShape shape{.batch = s.batch,
                                        .height = s.size,
                                        .width = s.size,
                                        .channels = s.channels,
                                        .out_height = out,
                                        .out_width = out,
                                        .out_channels = s.out,
                                        .kernel_height = s.kernel,
                                        .kernel_width = s.kernel,
                                        .stride_height = s.stride,
                                        .stride_width = s.stride,
                                        .pad_height = s.kernel / 2,
                                        .pad_width = s.kernel / 2};
    const double plain = microseconds(stream, [&] {
      halfstep::cuda::int8_conv2d(shape, memory.input, memory.weight, nullptr, memory.epilogue(), {stream});
    });
    std::printf("%lld %lld %lld %lld %lld %lld int8_conv2d %.2f", static_cast<long long>(s.batch),
                static_cast<long long>(s.size), static_cast<long long>(s.channels), static_cast<long long>(s.out),
                static_cast<long long>(s.kernel), static_cast<long long>(s.stride), plain);
    for (int tile = 0; tile < halfstep::cuda::kInt8Tiles; ++tile) {
      bool ran = false;
      const auto run = [&] {
        ran = halfstep::cuda::int8_conv2d_by_tile(static_cast<Int8Tile>(tile), shape, memory.input, memory.weight,
                                                  nullptr, memory.epilogue(), {stream});
      };
      run();
      if (ran) std::printf(" tile %d %.2f", tile, microseconds(stream, run));
    }
    std::printf("\n");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const Memory memory;
  cudaStream_t stream = nullptr;
  HS_CUDA_TRY(cudaStreamCreate(&stream));
  if (count > 1 && std::string_view(arguments[1]) == "conv") {
    time_convolutions(memory, stream);
  } else if (count > 1 && std::string_view(arguments[1]) == "layers") {
    time_layers(memory, stream);
  } else {
    time_products(memory, stream);
  }
  return 0;
}

// Times each tile of the Hopper int8 product over many sizes, for bench/int8_tiles.py, which fits the table of
// csrc/cuda/int8_hopper.cu to them. Prints "rows terms channels tile microseconds", a tile of -1 being what the table
// takes. Bias and bfloat16 output; replayed from a CUDA graph.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "int8_tiles.h"
#include "try.h"

namespace {

using halfstep::Int8Epilogue;
using halfstep::Int8LinearShape;
using halfstep::cuda::Int8Tile;

template <class T>
T* device_memory(std::size_t count) {
  void* memory = nullptr;
  HS_CUDA_TRY(cudaMalloc(&memory, count * sizeof(T)));
  HS_CUDA_TRY(cudaMemset(memory, 1, count * sizeof(T)));
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

}  // namespace

int main() {
  constexpr std::int64_t kMost = 8192;
  auto* const input = device_memory<std::int8_t>(16384 * 4096);
  auto* const weight = device_memory<std::int8_t>(kMost * kMost);
  auto* const scales = device_memory<float>(kMost);
  auto* const bias = device_memory<float>(kMost);
  auto* const out = device_memory<std::uint16_t>(16384 * kMost);
  cudaStream_t stream = nullptr;
  HS_CUDA_TRY(cudaStreamCreate(&stream));
  Int8Epilogue epilogue{.input = {.scale = 0.01F}, .weight_scales = scales, .bias = bias};
  epilogue.out = {out, halfstep::Int8OutKind::kFloat, halfstep::DType::kBFloat16, {}};
  for (const std::int64_t rows : {33, 64, 128, 197, 256, 512, 1024, 2048, 4096, 8192, 12608, 16384})
    for (const std::int64_t terms : {256, 768, 1024, 3072, 4096})
      for (const std::int64_t channels : {256, 768, 1024, 3072, 4096}) {
        const Int8LinearShape shape{rows, terms, channels};
        const auto run = [&](Int8Tile tile) {
          if (!halfstep::cuda::int8_linear_by_tile(tile, shape, input, weight, nullptr, epilogue, {stream}))
            throw halfstep::InvalidArgument("this GPU or this library has no Hopper product");
        };
        for (int tile = -1; tile < halfstep::cuda::kInt8Tiles; ++tile) {
          const Int8Tile chosen = tile < 0 ? halfstep::cuda::int8_tile_for(shape, 132) : static_cast<Int8Tile>(tile);
          std::printf("%lld %lld %lld %d %.3f\n", static_cast<long long>(rows), static_cast<long long>(terms),
                      static_cast<long long>(channels), tile, microseconds(stream, [&] { run(chosen); }));
        }
      }
  return 0;
}

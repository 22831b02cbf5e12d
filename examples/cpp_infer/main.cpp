// Serves a quantized TorchScript file from several threads, without Python:
//
//   halfstep_cpp_infer --make int8.pt                 makes a small model, quantizes it here, and serves it
//   halfstep_cpp_infer int8.pt 8,3,32,32 [THREADS]    serves a file, such as save_torchscript() writes, on random input
//
// Every thread calls the same module. The results of all of them must have the same bits; latencies are printed as
// percentiles. A model that runs with intra-op threads of its own would have these compete, so each call uses one.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <ATen/Parallel.h>
#include <halfstep/torch.h>
#include <torch/script.h>
#include <torch/torch.h>

namespace {

constexpr int kCallsPerThread = 50;

torch::jit::Module convolution(int64_t in, int64_t out) {
  torch::jit::Module module("Convolution");
  module.register_parameter("weight", torch::randn({out, in, 3, 3}) / std::sqrt(9.0 * static_cast<double>(in)),
                            /*is_buffer=*/false);
  module.register_parameter("bias", 0.1 * torch::randn({out}), /*is_buffer=*/false);
  module.define(R"(
    def forward(self, x):
      return torch.relu(torch.conv2d(x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], 1))
  )");
  return module;
}

// A script as one would load it: convolutions and a product with a matrix.
torch::jit::Module make_model() {
  torch::jit::Module model("Model");
  model.register_module("first", convolution(3, 32));
  model.register_module("second", convolution(32, 64));
  model.register_parameter("head", torch::randn({64, 10}) / 8, /*is_buffer=*/false);
  model.define(R"(
    def forward(self, x):
      x = self.second.forward(torch.max_pool2d(self.first.forward(x), [2, 2]))
      return torch.matmul(torch.mean(x, [2, 3]), self.head)
  )");
  return model;
}

// Calibrates on random pictures; yours come from the data that the model will see.
void make_file(const std::string& path) {
  std::vector<std::vector<torch::IValue>> calibration;
  for (int i = 0; i < 6; ++i) calibration.push_back({torch::randn({8, 3, 32, 32})});
  const halfstep::Quantized quantized = halfstep::quantize(make_model(), calibration);
  std::cout << quantized.report;
  quantized.module.save(path);
}

int64_t number_in(const std::string& text) {
  int64_t number = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 0)
    throw std::invalid_argument("\"" + text +
                                "\" is no number, expected SIZES such as 8,3,32,32 and THREADS such as 4");
  return number;
}

std::vector<int64_t> sizes_in(const std::string& text) {
  std::vector<int64_t> sizes;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    sizes.push_back(number_in(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return sizes;
}

struct Served {
  std::vector<double> milliseconds;
  bool same_bits = true;
  std::exception_ptr error;
};

void serve(const torch::jit::Method& forward, const torch::Tensor& input, const torch::Tensor& expected,
           Served& served) {
  try {
    at::set_num_threads(1);  // of this thread's calls
    const torch::InferenceMode inference;
    for (int i = 0; i < kCallsPerThread; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      const torch::Tensor output = forward({input}).toTensor();
      const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - begin;
      served.milliseconds.push_back(taken.count());
      served.same_bits = served.same_bits && torch::equal(output, expected);
    }
  } catch (...) {
    served.error = std::current_exception();
  }
}

int run(const std::string& path, const std::vector<int64_t>& sizes, std::size_t threads) {
  const torch::jit::Module model = torch::jit::load(path);
  const torch::jit::Method forward = model.get_method("forward");
  const torch::Tensor input = torch::randn(sizes);
  torch::Tensor expected;
  {
    const torch::InferenceMode inference;
    for (int i = 0; i < 3; ++i) expected = forward({input}).toTensor();  // packs weights, and lets the executor settle
  }
  std::vector<Served> served(threads);
  std::vector<std::thread> workers;
  for (Served& own : served) workers.emplace_back([&] { serve(forward, input, expected, own); });
  for (std::thread& worker : workers) worker.join();

  std::vector<double> all;
  bool same_bits = true;
  for (const Served& own : served) {
    if (own.error) std::rethrow_exception(own.error);
    all.insert(all.end(), own.milliseconds.begin(), own.milliseconds.end());
    same_bits = same_bits && own.same_bits;
  }
  std::sort(all.begin(), all.end());
  const auto percentile = [&](double share) {
    return all[static_cast<std::size_t>(share * static_cast<double>(all.size() - 1))];
  };
  std::printf("%zu threads, %zu calls: p50 %.2f ms, p90 %.2f ms, p99 %.2f ms; %s\n", threads, all.size(),
              percentile(0.5), percentile(0.9), percentile(0.99), same_bits ? "all have the same bits" : "BITS DIFFER");
  return same_bits ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main(int argc, char** argv) try {
  torch::manual_seed(7);
  if (argc == 3 && std::string(argv[1]) == "--make") {
    make_file(argv[2]);
    return run(argv[2], {8, 3, 32, 32}, 4);
  }
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: halfstep_cpp_infer --make FILE | FILE SIZES [THREADS]\n");
    return 2;
  }
  const auto threads = static_cast<std::size_t>(argc == 4 ? number_in(argv[3]) : 4);
  return run(argv[1], sizes_in(argv[2]), std::max<std::size_t>(threads, 1));
} catch (const c10::Error& error) {
  std::fprintf(stderr, "%s\n", error.what_without_backtrace());
  return EXIT_FAILURE;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return EXIT_FAILURE;
}

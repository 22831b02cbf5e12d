// OperationCounter from C++, its callbacks and threads: what test_operations.py cannot see.
#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <ATen/record_function.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch.h"

namespace halfstep {
namespace {

using Row = std::tuple<std::string, std::string, std::int64_t>;

std::vector<Row> rows(const OperationCounter& counter) {
  std::vector<Row> rows;
  for (const auto& [operation, dtype, count] : counter.counts()) rows.emplace_back(operation, dtype, count);
  return rows;
}

class OperationCounting : public test::DeviceTest {};

TEST_P(OperationCounting, CountsForwardAndBackwardUnderAutocast) {
  torch::nn::Linear layer(4, 3);
  layer->to(GetParam());
  const at::Tensor x = torch::ones({2, 4}, GetParam()).requires_grad_();
  OperationCounter counter;
  ASSERT_TRUE(counter.start());
  at::Tensor out;
  {
    const AutocastScope autocast(GetParam(), at::kBFloat16);
    out = layer(x);
  }
  out.backward(torch::ones_like(out));
  counter.stop();
  EXPECT_FALSE(at::hasCallbacks());
  // Backward runs on another thread where there is a GPU: gradients of input and weight, and of the bias.
  EXPECT_EQ(
      rows(counter),
      (std::vector<Row>{{"aten::addmm", "bfloat16", 1}, {"aten::mm", "bfloat16", 2}, {"aten::sum", "bfloat16", 1}}));
  const std::vector<CastCount> casts = counter.casts();
  ASSERT_EQ(casts.size(), 2U);
  constexpr std::int64_t elements = 8 + 12 + 3;  // input, weight, bias; their gradients come back
  EXPECT_EQ(casts[0].from + casts[0].to, "bfloat16float32");
  EXPECT_EQ(casts[0].count, 3);
  EXPECT_EQ(casts[0].bytes, elements * 6);
  EXPECT_EQ(casts[1].from + casts[1].to, "float32bfloat16");
  EXPECT_EQ(casts[1].count, 3);
  EXPECT_EQ(casts[1].bytes, elements * 6);
}

INSTANTIATE_TEST_SUITE_P(Devices, OperationCounting, testing::Values(at::kCPU, at::kCUDA), test::device_name);

TEST(OperationCounter, LeavesNoCallback) {
  const at::Tensor x = torch::ones({2});
  EXPECT_FALSE(at::hasCallbacks());
  {
    OperationCounter counter;
    EXPECT_FALSE(at::hasCallbacks());
    EXPECT_TRUE(counter.start());
    EXPECT_TRUE(at::hasCallbacks());
    EXPECT_FALSE(counter.start());
    OperationCounter second;
    EXPECT_FALSE(second.start());
    second.stop();
    EXPECT_TRUE(at::hasCallbacks());
  }
  EXPECT_FALSE(at::hasCallbacks());
  OperationCounter counter;
  EXPECT_TRUE(counter.start());
  EXPECT_THROW(at::mm(x, x), c10::Error);
  x.add(x);
  counter.stop();
  EXPECT_FALSE(at::hasCallbacks());
  EXPECT_EQ(rows(counter), (std::vector<Row>{{"aten::add", "float32", 1}}));
}

TEST(OperationCounter, AnotherThreadMayStopAndStart) {
  const at::Tensor x = torch::ones({2});
  OperationCounter first;
  OperationCounter second;
  ASSERT_TRUE(first.start());
  x.add(x);
  std::thread([&] {
    first.stop();
    EXPECT_TRUE(second.start());
    x.mul(x);
    EXPECT_TRUE(at::hasCallbacks());
  }).join();  // it ends without having stopped
  EXPECT_TRUE(at::hasCallbacks()) << "the first counter's, which has nothing to count for";
  x.add(x);
  EXPECT_FALSE(at::hasCallbacks());
  EXPECT_EQ(rows(first), (std::vector<Row>{{"aten::add", "float32", 1}}));
  EXPECT_EQ(rows(second), (std::vector<Row>{{"aten::mul", "float32", 1}}));
  EXPECT_FALSE(first.start());
  second.stop();
  EXPECT_TRUE(first.start());
  first.stop();
  EXPECT_FALSE(at::hasCallbacks());
}

TEST(OperationCounter, RestartsBesideItsOwnLeftOverCallback) {
  const at::Tensor x = torch::ones({2});
  OperationCounter counter;
  ASSERT_TRUE(counter.start());
  std::thread([&] { counter.stop(); }).join();
  ASSERT_TRUE(counter.start());
  x.add(x);
  counter.stop();
  EXPECT_FALSE(at::hasCallbacks());
  EXPECT_EQ(rows(counter), (std::vector<Row>{{"aten::add", "float32", 1}}));
}

TEST(OperationCounter, ThreadsTakeTurnsWithoutMixingTheirCounts) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 200;
  std::atomic<bool> reading = true;
  std::vector<std::unique_ptr<OperationCounter>> counters;
  std::array<std::int64_t, kThreads> expected{};
  for (int i = 0; i < kThreads; ++i) counters.push_back(std::make_unique<OperationCounter>());
  std::thread reader([&] {
    while (reading) {
      for (const auto& counter : counters) counter->counts();
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const at::Tensor x = torch::ones({2});
      for (int round = 0; round < kRounds; ++round) {
        const bool mine = counters[static_cast<std::size_t>(i)]->start();
        for (int k = 0; k <= i; ++k) x.add(x);
        if (!mine) continue;
        expected[static_cast<std::size_t>(i)] += i + 1;
        if (round % 2 == 0) {
          counters[static_cast<std::size_t>(i)]->stop();
        } else {
          std::thread([&, i] { counters[static_cast<std::size_t>(i)]->stop(); }).join();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  reading = false;
  reader.join();
  std::int64_t all = 0;
  for (std::size_t i = 0; i < kThreads; ++i) {
    std::int64_t counted = 0;
    for (const OperationCount& each : counters[i]->counts()) counted += each.count;
    EXPECT_EQ(counted, expected[i]) << "thread " << i;
    all += counted;
  }
  EXPECT_GT(all, 0);
}

TEST(OperationCounter, CountsBackwardOnEnginesOtherThreads) {
  // Backward passes nested this deep run on threads of a pool, also on the CPU.
  struct Nested : torch::autograd::Function<Nested> {
    static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, std::int64_t depth) {
      ctx->saved_data["depth"] = depth;
      return x.clone();
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   const torch::autograd::variable_list& grads) {
      const auto depth = ctx->saved_data["depth"].toInt();
      if (depth > 0) {
        const at::AutoGradMode with_grad(true);
        const at::Tensor x = torch::ones({2}).requires_grad_();
        Nested::apply(x, depth - 1).backward(torch::ones({2}));
      }
      return {grads[0].exp(), at::Tensor()};
    }
  };
  constexpr std::int64_t depth = 80;
  const at::Tensor x = torch::ones({2}).requires_grad_();
  OperationCounter counter;
  ASSERT_TRUE(counter.start());
  Nested::apply(x, depth).backward(torch::ones({2}));
  counter.stop();
  EXPECT_EQ(rows(counter), (std::vector<Row>{{"aten::exp", "float32", depth + 1}}));
  EXPECT_FALSE(at::hasCallbacks());
}

}  // namespace
}  // namespace halfstep

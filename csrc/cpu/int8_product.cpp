// Contract: int8_product.h.
//
// A task has up to kTaskRows rows and some blocks of channels of one group. It prepares a chunk of its rows, multiplies
// it with the same terms of all its blocks, and goes on to the next chunk; the sums stay in the second-level cache.
#include "int8_product.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "halfstep/status.h"
#include "int8_kernels.h"
#include "int8_runs.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kTaskRows = 96;  // a multiple of every kernel's register tile
constexpr std::int64_t kRowStep = 24;
constexpr std::int64_t kGatheredBytes = 1 << 18;
constexpr std::int64_t kTaskBlocks = 4;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// How the work is divided: evenly, and so that many rows meet the same weights while these are in a cache.
struct Division {
  std::int64_t rows;    // of a task
  std::int64_t blocks;  // of a task
  std::int64_t row_tasks;
  std::int64_t block_tasks;

  explicit Division(const Int8Product& product) {
    const std::int64_t terms = std::max<std::int64_t>(1, product.terms);
    std::int64_t most = kTaskRows;
    if (product.gathers) most = std::clamp(kGatheredBytes / terms / kRowStep * kRowStep, kRowStep, kTaskRows);
    rows = divide_up(product.rows, divide_up(product.rows, most));
    if (rows > kRowStep) rows = std::min(most, divide_up(rows, kRowStep) * kRowStep);
    row_tasks = divide_up(product.rows, rows);
    const std::int64_t all = int8_blocks(product.channels / product.groups);
    // Few rows wait for the weights to come from memory.
    const std::int64_t block_cost = std::max<std::int64_t>(rows, 2) * kInt8Block * terms;
    blocks = std::clamp<std::int64_t>(kInt8TaskCost / block_cost, std::min(kTaskBlocks, all), all);
    block_tasks = divide_up(all, blocks);
    blocks = divide_up(all, block_tasks);
  }
};

class Task {
 public:
  Task(const Int8Product& product, const Division& division, const void* packed, const Int8Epilogue& epilogue,
       const Int8Kernel& kernel, std::int64_t index)
      : product_(product), epilogue_(epilogue), kernel_(kernel) {
    const std::int64_t of_group = product.channels / product.groups;
    const std::int64_t block = index % division.block_tasks * division.blocks;
    row_ = index / division.block_tasks % division.row_tasks * division.rows;
    rows_ = std::min(division.rows, product.rows - row_);
    group_ = index / division.block_tasks / division.row_tasks;
    blocks_ = std::min(division.blocks, int8_blocks(of_group) - block);
    channel_ = group_ * of_group + block * kInt8Block;
    channels_ = std::min(blocks_ * kInt8Block, of_group - block * kInt8Block);
    weights_ = static_cast<const std::int8_t*>(packed) +
               (group_ * int8_blocks(of_group) + block) * int8_block_bytes(product.terms);
  }

  void run() {
    const auto sums =
        std::make_unique_for_overwrite<std::int32_t[]>(static_cast<std::size_t>(rows_ * blocks_ * kInt8Block));
    multiply(sums.get());
    finish(sums.get());
  }

 private:
  void multiply(std::int32_t* sums) const {
    const auto buffer = std::make_unique_for_overwrite<std::int8_t[]>(
        static_cast<std::size_t>(product_.gathers ? rows_ * product_.terms : 0));
    const Int8Rows rows = product_.get_rows(row_, rows_, group_, buffer.get());
    if (!kernel_.prepare && product_.terms % kInt8Quad == 0) {
      kernel_.multiply({rows.data, rows.pitch, rows_, weights_, int8_block_bytes(product_.terms), blocks_,
                        int8_quads(product_.terms), sums, false});
      return;
    }
    const auto prepare = kernel_.prepare ? kernel_.prepare : int8_prepare_plain;
    const std::int64_t prepared_pitch = kInt8Chunk * kernel_.term_bytes;
    const auto prepared =
        std::make_unique_for_overwrite<std::int8_t[]>(static_cast<std::size_t>(rows_ * prepared_pitch));
    std::int64_t term = 0;
    do {
      const std::int64_t count = std::min(kInt8Chunk, product_.terms - term);
      for (std::int64_t row = 0; row < rows_; ++row)
        prepare(rows.data + row * rows.pitch + term, count, prepared.get() + row * prepared_pitch);
      kernel_.multiply({prepared.get(), prepared_pitch, rows_, weights_ + term * kInt8Block,
                        int8_block_bytes(product_.terms), blocks_, int8_quads(count), sums, term > 0});
      term += count;
    } while (term < product_.terms);
  }

  void finish(const std::int32_t* sums) const {
    const std::int64_t pitch = blocks_ * kInt8Block;
    const auto shift = static_cast<std::uint32_t>(epilogue_.input.zero_point + kernel_.shift);
    std::vector<std::uint32_t> corrections(static_cast<std::size_t>(pitch));
    for (std::int64_t block = 0; block < blocks_; ++block) {
      std::uint32_t* const of_block = corrections.data() + block * kInt8Block;
      std::memcpy(of_block, weights_ + (block + 1) * int8_block_bytes(product_.terms) - kInt8Block * kInt8Quad,
                  kInt8Block * sizeof(std::uint32_t));
      for (int i = 0; i < kInt8Block; ++i) of_block[i] *= shift;
    }
    const bool is_whole = product_.groups == 1 && pitch == product_.channels;  // the task has all channels of its rows
    if (is_whole && 2 * pitch <= kLongRun && !epilogue_.row_scales) return finish_several_as_one(sums, corrections);
    finish_rows({.epilogue = epilogue_,
                 .sums = sums,
                 .sums_pitch = pitch,
                 .corrections = corrections.data(),
                 .rows = rows_,
                 .channels = channels_,
                 .channel = channel_,
                 .at = row_ * product_.channels + channel_,
                 .pitch = product_.channels,
                 .row = row_,
                 .rows_per_scale = product_.rows_per_scale});
  }

  // Rows of few channels lie one behind the other: several are one, with as many copies of what channels have.
  void finish_several_as_one(const std::int32_t* sums, std::vector<std::uint32_t>& corrections) const {
    const std::int64_t several = std::min(rows_, kLongRun / product_.channels);
    const std::int64_t length = several * product_.channels;
    const auto copied = [&](const float* of_channels) {
      std::vector<float> copies;
      if (of_channels)
        for (std::int64_t i = 0; i < several; ++i)
          copies.insert(copies.end(), of_channels, of_channels + product_.channels);
      return copies;
    };
    const std::vector<float> scales = copied(epilogue_.weight_scales);
    const std::vector<float> bias = copied(epilogue_.bias);
    corrections.resize(static_cast<std::size_t>(length));
    for (std::int64_t i = product_.channels; i < length; ++i)
      corrections[static_cast<std::size_t>(i)] = corrections[static_cast<std::size_t>(i - product_.channels)];
    Int8Epilogue epilogue = epilogue_;
    epilogue.weight_scales = scales.data();
    epilogue.bias = bias.empty() ? nullptr : bias.data();
    const auto finish_at = [&](std::int64_t begin, std::int64_t rows, std::int64_t channels) {
      finish_rows({.epilogue = epilogue,
                   .sums = sums + begin,
                   .sums_pitch = length,
                   .corrections = corrections.data(),
                   .rows = rows,
                   .channels = channels,
                   .channel = 0,
                   .at = row_ * product_.channels + begin,
                   .pitch = length});
    };
    const std::int64_t done = rows_ / several * several;
    finish_at(0, rows_ / several, length);
    if (done < rows_) finish_at(done * product_.channels, 1, (rows_ - done) * product_.channels);
  }

  static constexpr std::int64_t kLongRun = 256;

  const Int8Product& product_;
  const Int8Epilogue& epilogue_;
  const Int8Kernel& kernel_;
  std::int64_t row_, rows_, group_, blocks_, channel_, channels_;
  const std::int8_t* weights_;
};

}  // namespace

void multiply_packed(const Int8Product& product, const void* packed, const Int8Epilogue& epilogue, Int8Isa isa,
                     const Executor& executor) {
  const Int8Kernel& kernel = int8_kernel(isa);
  if (product.rows == 0 || product.channels == 0) return;
  const Division division(product);
  run_int8_tasks(product.groups * division.row_tasks * division.block_tasks, executor,
                 [&](std::int64_t index) { Task(product, division, packed, epilogue, kernel, index).run(); });
}

void check_int8_epilogue(const char* function, const Int8Epilogue& epilogue, std::int64_t terms) {
  const std::int32_t zero_point = epilogue.input.zero_point;
  HS_CHECK(zero_point >= -128 && zero_point <= 127, function, ": the input's zero_point is ", zero_point,
           "; expected -128 .. 127");
  HS_CHECK(!epilogue.row_scales || zero_point == 0, function, ": the input's zero_point is ", zero_point,
           " with row_scales; expected 0");
  const std::int64_t most = zero_point == 0 ? kInt8MaxTerms : kInt8MaxTermsShifted;
  HS_CHECK(terms >= 0 && terms <= most, function, ": a sum has ", terms, " terms; expected 0 .. ", most,
           " for zero_point ", zero_point, ", or it may not fit into int32");
  const Int8Out& out = epilogue.out;
  if (out.kind == Int8OutKind::kSums) return;
  HS_CHECK(!epilogue.residual || epilogue.residual_dtype != DType::kFloat64, function,
           ": residual is float64; expected float32, float16 or bfloat16");
  HS_CHECK(out.kind != Int8OutKind::kFloat || out.dtype != DType::kFloat64, function,
           ": out is float64; expected float32, float16 or bfloat16");
  HS_CHECK(out.kind != Int8OutKind::kInt8 || (out.parameters.zero_point >= -128 && out.parameters.zero_point <= 127),
           function, ": the output's zero_point is ", out.parameters.zero_point, "; expected -128 .. 127");
}

}  // namespace halfstep::cpu

// Norms that write int8 on the GPU, against the two calls that they stand for and the float64 reference.
#include "cuda_fixture.h"
#include "int8_norms_fixture.h"

namespace halfstep {
namespace {

using test::DeviceArray;
using test::Int8NormResult;
using test::NormCase;
using test::NormData;

class Int8NormsCuda : public test::CudaTest {
 protected:
  // Calls run(forward, quantized, row_scales or null) with a copy of the tensors, and reads what it has written. The
  // int8 result starts `misaligned` bytes off a boundary, as the tensors do by elements.
  template <class Run>
  Int8NormResult on_device(NormData& data, bool by_rows, const Run& run) {
    const NormCase& c = data.test_case;
    std::vector<DeviceArray<char>> buffers;
    std::vector<TensorView> views = data.tensors.shapes();
    for (std::size_t i = 0; i < views.size(); ++i) {
      const char* const begin = data.tensors.buffer(i);
      buffers.emplace_back(std::vector<char>(begin, begin + data.tensors.bytes(i)), stream_);
      views[i].data = buffers[i].get() + data.tensors.offset(i);
    }
    Int8NormResult result(c.shape, by_rows);
    const std::vector<std::int8_t> unwritten(result.quantized.size() + c.misaligned + 16, 99);
    const DeviceArray<std::int8_t> quantized(unwritten, stream_);
    const DeviceArray<float> scales(result.scales, stream_);
    const NormForward forward{c.shape,
                              c.center,
                              test::kNormEps,
                              views[NormData::kInput],
                              views[NormData::kWeight],
                              views[NormData::kBias],
                              views[NormData::kOut],
                              nullptr,
                              nullptr};
    run(forward, quantized.get() + c.misaligned, by_rows ? scales.get() : nullptr);
    const std::vector<std::int8_t> all = quantized.read(stream_);
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(c.misaligned);
    std::copy(begin, begin + static_cast<std::ptrdiff_t>(result.quantized.size()), result.quantized.begin());
    EXPECT_TRUE(std::all_of(all.begin(), begin, [](std::int8_t q) { return q == 99; })) << "wrote before the result";
    EXPECT_TRUE(std::all_of(begin + static_cast<std::ptrdiff_t>(result.quantized.size()), all.end(), [](std::int8_t q) {
      return q == 99;
    })) << "wrote past the result";
    result.scales = scales.read(stream_);
    for (float& scale : result.scales)
      if (std::isnan(scale)) scale = -1.0F;
    const std::vector<char> floats = buffers[NormData::kOut].read(stream_);
    std::copy(floats.begin(), floats.end(), data.tensors.buffer(NormData::kOut));
    return result;
  }

  Int8NormResult fused(NormData& data, const Int8Parameters& parameters, bool by_rows, bool keep_float) {
    return on_device(data, by_rows, [&](NormForward norm, std::int8_t* quantized, float* scales) {
      if (!keep_float) norm.out.data = nullptr;
      cuda::normalize_int8({norm, quantized, parameters, scales}, {stream_});
    });
  }
  Int8NormResult composed(NormData& data, const Int8Parameters& parameters, bool by_rows) {
    return on_device(data, by_rows, [&](const NormForward& norm, std::int8_t* quantized, float* scales) {
      cuda::normalize(norm, {stream_});
      if (by_rows) {
        cuda::quantize_rows(norm.out, {}, norm.shape.rows, quantized, scales, {stream_});
      } else {
        cuda::quantize(norm.out, {}, parameters, quantized, {stream_});
      }
    });
  }
};

TEST_F(Int8NormsCuda, AreANormAndAQuantizationBitForBitAndNearTheReference) {
  for (const NormCase& c : test::int8_norm_cases()) {
    const Int8Parameters parameters = test::int8_norm_parameters(c);
    for (const bool by_rows : {false, true}) {
      SCOPED_TRACE(testing::Message() << c << ", by rows " << by_rows);
      NormData in_two(c);
      NormData in_one(c);
      const Int8NormResult expected = composed(in_two, parameters, by_rows);
      const Int8NormResult got = fused(in_one, parameters, by_rows, /*keep_float=*/true);
      ASSERT_EQ(got, expected);
      for (std::size_t i = 0; i < got.quantized.size(); ++i)
        ASSERT_EQ(in_one.tensors.get(NormData::kOut, i), in_two.tensors.get(NormData::kOut, i)) << i;
      test::expect_int8_norm_matches(in_one, got, parameters);
      if (testing::Test::HasFailure()) return;
      if (c.misaligned != 0) continue;  // the float output is one of the tensors by which the order of sums is chosen
      NormData without_floats(c);
      ASSERT_EQ(fused(without_floats, parameters, by_rows, /*keep_float=*/false), expected);
      for (std::size_t i = 0; i < got.quantized.size(); ++i)
        ASSERT_EQ(without_floats.tensors.get(NormData::kOut, i), -7.0) << "written, but not wanted";
    }
  }
}

TEST_F(Int8NormsCuda, NonFiniteRowsStayAmongThemselves) {
  for (const std::int64_t cols : {104, 20000})
    test::check_non_finite_rows(
        cols, [&](auto&&... arguments) { return fused(arguments...); },
        [&](auto&&... arguments) { return composed(arguments...); });
}

TEST_F(Int8NormsCuda, CanBeCapturedInAGraph) {
  const DeviceArray<float> input(std::vector<float>(64 * 768, 2.0F), stream_);
  const DeviceArray<std::int8_t> out(std::vector<std::int8_t>(64 * 768, 99), stream_);
  const TensorView view{input.get(), 64 * 768, DType::kFloat32};
  HS_CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  const NormForward norm{{64, 768}, false, 0.0, view, {}, {}, {nullptr, 64 * 768, DType::kFloat32}, nullptr, nullptr};
  cuda::normalize_int8({norm, out.get(), {0.1F, 3}}, {stream_});
  cudaGraph_t graph = nullptr;
  HS_CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  HS_CUDA_TRY(cudaGraphInstantiate(&executable, graph, 0));
  EXPECT_EQ(out.read(stream_)[0], 99) << "capturing must not run";
  HS_CUDA_TRY(cudaGraphLaunch(executable, stream_));
  EXPECT_EQ(out.read(stream_).back(), 13);
  HS_CUDA_TRY(cudaGraphExecDestroy(executable));
  HS_CUDA_TRY(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace halfstep

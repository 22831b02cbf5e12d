// Runs a TorchScript file, or a package of AOTInductor, in a process without Python:
//
//   halfstep_run_script MODEL.pt INPUTS.pt OUTPUTS.pt
//   halfstep_run_script MODEL.pt2 INPUTS.pt OUTPUTS.pt
//
// INPUTS.pt (torch.save) holds the list of forward's arguments, tensors and lists of them, of a package tensors alone;
// the result, a tensor or a tuple of them, of a package a tuple, is written to OUTPUTS.pt as torch.save would.
#include <fstream>
#include <iostream>
#include <iterator>
#include <string_view>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <torch/serialize.h>

#include "halfstep/torch.h"

namespace {

std::vector<char> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

torch::IValue run_script(const char* path, const torch::IValue& saved) {
  torch::jit::Module model = torch::jit::load(path);
  std::vector<torch::IValue> inputs;
  for (const torch::IValue& input : saved.toListRef()) {
    if (!input.isList()) {
      inputs.push_back(input);
      continue;
    }
    c10::List<torch::Tensor> tensors;  // the file does not say what its lists hold
    for (const torch::IValue& element : input.toListRef()) tensors.push_back(element.toTensor());
    inputs.emplace_back(tensors);
  }
  return model.forward(inputs);
}

torch::IValue run_package(const char* path, const torch::IValue& saved) {
  torch::inductor::AOTIModelPackageLoader model(path);
  std::vector<torch::Tensor> inputs;
  for (const torch::IValue& input : saved.toListRef()) inputs.push_back(input.toTensor());
  const std::vector<torch::Tensor> outputs = model.run(inputs);
  return c10::ivalue::Tuple::create(std::vector<torch::IValue>(outputs.begin(), outputs.end()));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: halfstep_run_script MODEL.pt|MODEL.pt2 INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  const torch::IValue inputs = torch::pickle_load(read_file(argv[2]));
  const bool is_package = std::string_view(argv[1]).ends_with(".pt2");
  const torch::IValue result = is_package ? run_package(argv[1], inputs) : run_script(argv[1], inputs);
  const std::vector<char> bytes = torch::pickle_save(result);
  std::ofstream(argv[3], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}

// Runs a TorchScript file in a process without Python:
//
//   halfstep_run_script MODEL.pt INPUTS.pt OUTPUTS.pt
//
// INPUTS.pt (torch.save) holds the list of forward's arguments, tensors and lists of them; its result, a tensor or a
// tuple of them, is written to OUTPUTS.pt as torch.save would.
#include <fstream>
#include <iostream>
#include <iterator>

#include <torch/script.h>
#include <torch/serialize.h>

#include "halfstep/torch.h"

namespace {

std::vector<char> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: halfstep_run_script MODEL.pt INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  torch::jit::Module model = torch::jit::load(argv[1]);
  std::vector<torch::IValue> inputs;
  const torch::IValue saved = torch::pickle_load(read_file(argv[2]));
  for (const torch::IValue& input : saved.toListRef()) {
    if (!input.isList()) {
      inputs.push_back(input);
      continue;
    }
    c10::List<torch::Tensor> tensors;  // the file does not say what its lists hold
    for (const torch::IValue& element : input.toListRef()) tensors.push_back(element.toTensor());
    inputs.emplace_back(tensors);
  }
  const torch::IValue result = model.forward(inputs);
  const std::vector<char> bytes = torch::pickle_save(result);
  std::ofstream(argv[3], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}

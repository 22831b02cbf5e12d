// Runs a TorchScript file in a process without Python:
//
//   halfstep_run_script MODEL.pt INPUTS.pt OUTPUTS.pt
//
// INPUTS.pt holds a list of tensors (torch.save), the arguments of forward; its result, a tensor or a tuple of them, is
// written to OUTPUTS.pt as torch.save would.
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
  for (const torch::IValue& input : torch::pickle_load(read_file(argv[2])).toListRef()) inputs.push_back(input);
  const torch::IValue result = model.forward(inputs);
  const std::vector<char> bytes = torch::pickle_save(result);
  std::ofstream(argv[3], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}

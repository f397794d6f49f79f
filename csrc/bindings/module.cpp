// What the package is and how it was built. No tensors here: the operators are torch.ops.dimap.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa/decide.h"

namespace py = pybind11;

namespace {

py::object or_none(const std::string& s) { return s.empty() ? py::object(py::none()) : py::str(s); }

py::dict build_info() {
  py::dict info;
  info["version"] = DIMAP_VERSION;
  info["compiler"] = DIMAP_COMPILER;
  info["torch"] = DIMAP_TORCH_BUILT_WITH;
  info["torch_target"] = DIMAP_TORCH_TARGET;
  info["cuda"] = or_none(DIMAP_CUDA_VERSION);
  info["cuda_architectures"] = or_none(DIMAP_CUDA_ARCHITECTURES);
  const dimap::cpu::Kernels* available[3];
  const int n = dimap::cpu::available_kernels(available);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(available[i]->name);
  info["instruction_sets"] = names;
  info["instruction_set"] = dimap::cpu::kernels().name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How dimap was built and what it can run on.";
  m.attr("__version__") = DIMAP_VERSION;
  m.def("build_info", &build_info,
        "Version, compiler, torch (built beside, ABI targeted), CUDA version and architectures (None: built without), "
        "and "
        "the instruction sets that this processor has; 'instruction_set' is the one in use (DIMAP_ISA forces one).");
}

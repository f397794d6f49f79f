// The module `_C`: the engine on files and shards, how the package was built, and its errors.
#include "bindings/python.h"
#include "cpu/files/prune.h"
#include "cpu/isa/decide.h"
#include "cpu/sparse/pack.h"

namespace dimap::python {
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
  const cpu::Kernels* available[3];
  const int n = cpu::available_kernels(available);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(available[i]->name);
  info["instruction_sets"] = names;
  info["instruction_set"] = cpu::kernels().name;
  return info;
}

// Errors carry their parts; Python makes sentences of them.
void raise(PyObject* kind, const py::tuple& parts) { PyErr_SetObject(kind, parts.ptr()); }

void translate(std::exception_ptr error) {
  const py::module_ self = py::module_::import("dimap._C");
  try {
    if (error) std::rethrow_exception(error);
  } catch (const NonFinite& e) {
    raise(self.attr("NonFiniteError").ptr(), py::make_tuple(e.tensor, e.index, e.name));
  } catch (const cpu::Changed& e) {
    raise(self.attr("ChangedError").ptr(), py::make_tuple(e.tensor));
  } catch (const cpu::BadBits& e) {
    raise(self.attr("BitsError").ptr(), py::make_tuple(e.tensor, e.required, e.got));
  } catch (const cpu::FileError& e) {
    raise(PyExc_OSError, py::make_tuple(e.code, e.what(), e.path));
  }
}

void add_error(py::module_& m, const char* name, const char* doc) {
  const std::string full = std::string("dimap._C.") + name;
  m.attr(name) =
      py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(full.c_str(), doc, PyExc_ValueError, nullptr));
}

}  // namespace
}  // namespace dimap::python

PYBIND11_MODULE(_C, m) {
  using namespace dimap::python;
  m.doc() = "The engine on files and shards, without torch; how dimap was built and what it can run on.";
  m.attr("__version__") = DIMAP_VERSION;
  add_error(m, "NonFiniteError", "A NaN or an infinity: (tensor, flat index, 'nan', 'inf' or '-inf').");
  add_error(m, "ChangedError", "A file changed between two readings: (tensor,).");
  add_error(m, "BitsError", "Bits that do not fit their values: (tensor, values as the bits say, values).");
  py::register_local_exception_translator(&translate);

  m.def(
      "build_info", &build_info,
      "Version, compiler, torch (built beside, ABI targeted), CUDA version and architectures (None: built without), "
      "and the instruction sets that this processor has; 'instruction_set' is the one in use (DIMAP_ISA forces one).");
  bind_pruning(m);
  bind_counts(m);
  bind_files(m);
  bind_bits(m);
  m.def("threads", [] { return dimap::cpu::ThreadPool(0).workers(); });
}

// What the files of `_C` share: Python's types and the engine's. No torch here: the operators are torch.ops.dimap.
//
// The bindings declare and convert; python/dimap/_C.pyi documents what they bind.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/exchange.h"
#include "core/problem.h"
#include "cpu/thread_pool.h"

namespace dimap::python {

namespace py = pybind11;

// Each binds what its file is about.
void bind_pruning(py::module_& m);
void bind_counts(py::module_& m);
void bind_files(py::module_& m);
void bind_bits(py::module_& m);

using Files = std::vector<std::tuple<int, std::string>>;  // descriptor, path
using Progress = std::optional<std::function<void(const std::string&, int64_t, int64_t)>>;
using Sum = std::function<void(py::memoryview)>;
using TensorTuple = std::tuple<int32_t, int64_t, int64_t, int, int32_t>;  // file, offset, weights, dtype, layer
using NormsTuple = std::tuple<py::buffer, int64_t>;                       // float32, inner

inline std::vector<File> files_of(const Files& given) {
  std::vector<File> files;
  for (const auto& [descriptor, path] : given) files.push_back({descriptor, path});
  return files;
}

inline DType dtype_of(int number) {
  if (number < 0 || number > 2)
    throw py::value_error("dtype must be 0, 1 or 2 (float32, bfloat16, float16), got " + std::to_string(number));
  return static_cast<DType>(number);
}

inline cpu::ThreadPool::Watch watch_of(Progress progress) {
  return [progress = std::move(progress)](const char* step, int64_t done, int64_t bytes) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (*step && progress && *progress) (*progress)(step, done, bytes);
  };
}

class PythonExchange final : public Exchange {
 public:
  explicit PythonExchange(Sum sum) : sum_(std::move(sum)) {}
  void sum(std::span<int64_t> numbers) const override {
    const py::gil_scoped_acquire gil;
    const auto n = static_cast<py::ssize_t>(numbers.size());
    if (n > 0) sum_(py::memoryview::from_buffer(numbers.data(), {n}, {py::ssize_t{8}}));
  }

 private:
  Sum sum_;
};

inline std::unique_ptr<Exchange> exchange_of(std::optional<Sum> sum) {
  if (!sum) return nullptr;
  return std::make_unique<PythonExchange>(std::move(*sum));
}

// Tensors in files, which may have norms.
inline void set_tensors(Problem& problem, const Files& files, const std::vector<TensorTuple>& tensors,
                        const std::vector<NormsTuple>& norms) {
  problem.files = files_of(files);
  for (const auto& [file, offset, numel, dtype, layer] : tensors)
    problem.tensors.push_back({nullptr, numel, dtype_of(dtype), layer, file, offset});
  if (norms.empty()) return;
  if (norms.size() != tensors.size())
    throw py::value_error("norms must have one entry for each of the " + std::to_string(tensors.size()) +
                          " tensors, or none, got " + std::to_string(norms.size()));
  for (size_t t = 0; t < norms.size(); ++t) {
    const auto& [values, inner] = norms[t];
    const py::buffer_info info = values.request();
    const auto* begin = static_cast<const float*>(info.ptr);
    const int64_t size = info.size * info.itemsize / 4;
    if ((size < 1 || inner < 1) && problem.tensors[t].numel > 0)
      throw py::value_error("norms[" + std::to_string(t) + "] must fit its tensor");
    problem.tensors[t].dtype = DType::kFloat32;
    problem.tensors[t].norms = std::make_shared<const Norms>(Norms{{begin, begin + size}, inner});
  }
}

// Layers, modules and what they keep; the totals come from the tensors, or are given.
inline void set_modules(Problem& problem, const std::vector<int64_t>& modules, const std::vector<int64_t>& keep,
                        const std::optional<std::vector<int64_t>>& totals) {
  for (const int64_t m : modules) {
    if (m < 0 || m >= static_cast<int64_t>(keep.size()))
      throw py::value_error("modules must be in [0, " + std::to_string(keep.size()) + "), got " + std::to_string(m));
    problem.layer_module.push_back(static_cast<int32_t>(m));
  }
  problem.keep = keep;
  for (const TensorView& t : problem.tensors)
    if (t.layer < 0 || static_cast<size_t>(t.layer) >= modules.size())
      throw py::value_error("layers must be in [0, " + std::to_string(modules.size()) + "), got " +
                            std::to_string(t.layer));
  problem.count();
  if (totals) {
    if (totals->size() != modules.size())
      throw py::value_error("totals must have one entry for each of the " + std::to_string(modules.size()) +
                            " layers, got " + std::to_string(totals->size()));
    problem.layer_total = *totals;
    std::fill(problem.module_total.begin(), problem.module_total.end(), 0);
    for (size_t l = 0; l < modules.size(); ++l) problem.module_total[problem.layer_module[l]] += (*totals)[l];
  }
  for (size_t m = 0; m < keep.size(); ++m)
    if (keep[m] < 0 || keep[m] > problem.module_total[m])
      throw py::value_error("keep[" + std::to_string(m) + "] must be in [0, " +
                            std::to_string(problem.module_total[m]) + "], got " + std::to_string(keep[m]));
}

}  // namespace dimap::python

// What is counted in files, and packed files that are written out whole.
#include "bindings/python.h"
#include "cpu/files/elements.h"
#include "cpu/files/expand.h"
#include "cpu/files/groups.h"
#include "cpu/files/prune.h"

namespace dimap::python {
namespace {

using ElementTuple = std::tuple<int32_t, int64_t, int64_t, int64_t, uint64_t>;  // file, offset, count, size, mask

std::vector<cpu::Elements> elements_of(const std::vector<ElementTuple>& given) {
  std::vector<cpu::Elements> elements;
  for (const auto& [file, offset, count, size, mask] : given) elements.push_back({file, offset, count, size, mask});
  return elements;
}

std::vector<int64_t> count_nonzero(const Files& files, const std::vector<ElementTuple>& tensors, int threads,
                                   Progress progress) {
  const cpu::ThreadPool pool(threads, watch_of(std::move(progress)));
  const py::gil_scoped_release release;
  return cpu::count_nonzero(files_of(files), elements_of(tensors), pool);
}

std::vector<std::tuple<int64_t, std::vector<int>>> count_groups(
    const Files& files,
    const std::vector<std::tuple<int32_t, int64_t, int64_t, uint64_t, int64_t, int64_t, int64_t>>& tensors, int threads,
    Progress progress) {
  std::vector<cpu::Grid3> grids;
  for (const auto& [file, offset, size, mask, outer, length, inner] : tensors)
    grids.push_back({file, offset, size, mask, outer, length, inner});
  const cpu::ThreadPool pool(threads, watch_of(std::move(progress)));
  std::vector<cpu::Most> found;
  {
    const py::gil_scoped_release release;
    found = cpu::count_groups(files_of(files), grids, pool);
  }
  std::vector<std::tuple<int64_t, std::vector<int>>> out;
  for (const cpu::Most& one : found) out.emplace_back(one.nonzero, std::vector<int>(one.most.begin(), one.most.end()));
  return out;
}

void expand(
    const Files& files, const Files& targets,
    const std::vector<std::tuple<int32_t, int64_t, int64_t, int32_t, int64_t, int64_t, int64_t, int64_t>>& tensors,
    const std::vector<std::tuple<int32_t, int64_t, int64_t, int64_t>>& rest, int threads, Progress progress) {
  std::vector<cpu::Packed> packed;
  for (const auto& [file, values, count, bits_file, bits, numel, size, place] : tensors)
    packed.push_back({file, values, count, bits_file, bits, numel, size, place});
  std::vector<cpu::Copied> copied;
  for (const auto& [file, offset, bytes, place] : rest) copied.push_back({file, offset, bytes, place});
  const cpu::ThreadPool pool(threads, watch_of(std::move(progress)));
  const py::gil_scoped_release release;
  cpu::expand(files_of(files), files_of(targets), packed, copied, pool);
}

}  // namespace

void bind_files(py::module_& m) {
  m.def("count_nonzero", &count_nonzero, py::arg("files"), py::arg("tensors"), py::kw_only(), py::arg("threads") = 0,
        py::arg("progress") = py::none());
  m.def("count_groups", &count_groups, py::arg("files"), py::arg("tensors"), py::kw_only(), py::arg("threads") = 0,
        py::arg("progress") = py::none());
  m.def("expand", &expand, py::arg("files"), py::arg("targets"), py::arg("tensors"), py::arg("rest"), py::kw_only(),
        py::arg("threads") = 0, py::arg("progress") = py::none());
}

}  // namespace dimap::python

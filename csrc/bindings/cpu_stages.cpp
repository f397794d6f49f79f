// survey, solve and emit as operators: what streams and shards are built from.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "bindings/cpu_common.h"
#include "bindings/stages.h"
#include "cpu/select/emit.h"
#include "cpu/select/survey.h"

namespace dimap::cpu {
namespace {

using Ints = std::vector<int64_t>;

Tensor empty_cpu(std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Tensor tensor_of(const std::vector<int64_t>& values, std::vector<int64_t> sizes) {
  Tensor t = empty_cpu(std::move(sizes), ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(t.mutable_data_ptr()));
  return t;
}

// A contiguous int64 matrix, checked.
struct Matrix : Rows {
  Matrix(const Tensor& t, const char* name, int64_t columns) : tensor(t) {
    check_matrix(t, name, columns, "cpu");
    tensor = torch::stable::contiguous(t);
    data = static_cast<const int64_t*>(tensor.const_data_ptr());
    rows = t.size(0), cols = t.size(1);
  }
  Tensor tensor;
};

Tensor survey_op(std::vector<Tensor> weights, Ints layers, Tensor windows, int64_t bins) {
  check_bins(bins);
  const Matrix matrix(windows, "windows", kWindowColumns);
  const std::vector<WireWindow> wire = read_windows(matrix);
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = survey_problem(inputs, layers, wire);
  std::vector<Window> views;
  for (const WireWindow& w : wire) views.push_back(w.window);
  const TorchPool pool;
  Loader loader(problem, pool.workers());
  const Survey seen = guarded([&] { return survey(problem, views, bins, {}, loader, pool); });
  Tensor table = empty_cpu({matrix.rows, wire_columns(bins)}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(table.mutable_data_ptr());
  for (int64_t l = 0; l < matrix.rows; ++l)
    write_table(seen.tables[static_cast<size_t>(l)], out + l * wire_columns(bins));
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solve_op(Tensor table, Tensor windows, Ints modules, Ints keep) {
  const Matrix rows(table, "table", -1), views(windows, "windows", kWindowColumns);
  const Solved solved = solve_rows(rows, views, modules, keep);
  const auto count = static_cast<int64_t>(keep.size());
  Tensor thresholds = empty_cpu({count}, ScalarType::Double);
  std::copy(solved.thresholds.begin(), solved.thresholds.end(), static_cast<double*>(thresholds.mutable_data_ptr()));
  return {tensor_of(solved.cuts, {rows.rows, 2}), tensor_of(solved.quota, {count}), std::move(thresholds),
          tensor_of(solved.next, {rows.rows, kWindowColumns})};
}

std::tuple<std::vector<Tensor>, Tensor> emit_op(std::vector<Tensor> weights, Ints layers, Ints modules, Tensor cuts,
                                                Tensor quota) {
  const Matrix matrix(cuts, "cuts", 2);
  const std::vector<Tensor> inputs = contiguous(weights);
  check_quota(quota, "cpu");
  Tensor left = torch::stable::clone(torch::stable::contiguous(quota));
  const auto [problem, found] = emit_problem(inputs, layers, modules, matrix, left.numel());
  std::vector<Tensor> masks = empty_like(inputs, ScalarType::Bool);
  guarded([&, &problem = problem, &found = found] {
    emit(problem, found, {static_cast<int64_t*>(left.mutable_data_ptr()), static_cast<size_t>(left.numel())},
         pointers<uint8_t>(masks), nullptr, {}, TorchPool());
  });
  return {std::move(masks), std::move(left)};
}

}  // namespace
}  // namespace dimap::cpu

STABLE_TORCH_LIBRARY_IMPL(dimap, CPU, m) {
  m.impl("survey", TORCH_BOX(&dimap::cpu::survey_op));
  m.impl("solve", TORCH_BOX(&dimap::cpu::solve_op));
  m.impl("emit", TORCH_BOX(&dimap::cpu::emit_op));
}

// survey, solve and emit as operators: what streams and shards are built from.
#include <torch/csrc/stable/library.h>

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
  check_windows(matrix);
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = survey_problem(inputs, layers, matrix.rows);
  check_granularities(inputs, problem, matrix);
  std::vector<Window> views;
  for (int64_t l = 0; l < matrix.rows; ++l) views.push_back(read_window(matrix.row(l)).window);
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
  const int bins = check_solve(table, windows, modules, keep, "cpu");
  const Matrix rows(table, "table", -1), views(windows, "windows", kWindowColumns);
  check_windows(views);
  check_keep(rows, modules, keep);
  const int64_t count = rows.rows, stride = bins + 2;
  const auto parts = static_cast<int64_t>(keep.size());
  Tensor cuts = empty_cpu({count, 2}, ScalarType::Long), quota = empty_cpu({parts}, ScalarType::Long);
  Tensor thresholds = empty_cpu({parts}, ScalarType::Double), next = empty_cpu({count, views.cols}, ScalarType::Long);

  std::vector<cuda::LayerEntry> entries;
  std::vector<int32_t> layer_module;
  for (const int64_t m : modules) {
    layer_module.push_back(static_cast<int32_t>(m));
    entries.push_back({0, layer_module.back(), 0});
  }
  std::vector<cuda::ModuleEntry> totals;
  for (const int64_t k : keep) totals.push_back({k, 0, 0, 0, 0, 0});
  const std::vector<int32_t> order = cuda::order_layers(layer_module, totals);
  std::vector<cuda::LayerState> layers(entries.size());
  std::vector<cuda::ModuleState> states(totals.size());
  std::vector<cuda::Word> copy(rows.data, rows.data + count * rows.cols);
  std::vector<double> low(static_cast<size_t>(count * stride)), high(low.size());
  std::vector<int64_t> seen(low.size());
  std::vector<uint32_t> begin(entries.size()), end(entries.size());
  const cuda::SolveArgs solve{
      {nullptr, entries.data(), totals.data(), order.data(), 0, static_cast<int32_t>(count),
       static_cast<int32_t>(parts), 0},
      layers.data(),
      states.data(),
      copy.data(),
      {low.data(), high.data(), seen.data(), begin.data(), end.data(), stride, nullptr, nullptr, nullptr},
      bins,
      1,
      0,
      cuda::Goal::kDecide};
  cuda::solve_rows({solve, entries.data(), totals.data(), views.data, static_cast<int64_t*>(cuts.mutable_data_ptr()),
                    static_cast<int64_t*>(quota.mutable_data_ptr()),
                    static_cast<double*>(thresholds.mutable_data_ptr()),
                    static_cast<int64_t*>(next.mutable_data_ptr())});
  return {std::move(cuts), std::move(quota), std::move(thresholds), std::move(next)};
}

std::tuple<std::vector<Tensor>, Tensor> emit_op(std::vector<Tensor> weights, Ints layers, Ints modules, Tensor cuts,
                                                Tensor quota) {
  const Matrix matrix(cuts, "cuts", 2);
  const std::vector<Tensor> inputs = contiguous(weights);
  check_quota(quota, "cpu");
  Tensor left = torch::stable::clone(torch::stable::contiguous(quota));
  const Problem problem = emit_problem(inputs, layers, modules, matrix.rows, left.numel());
  check_cuts(matrix);
  std::vector<Cut> found;
  for (int64_t l = 0; l < matrix.rows; ++l) {
    const int64_t* cut = matrix.row(l);
    found.push_back({static_cast<uint32_t>(cut[0]), cut[1] < 0 ? Cut::kNoTie : static_cast<uint32_t>(cut[1])});
  }
  std::vector<Tensor> masks = empty_like(inputs, ScalarType::Bool);
  guarded([&] {
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

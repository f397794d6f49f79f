// survey, solve and emit as operators: what streams and shards are built from.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <span>
#include <tuple>

#include "../kernels/cpu/emit.h"
#include "../kernels/cpu/survey.h"
#include "../kernels/wire.h"
#include "common.h"

namespace dimap::cpu {
namespace {

using Ints = std::vector<int64_t>;

Tensor empty_cpu(std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// A contiguous int64 matrix, checked.
struct Matrix {
  Matrix(const Tensor& t, const char* name, int64_t columns) : tensor(torch::stable::contiguous(t)) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 2, name,
                    " must be an int64 matrix on cpu, got ", name_of(t.scalar_type()), " with ", t.dim(),
                    " dimensions on ", device_of(t));
    STD_TORCH_CHECK(columns < 0 || t.size(1) == columns, name, " must have ", columns, " columns, got ", t.size(1));
    data = static_cast<int64_t*>(tensor.mutable_data_ptr());
    rows = t.size(0), cols = t.size(1);
  }
  int64_t* row(int64_t i) const { return data + i * cols; }
  Tensor tensor;
  int64_t* data;
  int64_t rows, cols;
};

std::vector<WireWindow> read_windows(const Matrix& windows) {
  std::vector<WireWindow> out;
  for (int64_t l = 0; l < windows.rows; ++l) {
    const int64_t* w = windows.row(l);
    STD_TORCH_CHECK(w[1] >= 0 && w[1] <= 23 && w[0] >= 0 && w[0] < int64_t{kKeyEnd} && w[0] % (int64_t{1} << w[1]) == 0,
                    "windows[", l,
                    "] must start at a key below 2^31 that is a multiple of 2^shift, shift in [0, 23], "
                    "got key ",
                    w[0], ", shift ", w[1]);
    STD_TORCH_CHECK(w[2] >= 0 && w[2] <= 23, "windows[", l, "] must have a granularity in [0, 23], got ", w[2]);
    STD_TORCH_CHECK(w[3] >= 0 && w[3] <= int64_t{kKeyEnd} && w[4] >= 0 && w[4] <= int64_t{kKeyEnd}, "windows[", l,
                    "] must have bounds in [0, 2^31], got ", w[3], " and ", w[4]);
    const WireWindow view = read_window(w);
    STD_TORCH_CHECK(view.window.below_high >= 0 && view.window.below_high <= 1 && view.window.above_low >= 0 &&
                        view.window.above_low <= 1,
                    "windows[", l, "] must have bounds of scores in [0, 1], got ", view.window.below_high, " and ",
                    view.window.above_low);
    out.push_back(view);
  }
  return out;
}

Tensor survey_op(std::vector<Tensor> weights, Ints layers, Tensor windows, int64_t bins) {
  STD_TORCH_CHECK(bins >= kMinBins, "bins must be at least ", kMinBins, ", got ", bins);
  const Matrix matrix(windows, "windows", kWindowColumns);
  const std::vector<WireWindow> wire = read_windows(matrix);
  const std::vector<Tensor> inputs = contiguous(weights);
  check_length("layers", layers.size(), weights.size());
  Problem problem;
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_number("layers", i, layers[i], matrix.rows);
    const TensorView view = view_of(inputs[i], i, layers[i]);
    STD_TORCH_CHECK(granularity(view.dtype) >= wire[static_cast<size_t>(layers[i])].granularity, "windows[", layers[i],
                    "] must have a granularity of at most ", granularity(view.dtype), " for weights[", i, "] of ",
                    name_of(inputs[i].scalar_type()), ", got ", wire[static_cast<size_t>(layers[i])].granularity);
    problem.tensors.push_back(view);
  }
  check_same_device(inputs);
  problem.layer_module.assign(static_cast<size_t>(matrix.rows), 0);
  problem.keep.assign(1, 0);
  problem.count();
  std::vector<Window> views;
  for (const WireWindow& w : wire) views.push_back(w.window);
  const Survey seen = guarded([&] { return survey(problem, views, bins, {}, TorchPool()); });
  Tensor table = empty_cpu({matrix.rows, wire_columns(bins)}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(table.mutable_data_ptr());
  for (int64_t l = 0; l < matrix.rows; ++l)
    write_table(seen.tables[static_cast<size_t>(l)], out + l * wire_columns(bins));
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solve_op(Tensor table, Tensor windows, Ints modules, Ints keep) {
  const Matrix rows(table, "table", -1), views(windows, "windows", kWindowColumns);
  const int64_t bins = wire_bins(rows.cols);
  STD_TORCH_CHECK(bins >= kMinBins, "table must have 22 + 3 * bins columns with at least ", kMinBins, " bins, got ",
                  rows.cols, " columns");
  STD_TORCH_CHECK(views.rows == rows.rows && static_cast<int64_t>(modules.size()) == rows.rows,
                  "windows and modules must have one entry for each of the ", rows.rows, " layers, got ", views.rows,
                  " and ", modules.size());
  const std::vector<WireWindow> wire = read_windows(views);
  std::vector<std::vector<size_t>> layers(keep.size());
  std::vector<Bin> storage(static_cast<size_t>(rows.rows * bins));
  std::vector<LayerTable> tables;
  for (int64_t l = 0; l < rows.rows; ++l) {
    const auto i = static_cast<size_t>(l);
    check_number("modules", i, modules[i], static_cast<int64_t>(keep.size()));
    layers[static_cast<size_t>(modules[i])].push_back(i);
    tables.push_back(read_table(rows.row(l), wire[i],
                                std::span(storage).subspan(i * static_cast<size_t>(bins), static_cast<size_t>(bins))));
  }
  Tensor cuts = empty_cpu({rows.rows, 2}, ScalarType::Long),
         next = empty_cpu({rows.rows, kWindowColumns}, ScalarType::Long);
  const auto count = static_cast<int64_t>(keep.size());
  Tensor quota = empty_cpu({count}, ScalarType::Long), thresholds = empty_cpu({count}, ScalarType::Double);
  auto* cut_rows = static_cast<int64_t*>(cuts.mutable_data_ptr());
  auto* next_rows = static_cast<int64_t*>(next.mutable_data_ptr());
  for (size_t m = 0; m < keep.size(); ++m) {
    std::vector<LayerTable> mine;
    int64_t total = 0;
    for (const size_t l : layers[m]) mine.push_back(tables[l]), total += tables[l].total;
    STD_TORCH_CHECK(keep[m] >= 0 && keep[m] <= total, "keep[", m, "] must be in [0, ", total, "], got ", keep[m]);
    std::vector<Cut> found(mine.size());
    std::vector<Next> closer(mine.size());
    const ModuleCut result = dimap::solve(mine, keep[m], found, closer);
    static_cast<int64_t*>(quota.mutable_data_ptr())[m] = result.decided ? result.quota : -1;
    static_cast<double*>(thresholds.mutable_data_ptr())[m] =
        result.decided ? result.threshold : std::numeric_limits<double>::quiet_NaN();
    for (size_t i = 0; i < mine.size(); ++i) {
      const size_t l = layers[m][i];
      cut_rows[2 * l] = result.decided ? int64_t{found[i].keep_from} : -1;
      cut_rows[2 * l + 1] = result.decided && found[i].tie != Cut::kNoTie ? int64_t{found[i].tie} : -1;
      const Window window = result.decided ? wire[l].window : closer[i].window;
      write_window({window, wire[l].granularity}, next_rows + static_cast<int64_t>(l) * kWindowColumns);
    }
  }
  return {std::move(cuts), std::move(quota), std::move(thresholds), std::move(next)};
}

std::tuple<std::vector<Tensor>, Tensor> emit_op(std::vector<Tensor> weights, Ints layers, Ints modules, Tensor cuts,
                                                Tensor quota) {
  const Matrix matrix(cuts, "cuts", 2);
  const std::vector<Tensor> inputs = contiguous(weights);
  check_length("layers", layers.size(), weights.size());
  check_length("modules", modules.size(), weights.size());
  check_same_device(inputs);
  STD_TORCH_CHECK(quota.is_cpu() && quota.scalar_type() == ScalarType::Long && quota.dim() == 1,
                  "quota must be an int64 vector on cpu");
  Tensor left = torch::stable::clone(torch::stable::contiguous(quota));
  Problem problem;
  problem.layer_module.assign(static_cast<size_t>(matrix.rows), 0);
  problem.keep.assign(static_cast<size_t>(left.numel()), 0);
  std::vector<Cut> found;
  for (int64_t l = 0; l < matrix.rows; ++l) {
    const int64_t* cut = matrix.row(l);
    STD_TORCH_CHECK(cut[0] >= 0 && cut[0] <= int64_t{kKeyEnd} && cut[1] < cut[0], "cuts[", l,
                    "] must be decided: a key in [0, 2^31] and a smaller one or -1, got ", cut[0], " and ", cut[1]);
    found.push_back({static_cast<uint32_t>(cut[0]), cut[1] < 0 ? Cut::kNoTie : static_cast<uint32_t>(cut[1])});
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_number("layers", i, layers[i], matrix.rows);
    check_number("modules", i, modules[i], left.numel());
    problem.tensors.push_back(view_of(inputs[i], i, layers[i]));
    problem.layer_module[static_cast<size_t>(layers[i])] = static_cast<int32_t>(modules[i]);
  }
  problem.count();
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

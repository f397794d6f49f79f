// What survey, solve and emit check and work out in host memory, for both backends.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "core/solve.h"
#include "core/wire.h"

namespace dimap {

inline void check_matrix(const Tensor& t, const char* name, int64_t columns, const std::string& device) {
  DIMAP_CHECK(device_of(t) == device && t.scalar_type() == ScalarType::Long && t.dim() == 2, name,
              " must be an int64 matrix on ", device, ", got ", name_of(t.scalar_type()), " with ", t.dim(),
              " dimensions on ", device_of(t));
  DIMAP_CHECK(columns < 0 || t.size(1) == columns, name, " must have ", columns, " columns, got ", t.size(1));
}

// A matrix in host memory.
struct Rows {
  const int64_t* data;
  int64_t rows, cols;
  const int64_t* row(int64_t i) const { return data + i * cols; }
};

inline std::vector<WireWindow> read_windows(const Rows& windows) {
  std::vector<WireWindow> out;
  for (int64_t l = 0; l < windows.rows; ++l) {
    const int64_t* w = windows.row(l);
    DIMAP_CHECK(w[1] >= 0 && w[1] <= 23 && w[0] >= 0 && w[0] < int64_t{kKeyEnd} && w[0] % (int64_t{1} << w[1]) == 0,
                "windows[", l,
                "] must start at a key below 2^31 that is a multiple of 2^shift, shift in [0, 23], "
                "got key ",
                w[0], ", shift ", w[1]);
    DIMAP_CHECK(w[2] >= 0 && w[2] <= 23, "windows[", l, "] must have a granularity in [0, 23], got ", w[2]);
    DIMAP_CHECK(w[3] >= 0 && w[3] <= int64_t{kKeyEnd} && w[4] >= 0 && w[4] <= int64_t{kKeyEnd}, "windows[", l,
                "] must have bounds in [0, 2^31], got ", w[3], " and ", w[4]);
    const WireWindow view = read_window(w);
    DIMAP_CHECK(view.window.below_high >= 0 && view.window.below_high <= 1 && view.window.above_low >= 0 &&
                    view.window.above_low <= 1,
                "windows[", l, "] must have bounds of scores in [0, 1], got ", view.window.below_high, " and ",
                view.window.above_low);
    out.push_back(view);
  }
  return out;
}

inline void check_bins(int64_t bins) {
  DIMAP_CHECK(bins >= kMinBins, "bins must be at least ", kMinBins, ", got ", bins);
}

inline Problem survey_problem(const std::vector<Tensor>& inputs, const std::vector<int64_t>& layers,
                              const std::vector<WireWindow>& wire) {
  check_length("layers", layers.size(), inputs.size());
  const auto count = static_cast<int64_t>(wire.size());
  Problem problem;
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_number("layers", i, layers[i], count);
    const TensorView view = view_of(inputs[i], i, layers[i]);
    DIMAP_CHECK(granularity(view.dtype) >= wire[static_cast<size_t>(layers[i])].granularity, "windows[", layers[i],
                "] must have a granularity of at most ", granularity(view.dtype), " for weights[", i, "] of ",
                name_of(inputs[i].scalar_type()), ", got ", wire[static_cast<size_t>(layers[i])].granularity);
    problem.tensors.push_back(view);
  }
  check_same_device(inputs);
  problem.layer_module.assign(wire.size(), 0);
  problem.keep.assign(1, 0);
  problem.count();
  return problem;
}

struct Solved {
  std::vector<int64_t> cuts;       // [layers, 2]
  std::vector<int64_t> quota;      // [modules]
  std::vector<double> thresholds;  // [modules]
  std::vector<int64_t> next;       // [layers, kWindowColumns]
};

inline Solved solve_rows(const Rows& rows, const Rows& views, const std::vector<int64_t>& modules,
                         const std::vector<int64_t>& keep) {
  const int64_t bins = wire_bins(rows.cols);
  DIMAP_CHECK(bins >= kMinBins, "table must have 22 + 3 * bins columns with at least ", kMinBins, " bins, got ",
              rows.cols, " columns");
  DIMAP_CHECK(views.rows == rows.rows && static_cast<int64_t>(modules.size()) == rows.rows,
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
  Solved out;
  out.cuts.resize(static_cast<size_t>(rows.rows * 2));
  out.next.resize(static_cast<size_t>(rows.rows * kWindowColumns));
  for (size_t m = 0; m < keep.size(); ++m) {
    std::vector<LayerTable> mine;
    int64_t total = 0;
    for (const size_t l : layers[m]) mine.push_back(tables[l]), total += tables[l].total;
    DIMAP_CHECK(keep[m] >= 0 && keep[m] <= total, "keep[", m, "] must be in [0, ", total, "], got ", keep[m]);
    std::vector<Cut> found(mine.size());
    std::vector<Next> closer(mine.size());
    const ModuleCut result = dimap::solve(mine, keep[m], found, closer);
    out.quota.push_back(result.decided ? result.quota : -1);
    out.thresholds.push_back(result.decided ? result.threshold : std::numeric_limits<double>::quiet_NaN());
    for (size_t i = 0; i < mine.size(); ++i) {
      const size_t l = layers[m][i];
      out.cuts[2 * l] = result.decided ? int64_t{found[i].keep_from} : -1;
      out.cuts[2 * l + 1] = result.decided && found[i].tie != Cut::kNoTie ? int64_t{found[i].tie} : -1;
      const Window window = result.decided ? wire[l].window : closer[i].window;
      write_window({window, wire[l].granularity}, out.next.data() + l * kWindowColumns);
    }
  }
  return out;
}

// The problem of an emit, and its layers' cuts. modules: how many there are.
inline std::pair<Problem, std::vector<Cut>> emit_problem(const std::vector<Tensor>& inputs,
                                                         const std::vector<int64_t>& layers,
                                                         const std::vector<int64_t>& modules, const Rows& rows,
                                                         int64_t count) {
  check_length("layers", layers.size(), inputs.size());
  check_length("modules", modules.size(), inputs.size());
  check_same_device(inputs);
  Problem problem;
  problem.layer_module.assign(static_cast<size_t>(rows.rows), 0);
  problem.keep.assign(static_cast<size_t>(count), 0);
  std::vector<Cut> found;
  for (int64_t l = 0; l < rows.rows; ++l) {
    const int64_t* cut = rows.row(l);
    DIMAP_CHECK(cut[0] >= 0 && cut[0] <= int64_t{kKeyEnd} && cut[1] < cut[0], "cuts[", l,
                "] must be decided: a key in [0, 2^31] and a smaller one or -1, got ", cut[0], " and ", cut[1]);
    found.push_back({static_cast<uint32_t>(cut[0]), cut[1] < 0 ? Cut::kNoTie : static_cast<uint32_t>(cut[1])});
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_number("layers", i, layers[i], rows.rows);
    check_number("modules", i, modules[i], count);
    problem.tensors.push_back(view_of(inputs[i], i, layers[i]));
    problem.layer_module[static_cast<size_t>(layers[i])] = static_cast<int32_t>(modules[i]);
  }
  problem.count();
  return {std::move(problem), std::move(found)};
}

inline void check_quota(const Tensor& quota, const std::string& device) {
  DIMAP_CHECK(device_of(quota) == device && quota.scalar_type() == ScalarType::Long && quota.dim() == 1,
              "quota must be an int64 vector on ", device);
}

}  // namespace dimap

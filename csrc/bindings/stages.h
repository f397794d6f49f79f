// What survey, solve and emit check, for both backends.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "core/solve.h"
#include "core/wire.h"
#include "cuda/host.h"

namespace dimap {

// What the solver for the device writes a second time.
static_assert(cuda::kWindowRow == kWindowColumns && cuda::kLeastBins == kMinBins && cuda::kNoTie == Cut::kNoTie);
static_assert(cuda::kWords == kWireWords && cuda::kHead == kWireHead);
static_assert(cuda::columns_of(kMinBins) == wire_columns(kMinBins) &&
              wire_bins(cuda::columns_of(kMinBins)) == kMinBins);

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

inline void check_windows(const Rows& windows) {
  for (int64_t l = 0; l < windows.rows; ++l) {
    const int64_t* w = windows.row(l);
    switch (cuda::fault_of(w)) {
      case cuda::WindowFault::kNone:
        break;
      case cuda::WindowFault::kBase:
        DIMAP_CHECK(false, "windows[", l,
                    "] must start at a key below 2^31 that is a multiple of 2^shift, shift in [0, 23], got key ", w[0],
                    ", shift ", w[1]);
      case cuda::WindowFault::kGranularity:
        DIMAP_CHECK(false, "windows[", l, "] must have a granularity in [0, 23], got ", w[2]);
      case cuda::WindowFault::kKeys:
        DIMAP_CHECK(false, "windows[", l, "] must have bounds in [0, 2^31], got ", w[3], " and ", w[4]);
      case cuda::WindowFault::kScores:
        DIMAP_CHECK(false, "windows[", l, "] must have bounds of scores in [0, 1], got ",
                    double_of(static_cast<uint64_t>(w[5])), " and ", double_of(static_cast<uint64_t>(w[6])));
    }
  }
}

inline void check_bins(int64_t bins) {
  DIMAP_CHECK(bins >= kMinBins, "bins must be at least ", kMinBins, ", got ", bins);
}

// rows: of the windows.
inline Problem survey_problem(const std::vector<Tensor>& inputs, const std::vector<int64_t>& layers, int64_t rows) {
  check_length("layers", layers.size(), inputs.size());
  Problem problem;
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_number("layers", i, layers[i], rows);
    problem.tensors.push_back(view_of(inputs[i], i, layers[i]));
  }
  check_same_device(inputs);
  problem.layer_module.assign(static_cast<size_t>(rows), 0);
  problem.keep.assign(1, 0);
  problem.count();
  return problem;
}

inline void check_granularities(const std::vector<Tensor>& inputs, const Problem& problem, const Rows& windows) {
  for (size_t i = 0; i < problem.tensors.size(); ++i) {
    const TensorView& view = problem.tensors[i];
    DIMAP_CHECK(granularity(view.dtype) >= windows.row(view.layer)[2], "windows[", view.layer,
                "] must have a granularity of at most ", granularity(view.dtype), " for weights[", i, "] of ",
                name_of(inputs[i].scalar_type()), ", got ", windows.row(view.layer)[2]);
  }
}

// The shapes that `solve` is given. Returns the bins of a row.
inline int check_solve(const Tensor& table, const Tensor& windows, const std::vector<int64_t>& modules,
                       const std::vector<int64_t>& keep, const std::string& device) {
  check_matrix(table, "table", -1, device);
  check_matrix(windows, "windows", kWindowColumns, device);
  const int64_t bins = wire_bins(table.size(1));
  DIMAP_CHECK(bins >= kMinBins, "table must have 22 + 3 * bins columns with at least ", kMinBins, " bins, got ",
              table.size(1), " columns");
  DIMAP_CHECK(windows.size(0) == table.size(0) && static_cast<int64_t>(modules.size()) == table.size(0),
              "windows and modules must have one entry for each of the ", table.size(0), " layers, got ",
              windows.size(0), " and ", modules.size());
  for (size_t l = 0; l < modules.size(); ++l) check_number("modules", l, modules[l], static_cast<int64_t>(keep.size()));
  return static_cast<int>(bins);
}

// table: at least the first column.
inline void check_keep(const Rows& table, const std::vector<int64_t>& modules, const std::vector<int64_t>& keep) {
  std::vector<int64_t> totals(keep.size());
  for (int64_t l = 0; l < table.rows; ++l)
    totals[static_cast<size_t>(modules[static_cast<size_t>(l)])] += table.row(l)[0];
  for (size_t m = 0; m < keep.size(); ++m)
    DIMAP_CHECK(keep[m] >= 0 && keep[m] <= totals[m], "keep[", m, "] must be in [0, ", totals[m], "], got ", keep[m]);
}

inline void check_cuts(const Rows& cuts) {
  for (int64_t l = 0; l < cuts.rows; ++l)
    DIMAP_CHECK(cuda::is_cut(cuts.row(l)), "cuts[", l,
                "] must be decided: a key in [0, 2^31] and a smaller one or -1, got ", cuts.row(l)[0], " and ",
                cuts.row(l)[1]);
}

// The problem of an emit. rows: of the cuts; count: of the modules.
inline Problem emit_problem(const std::vector<Tensor>& inputs, const std::vector<int64_t>& layers,
                            const std::vector<int64_t>& modules, int64_t rows, int64_t count) {
  check_length("layers", layers.size(), inputs.size());
  check_length("modules", modules.size(), inputs.size());
  check_same_device(inputs);
  Problem problem;
  problem.layer_module.assign(static_cast<size_t>(rows), 0);
  problem.keep.assign(static_cast<size_t>(count), 0);
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_number("layers", i, layers[i], rows);
    check_number("modules", i, modules[i], count);
    problem.tensors.push_back(view_of(inputs[i], i, layers[i]));
    problem.layer_module[static_cast<size_t>(layers[i])] = static_cast<int32_t>(modules[i]);
  }
  problem.count();
  return problem;
}

inline void check_quota(const Tensor& quota, const std::string& device) {
  DIMAP_CHECK(device_of(quota) == device && quota.scalar_type() == ScalarType::Long && quota.dim() == 1,
              "quota must be an int64 vector on ", device);
}

}  // namespace dimap

// survey, solve and emit on CUDA: the tables that streams, shards and devices add up stay on the device.
//
// Unlike select and prune_ these wait for the device: windows, tables and cuts are small, are checked and solved on the
// host, and a survey says at once whether a weight is not finite.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/cuda_common.h"
#include "bindings/stages.h"

namespace dimap::cuda {
namespace {

// A contiguous int64 matrix, checked and copied to the host.
struct Matrix : Rows {
  Matrix(const Device& device, const Tensor& t, const char* name, int64_t columns) {
    check_matrix(t, name, columns, device_of(device.like()));
    rows = t.size(0), cols = t.size(1);
    copy = device.to_host<int64_t>(t);
    data = copy.data();
  }
  std::vector<int64_t> copy;
};

// Raises for the first weight that is an infinity or a NaN; there is one.
[[noreturn]] void raise_non_finite(const Device& device, const Problem& problem) {
  for (size_t t = 0; t < problem.tensors.size(); ++t) {
    const TensorView& view = problem.tensors[t];
    std::vector<char> bytes(static_cast<size_t>(view.numel * size_of(view.dtype)));
    device.copy_to_host(bytes.data(), view.data, bytes.size());
    for (int64_t i = 0; i < view.numel; ++i) {
      uint32_t word = 0;
      std::memcpy(&word, bytes.data() + i * size_of(view.dtype), static_cast<size_t>(size_of(view.dtype)));
      const auto half = static_cast<uint16_t>(word);
      const uint32_t key = view.dtype == DType::kFloat32    ? key_of<DType::kFloat32>(word)
                           : view.dtype == DType::kBFloat16 ? key_of<DType::kBFloat16>(half)
                                                            : key_of<DType::kFloat16>(half);
      if (key < kNonFinite) continue;
      const auto size = static_cast<size_t>(size_of(view.dtype));
      throw_non_finite(static_cast<int64_t>(t), i, non_finite_name(key, word, size));
    }
  }
  DIMAP_CHECK(false, "weights must be finite");
  __builtin_unreachable();
}

Tensor survey_op(std::vector<Tensor> weights, Ints layers, Tensor windows, int64_t bins) {
  check_bins(bins);
  const Device device = weights.empty() ? Device(windows) : device_of_all(weights);
  const Matrix matrix(device, windows, "windows", kWindowColumns);
  const std::vector<WireWindow> wire = read_windows(matrix);
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = survey_problem(inputs, layers, wire);
  const int64_t columns = wire_columns(bins);
  Tensor table = device.empty({matrix.rows, columns}, ScalarType::Long);
  auto* rows = static_cast<Word*>(table.mutable_data_ptr());
  check(cudaMemsetAsync(rows, 0, static_cast<size_t>(matrix.rows * columns) * sizeof(Word), device.stream));
  const HostPlan host(problem, {});
  if (host.chunks() == 0) return table;

  // Shared memory holds most_bins of a window: wider ones are read in parts, the highest of which sums what is above.
  const int64_t parts = (bins + kTuning.most_bins - 1) / kTuning.most_bins;
  Workspace space;
  char* blob = nullptr;
  LayerState* states = nullptr;
  int32_t* bad = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    blob = space.take<char>(host.bytes());
    states = space.take<LayerState>(matrix.rows);
    bad = space.take<int32_t>(1);
  }
  const Plan plan = host.send(blob, device.stream);
  check(cudaMemsetAsync(bad, 0, sizeof(int32_t), device.stream));
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * kTuning.most_bins;
    std::vector<LayerState> views(wire.size());
    for (size_t l = 0; l < wire.size(); ++l) {
      const Window& window = wire[l].window;
      const int64_t base = std::min<int64_t>(window.base + (first << window.shift), kKeyEnd);
      const int64_t fit = (kKeyEnd - base) >> window.shift;  // bins beyond hold no key
      const int64_t used = std::min({fit, bins - first, int64_t{kTuning.most_bins}});
      views[l].view = {
          static_cast<uint32_t>(base), static_cast<uint32_t>(window.shift), static_cast<uint32_t>(used), kKeyEnd, 0, 0};
    }
    check(upload(states, views.data(), static_cast<int64_t>(views.size() * sizeof(LayerState)), device.stream));
    check(survey(plan, states, rows, static_cast<int>(bins), static_cast<int>(first), part == parts - 1, bad,
                 device.stream));
  }
  int32_t found = 0;
  device.copy_to_host(&found, bad, sizeof found);
  if (found) raise_non_finite(device, problem);
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solve_op(Tensor table, Tensor windows, Ints modules, Ints keep) {
  const Device device(table);
  const Matrix rows(device, table, "table", -1), views(device, windows, "windows", kWindowColumns);
  const Solved solved = solve_rows(rows, views, modules, keep);
  const auto count = static_cast<int64_t>(keep.size());
  return {device.from_host<int64_t>(solved.cuts, {rows.rows, 2}, ScalarType::Long),
          device.from_host<int64_t>(solved.quota, {count}, ScalarType::Long),
          device.from_host<double>(solved.thresholds, {count}, ScalarType::Double),
          device.from_host<int64_t>(solved.next, {rows.rows, kWindowColumns}, ScalarType::Long)};
}

std::tuple<std::vector<Tensor>, Tensor> emit_op(std::vector<Tensor> weights, Ints layers, Ints modules, Tensor cuts,
                                                Tensor quota) {
  const Device device = weights.empty() ? Device(cuts) : device_of_all(weights);
  const Matrix matrix(device, cuts, "cuts", 2);
  check_quota(quota, device_of(device.like()));
  const std::vector<Tensor> inputs = contiguous(weights);
  Tensor left = torch::stable::clone(torch::stable::contiguous(quota));
  const auto [problem, found] = emit_problem(inputs, layers, modules, matrix, left.numel());
  std::vector<Tensor> masks = device.empty_like(inputs, ScalarType::Bool);
  const HostPlan host(problem, pointers(masks));
  if (host.chunks() == 0) return {std::move(masks), std::move(left)};
  std::vector<LayerState> states(found.size());
  for (size_t l = 0; l < found.size(); ++l) {
    states[l].keep_from = found[l].keep_from;
    states[l].tie = found[l].tie;
  }
  Workspace space;
  char* blob = nullptr;
  LayerState* there = nullptr;
  int32_t* bad = nullptr;
  EmitArgs args{};
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    blob = space.take<char>(host.bytes());
    there = space.take<LayerState>(matrix.rows);
    bad = space.take<int32_t>(1);
    args.ties = space.take<int32_t>(host.chunks());
    args.kept = space.take<int32_t>(host.chunks());
  }
  args.plan = host.send(blob, device.stream);
  check(upload(there, states.data(), static_cast<int64_t>(states.size() * sizeof(LayerState)), device.stream));
  check(cudaMemsetAsync(bad, 0, sizeof(int32_t), device.stream));
  args.layers = there;
  args.bad = bad;
  args.quota = static_cast<int64_t*>(left.mutable_data_ptr());
  check(emit(args, false, device.stream));
  return {std::move(masks), std::move(left)};
}

}  // namespace
}  // namespace dimap::cuda

STABLE_TORCH_LIBRARY_IMPL(dimap, CUDA, m) {
  m.impl("survey", TORCH_BOX(&dimap::cuda::survey_op));
  m.impl("solve", TORCH_BOX(&dimap::cuda::solve_op));
  m.impl("emit", TORCH_BOX(&dimap::cuda::emit_op));
}

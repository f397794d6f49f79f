// survey, solve and emit on CUDA: the tables that streams, shards and devices add up stay on the device.
//
// Windows, tables and cuts stay on the device. Unlike select and prune_ these wait for it, for one word: whether they
// can be used, and of a survey whether a weight is not finite.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/cuda_common.h"
#include "bindings/stages.h"

namespace dimap::cuda {
namespace {

// A matrix that the device has refused, on the host, to say why.
struct Matrix : Rows {
  Matrix(const Device& device, const Tensor& t) : copy(device.to_host<int64_t>(t)) {
    data = copy.data(), rows = t.size(0), cols = t.size(1);
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

// Whether a stage was refused its rows, or found what is not finite. Waits for the device.
int32_t fault_of_stage(const Device& device, const int32_t* bad) {
  int32_t found = 0;
  device.copy_to_host(&found, bad, sizeof found);
  return found;
}

Tensor survey_op(std::vector<Tensor> weights, Ints layers, Tensor windows, int64_t bins) {
  check_bins(bins);
  const Device device = weights.empty() ? Device(windows) : device_of_all(weights);
  check_matrix(windows, "windows", kWindowColumns, device_of(device.like()));
  const int64_t count = windows.size(0);
  const Tensor rows = torch::stable::contiguous(windows);
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = survey_problem(inputs, layers, count);
  const HostPlan host(problem, {});
  Tensor table = device.empty({count, wire_columns(bins)}, ScalarType::Long);
  auto* words = static_cast<Word*>(table.mutable_data_ptr());
  check(cudaMemsetAsync(words, 0, static_cast<size_t>(table.numel()) * sizeof(Word), device.stream));
  Workspace space;
  char* blob = nullptr;
  LayerState* states = nullptr;
  int32_t* bad = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    blob = space.take<char>(host.bytes());
    states = space.take<LayerState>(count);
    bad = space.take<int32_t>(1);
  }
  check(cudaMemsetAsync(bad, 0, sizeof(int32_t), device.stream));
  check(survey(host.send(blob, device.stream), static_cast<const int64_t*>(rows.const_data_ptr()), states, words,
               static_cast<int>(bins), bad, device.stream));
  if (const int32_t fault = fault_of_stage(device, bad); fault == kBadRows) {
    const Matrix matrix(device, windows);
    check_windows(matrix);
    check_granularities(inputs, problem, matrix);
  } else if (fault) {
    raise_non_finite(device, problem);
  }
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solve_op(Tensor table, Tensor windows, Ints modules, Ints keep) {
  const Device device(table);
  const int bins = check_solve(table, windows, modules, keep, device_of(table));
  const auto layers = static_cast<int64_t>(modules.size()), parts = static_cast<int64_t>(keep.size());
  const Tensor copy = torch::stable::clone(torch::stable::contiguous(table));  // exact scores change it
  const Tensor views = torch::stable::contiguous(windows);
  Tensor cuts = device.empty({layers, 2}, ScalarType::Long), quota = device.empty({parts}, ScalarType::Long);
  Tensor thresholds = device.empty({parts}, ScalarType::Double);
  Tensor next = device.empty({layers, kWindowColumns}, ScalarType::Long);
  Problem problem;
  problem.layer_module.assign(modules.begin(), modules.end());
  problem.keep = keep;
  problem.count();
  const HostPlan host(problem, {});
  Workspace space;
  RowArgs args{};
  SolveArgs& s = args.solve;
  char* blob = nullptr;
  int32_t* bad = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    blob = space.take<char>(host.bytes());
    s.layers = space.take<LayerState>(layers);
    s.modules = space.take<ModuleState>(parts);
    s.scratch = take_scratch(space, layers, parts, bins + 2);
    bad = space.take<int32_t>(1);
  }
  check(cudaMemsetAsync(bad, 0, sizeof(int32_t), device.stream));
  s.plan = host.send(blob, device.stream);
  s.table = static_cast<Word*>(copy.mutable_data_ptr());
  s.bins = bins;
  s.sample_ratio = 1;
  s.goal = Goal::kDecide;
  args.layers = const_cast<LayerEntry*>(s.plan.layers);  // of this call's workspace
  args.modules = const_cast<ModuleEntry*>(s.plan.modules);
  args.windows = static_cast<const int64_t*>(views.const_data_ptr());
  args.cuts = static_cast<int64_t*>(cuts.mutable_data_ptr());
  args.quota = static_cast<int64_t*>(quota.mutable_data_ptr());
  args.thresholds = static_cast<double*>(thresholds.mutable_data_ptr());
  args.next = static_cast<int64_t*>(next.mutable_data_ptr());
  check(solve(args, bad, device.stream));
  if (fault_of_stage(device, bad)) {
    check_windows(Matrix(device, windows));
    check_keep(Matrix(device, table), modules, keep);
  }
  return {std::move(cuts), std::move(quota), std::move(thresholds), std::move(next)};
}

std::tuple<std::vector<Tensor>, Tensor> emit_op(std::vector<Tensor> weights, Ints layers, Ints modules, Tensor cuts,
                                                Tensor quota) {
  const Device device = weights.empty() ? Device(cuts) : device_of_all(weights);
  check_matrix(cuts, "cuts", 2, device_of(device.like()));
  check_quota(quota, device_of(device.like()));
  const Tensor rows = torch::stable::contiguous(cuts);
  const std::vector<Tensor> inputs = contiguous(weights);
  Tensor left = torch::stable::clone(torch::stable::contiguous(quota));
  const Problem problem = emit_problem(inputs, layers, modules, cuts.size(0), left.numel());
  std::vector<Tensor> masks = device.empty_like(inputs, ScalarType::Bool);
  const HostPlan host(problem, pointers(masks));
  Workspace space;
  char* blob = nullptr;
  LayerState* states = nullptr;
  int32_t* bad = nullptr;
  EmitArgs args{};
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    blob = space.take<char>(host.bytes());
    states = space.take<LayerState>(cuts.size(0));
    bad = space.take<int32_t>(1);
    args.ties = space.take<int32_t>(host.chunks());
    args.kept = space.take<int32_t>(host.chunks());
  }
  check(cudaMemsetAsync(bad, 0, sizeof(int32_t), device.stream));
  check(take_cuts(static_cast<const int64_t*>(rows.const_data_ptr()), states, cuts.size(0), bad, device.stream));
  if (fault_of_stage(device, bad)) check_cuts(Matrix(device, cuts));
  args.plan = host.send(blob, device.stream);
  args.layers = states;
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

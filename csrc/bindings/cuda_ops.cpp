// score, select, prune_ and their kin on CUDA: checks, contiguous views, workspace, then the kernels. Nothing waits for
// the device: weights that are not finite give thresholds of -1 and scores of NaN, and nothing is pruned.
#include <torch/csrc/stable/library.h>

#include <functional>
#include <tuple>

#include "bindings/cuda_common.h"

namespace dimap::cuda {
namespace {

constexpr int64_t kTableBytes = int64_t{16} << 20;  // of all windows' bins and bounds, about

int bins_for(int64_t layers) {
  int64_t bins = kTuning.most_bins;
  while (bins > kLeastBins && bins * 48 * layers > kTableBytes) bins /= 2;
  return static_cast<int>(bins);
}

// Bytes for what is set aside of a chunk: a share of the weights' bytes and a constant, for all chunks together.
int32_t aside_stride(const Problem& problem, int64_t chunks) {
  int64_t bytes = 0;
  for (const TensorView& t : problem.tensors) bytes += t.numel * size_of(t.dtype);
  const int64_t budget = bytes / kTuning.aside_share + kTuning.aside_budget;
  const int64_t each = budget / std::max<int64_t>(chunks, 1) / 16 * 16;
  return static_cast<int32_t>(std::clamp<int64_t>(each, kTuning.least_aside, kTuning.most_aside));
}

// One run of 32 weights in how many is sampled, at most.
int32_t sample_ratio(const Problem& problem) {
  int64_t weights = 0;
  for (const TensorView& t : problem.tensors) weights += t.numel;
  int32_t ratio = kTuning.sample_ratio;
  while (ratio < kMostRatio && weights / (2 * int64_t{ratio}) >= kTuning.sample_most) ratio *= 2;
  return ratio;
}

// Decides the cuts and writes masks, or zeroes in place where `masks` is empty. masks() makes them, [tensors], while
// the device is at work already. Thresholds: [modules] or null.
void run(const Device& device, const Problem& problem, const std::function<std::vector<void*>()>& masks,
         double* thresholds) {
  HostPlan host(problem, {});
  const auto layers = static_cast<int64_t>(problem.layers()), modules = static_cast<int64_t>(problem.modules());
  const int bins = bins_for(layers);
  Workspace space;
  DecideArgs args{};
  EmitArgs emit_args{};
  SolveArgs& s = args.solve;
  char* blob = nullptr;
  args.aside.stride = aside_stride(problem, host.chunks());
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    blob = space.take<char>(host.bytes());
    s.layers = space.take<LayerState>(layers);
    s.modules = space.take<ModuleState>(modules);
    s.table = space.take<Word>(layers * columns_of(bins));
    s.scratch = take_scratch(space, layers, modules, bins + 2);
    args.heads = space.take<Word>(layers * kHead);
    args.bad = space.take<int32_t>(1);
    args.quota = space.take<int64_t>(modules);
    args.aside.slots = space.take<char>(host.chunks() * args.aside.stride);
    args.aside.count = space.take<int32_t>(host.chunks());
    emit_args.ties = space.take<int32_t>(host.chunks());
    emit_args.kept = space.take<int32_t>(host.chunks());
  }
  s.plan = emit_args.plan = host.send(blob, device.stream);
  s.bins = bins;
  s.sample_ratio = sample_ratio(problem);
  s.most_aside = args.aside.stride / 6;
  args.thresholds = thresholds;
  emit_args.layers = s.layers;
  emit_args.quota = args.quota;
  emit_args.aside = args.aside;
  emit_args.bad = args.bad;
  check(guess(args, device.stream));
  if (masks) host.send_outs(blob, masks(), device.stream);
  const bool zero = !masks;
  check(read({s.plan, s.layers, s.table, args.aside, bins, args.bad}, !zero, device.stream));
  check(finish(args, device.stream));
  check(emit(emit_args, zero, device.stream));
}

std::tuple<std::vector<Tensor>, Tensor> select_cuts_op(std::vector<Tensor> weights, Ints layers, Ints modules,
                                                       Ints keep) {
  const Device device = device_of_all(weights);
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = modules_problem(inputs, layers, modules, keep);
  std::vector<Tensor> masks;
  Tensor thresholds = device.empty({static_cast<int64_t>(keep.size())}, ScalarType::Double);
  const auto make = [&] {
    masks = device.empty_like(inputs, ScalarType::Bool);
    return pointers(masks);
  };
  run(device, problem, make, static_cast<double*>(thresholds.mutable_data_ptr()));
  return {std::move(masks), std::move(thresholds)};
}

std::vector<Tensor> select_op(std::vector<Tensor> weights, Ints layers, Ints modules, Ints keep) {
  return std::get<0>(select_cuts_op(std::move(weights), std::move(layers), std::move(modules), std::move(keep)));
}

void prune_op(std::vector<Tensor> weights, Ints layers, Ints modules, Ints keep) {
  const Device device = device_of_all(weights);
  const std::vector<Tensor> inputs = writable(weights);
  run(device, modules_problem(inputs, layers, modules, keep), {}, nullptr);
  write_back(weights, inputs);
}

void apply_op(std::vector<Tensor> weights, std::vector<Tensor> masks) {
  DIMAP_CHECK(masks.size() == weights.size(), "masks must have one entry for each of the ", weights.size(),
              " weights, got ", masks.size());
  if (weights.empty()) return;
  for (size_t i = 0; i < weights.size(); ++i) {
    DIMAP_CHECK(masks[i].scalar_type() == ScalarType::Bool, "masks[", i, "] must be bool, got ",
                name_of(masks[i].scalar_type()));
    DIMAP_CHECK(device_of(masks[i]) == device_of(weights[i]), "masks[", i, "] must be on ", device_of(weights[i]),
                " like weights[", i, "], got ", device_of(masks[i]));
    DIMAP_CHECK(std::equal(weights[i].sizes().begin(), weights[i].sizes().end(), masks[i].sizes().begin(),
                           masks[i].sizes().end()),
                "masks[", i, "] must have the shape of weights[", i, "]");
  }
  const Device device = device_of_all(weights);
  const std::vector<Tensor> inputs = writable(weights), bytes = contiguous(masks);
  const Problem problem = layers_problem(inputs, Ints(weights.size(), 0));
  const HostPlan host(problem, pointers(bytes));
  Workspace space;
  space.take<char>(host.bytes());
  space.allocate(device);
  check(apply(host.send(space.take<char>(host.bytes()), device.stream), device.stream));
  write_back(weights, inputs);
}

// masks: [weights], or empty where the weights are to be zeroed.
void run_groups(const Device& device, const std::vector<Tensor>& inputs, const std::vector<Tensor>& masks, int64_t n,
                int64_t m, int64_t dim) {
  const std::vector<GroupShape> shapes = group_shapes(inputs, n, m, dim);
  std::vector<GroupEntry> entries;
  int64_t pieces = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const TensorView view = view_of(inputs[i], i, 0);
    const int64_t groups = shapes[i].blocks * shapes[i].inner;
    entries.push_back({view.data, masks.empty() ? nullptr : masks[i].mutable_data_ptr(), groups, shapes[i].inner,
                       pieces, static_cast<int32_t>(view.dtype), 0});
    pieces += (groups + kGroupsInPiece - 1) / kGroupsInPiece;
  }
  entries.push_back({nullptr, nullptr, 0, 1, pieces, 0, 0});
  const auto bytes = static_cast<int64_t>(entries.size() * sizeof(GroupEntry));
  Workspace space;
  char* table = nullptr;
  int32_t* bad = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    table = space.take<char>(bytes);
    bad = space.take<int32_t>(1);
  }
  check(upload(table, entries.data(), bytes, device.stream));
  check(nm({reinterpret_cast<const GroupEntry*>(table), static_cast<int32_t>(inputs.size()), static_cast<int32_t>(n),
            static_cast<int32_t>(m), pieces, bad},
           masks.empty(), device.stream));
}

std::vector<Tensor> select_nm_op(std::vector<Tensor> weights, int64_t n, int64_t m, int64_t dim) {
  const Device device = device_of_all(weights);
  const std::vector<Tensor> inputs = contiguous(weights);
  group_shapes(inputs, n, m, dim);  // before anything is allocated
  std::vector<Tensor> masks = device.empty_like(inputs, ScalarType::Bool);
  run_groups(device, inputs, masks, n, m, dim);
  return masks;
}

void nm_op(std::vector<Tensor> weights, int64_t n, int64_t m, int64_t dim) {
  const Device device = device_of_all(weights);
  const std::vector<Tensor> inputs = writable(weights);
  run_groups(device, inputs, {}, n, m, dim);
  write_back(weights, inputs);
}

}  // namespace
}  // namespace dimap::cuda

STABLE_TORCH_LIBRARY_IMPL(dimap, CUDA, m) {
  m.impl("select", TORCH_BOX(&dimap::cuda::select_op));
  m.impl("prune_", TORCH_BOX(&dimap::cuda::prune_op));
  m.impl("select_cuts", TORCH_BOX(&dimap::cuda::select_cuts_op));
  m.impl("apply_", TORCH_BOX(&dimap::cuda::apply_op));
  m.impl("select_nm", TORCH_BOX(&dimap::cuda::select_nm_op));
  m.impl("nm_", TORCH_BOX(&dimap::cuda::nm_op));
}

// score on CUDA: layers of one 16-bit type by histogram and table, the others by a sort of their keys.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "bindings/cuda_common.h"

namespace dimap::cuda {
namespace {

constexpr int64_t kTableLayers = 128;  // at a time: 256 KiB of workspace each

// The layers of `members` only, numbered anew.
Problem part_of(const Problem& problem, std::span<const int32_t> members, std::span<void* const> scores,
                std::vector<void*>& outs) {
  std::vector<int32_t> number(problem.layers(), -1);
  for (size_t i = 0; i < members.size(); ++i) number[static_cast<size_t>(members[i])] = static_cast<int32_t>(i);
  Problem part;
  part.layer_module.assign(members.size(), 0);
  part.keep.assign(1, 0);
  outs.clear();
  for (size_t t = 0; t < problem.tensors.size(); ++t) {
    TensorView view = problem.tensors[t];
    if (number[static_cast<size_t>(view.layer)] < 0) continue;
    view.layer = number[static_cast<size_t>(view.layer)];
    part.tensors.push_back(view);
    outs.push_back(scores[t]);
  }
  part.count();
  return part;
}

void score_tables(const Device& device, const Problem& problem, std::span<const int32_t> layers, DType dtype,
                  std::span<void* const> scores, int32_t* bad) {
  for (size_t first = 0; first < layers.size(); first += kTableLayers) {
    std::vector<void*> outs;
    const Problem part =
        part_of(problem, layers.subspan(first, std::min<size_t>(kTableLayers, layers.size() - first)), scores, outs);
    for (const int64_t total : part.layer_total)
      STD_TORCH_CHECK(total < int64_t{1} << 32, "a layer scored on CUDA must have fewer than 2^32 weights, got ",
                      total);
    const HostPlan host(part, outs);
    const auto count = static_cast<int64_t>(part.layers());
    Workspace space;
    TableArgs args{};
    char* blob = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (pass) space.allocate(device);
      blob = space.take<char>(host.bytes());
      args.histogram = space.take<uint32_t>(count << 15);
      args.table = space.take<float>(count << 15);
    }
    args.plan = host.send(blob, device.stream);
    args.dtype = dtype;
    args.bad = bad;
    check(score_by_table(args, device.stream));
  }
}

// torch's own sort: on CUDA a radix sort, where CUB's headers would add minutes to the build.
std::tuple<Tensor, Tensor> sort_largest_first(const Tensor& keys) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(keys), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

void score_sorted(const Device& device, const Problem& problem, int32_t layer, std::span<void* const> scores,
                  int32_t* bad) {
  const int64_t n = problem.layer_total[static_cast<size_t>(layer)];
  if (n == 0) return;
  STD_TORCH_CHECK(n < int64_t{1} << 31, "a float32 layer scored on CUDA must have fewer than 2^31 weights, got ", n);
  Tensor keys = device.empty({n}, ScalarType::Int);
  auto* key = static_cast<int32_t*>(keys.mutable_data_ptr());
  std::vector<std::pair<int64_t, size_t>> members;  // where in the layer a tensor starts
  int64_t start = 0;
  for (size_t t = 0; t < problem.tensors.size(); ++t) {
    const TensorView& view = problem.tensors[t];
    if (view.layer != layer || view.numel == 0) continue;
    check(write_keys(view.data, view.dtype, view.numel, key + start, device.stream));
    members.emplace_back(start, t);
    start += view.numel;
  }
  const auto [sorted, positions] = sort_largest_first(keys);
  Workspace space;
  SortedArgs args{};
  const bool one = members.size() == 1;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    args.sums = space.take<double>(n);
    args.tiles = space.take<double>(tiles_of(n));
    args.scores = space.take<float>(one ? 0 : n);
  }
  if (one) args.scores = static_cast<float*>(scores[members[0].second]);
  args.keys = static_cast<const int32_t*>(sorted.const_data_ptr());
  args.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  args.n = n;
  args.bad = bad;
  check(scores_of_sorted(args, device.stream));
  if (one) return;
  for (const auto& [at, t] : members)
    check(cudaMemcpyAsync(scores[t], args.scores + at, static_cast<size_t>(problem.tensors[t].numel) * sizeof(float),
                          cudaMemcpyDeviceToDevice, device.stream));
}

std::vector<Tensor> score_op(std::vector<Tensor> weights, Ints layers) {
  const Device device = device_of_all(weights);
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = layers_problem(inputs, layers);
  std::vector<Tensor> scores = device.empty_like(inputs, ScalarType::Float);
  const std::vector<void*> outs = pointers(scores);
  const Tensor flag = device.empty({1}, ScalarType::Int);
  auto* bad = static_cast<int32_t*>(flag.mutable_data_ptr());
  check(cudaMemsetAsync(bad, 0, sizeof(int32_t), device.stream));

  std::vector<int32_t> types(problem.layers(), -1);  // a DType, or kMixed
  constexpr int32_t kMixed = 3;
  for (const TensorView& t : problem.tensors) {
    int32_t& type = types[static_cast<size_t>(t.layer)];
    type = type < 0 || type == static_cast<int32_t>(t.dtype) ? static_cast<int32_t>(t.dtype) : kMixed;
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::vector<int32_t> members;
    for (size_t l = 0; l < types.size(); ++l)
      if (types[l] == static_cast<int32_t>(dtype)) members.push_back(static_cast<int32_t>(l));
    if (!members.empty()) score_tables(device, problem, members, dtype, outs, bad);
  }
  for (size_t l = 0; l < types.size(); ++l)
    if (types[l] == static_cast<int32_t>(DType::kFloat32) || types[l] == kMixed)
      score_sorted(device, problem, static_cast<int32_t>(l), outs, bad);
  for (size_t t = 0; t < outs.size(); ++t)
    check(spoil(static_cast<float*>(outs[t]), problem.tensors[t].numel, bad, device.stream));
  return scores;
}

}  // namespace
}  // namespace dimap::cuda

STABLE_TORCH_LIBRARY_IMPL(dimap, CUDA, m) { m.impl("score", TORCH_BOX(&dimap::cuda::score_op)); }

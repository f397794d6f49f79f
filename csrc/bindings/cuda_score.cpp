// score on CUDA: small layers by a block for each, those of one 16-bit type by histogram and table, the others by
// buckets.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "bindings/cuda_common.h"

namespace dimap::cuda {
namespace {

constexpr int64_t kTableLayers = 128;                 // at a time: 256 KiB of workspace each
constexpr size_t kBucketLayers = 256;                 // at a time: 100 KB each, and
constexpr int64_t kBucketWeights = int64_t{1} << 25;  // 8 bytes each

// The layers of `members` only, numbered anew: each a module, its tensors side by side.
Problem part_of(const Problem& problem, std::span<const int32_t> members, std::span<void* const> scores,
                std::vector<void*>& outs) {
  std::vector<int32_t> number(problem.layers(), -1);
  for (size_t i = 0; i < members.size(); ++i) number[static_cast<size_t>(members[i])] = static_cast<int32_t>(i);
  std::vector<std::pair<int32_t, size_t>> order;
  for (size_t t = 0; t < problem.tensors.size(); ++t)
    if (const int32_t layer = number[static_cast<size_t>(problem.tensors[t].layer)]; layer >= 0)
      order.emplace_back(layer, t);
  std::sort(order.begin(), order.end());
  Problem part;
  for (size_t i = 0; i < members.size(); ++i) part.layer_module.push_back(static_cast<int32_t>(i));
  part.keep.assign(members.size(), 0);
  outs.clear();
  for (const auto& [layer, t] : order) {
    part.tensors.push_back(problem.tensors[t]);
    part.tensors.back().layer = layer;
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
      DIMAP_CHECK(total < int64_t{1} << 32, "a layer scored on CUDA must have fewer than 2^32 weights, got ", total);
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

void score_buckets(const Device& device, const Problem& part, std::span<void* const> outs, int32_t* bad) {
  const HostPlan host(part, outs);
  const auto count = static_cast<int64_t>(part.layers());
  Ints starts{0};
  for (const int64_t total : part.layer_total) starts.push_back(starts.back() + total);
  Workspace space;
  BucketArgs args{};
  char* blob = nullptr;
  int64_t* there = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) space.allocate(device);
    blob = space.take<char>(host.bytes());
    there = space.take<int64_t>(count + 1);
    args.layers = space.take<LayerState>(count);
    args.table = space.take<Word>(count * columns_of(kBucketBins));
    args.bucket_of = space.take<uint16_t>(count * (kBucketBins + 2));
    args.buckets = space.take<Bucket>(count * kMostBuckets);
    args.list = space.take<uint32_t>(1 + count * kMostBuckets);
    args.keys = space.take<uint32_t>(starts.back());
    args.places = space.take<uint32_t>(starts.back());
  }
  args.plan = host.send(blob, device.stream);
  check(upload(there, starts.data(), static_cast<int64_t>(starts.size() * sizeof(int64_t)), device.stream));
  args.starts = there;
  args.bad = bad;
  check(score_by_buckets(args, device.stream));
}

// With a plan of its own on the device: f(plan).
template <typename F>
void with_plan(const Device& device, const Problem& problem, std::span<void* const> outs, F&& f) {
  const HostPlan host(problem, outs);
  Workspace space;
  space.take<char>(host.bytes());
  space.allocate(device);
  f(host.send(space.take<char>(host.bytes()), device.stream));
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
  std::vector<int64_t> places(problem.layers());     // weights, each tensor's last chunk in full
  constexpr int32_t kMixed = INT32_MAX;              // which no DType has
  for (const TensorView& t : problem.tensors) {
    const auto l = static_cast<size_t>(t.layer);
    types[l] = types[l] < 0 || types[l] == static_cast<int32_t>(t.dtype) ? static_cast<int32_t>(t.dtype) : kMixed;
    places[l] += (t.numel + kChunk - 1) / kChunk * kChunk;
  }
  std::vector<int32_t> small, tables[2], large;
  for (size_t l = 0; l < types.size(); ++l) {
    DIMAP_CHECK(places[l] <= kMostPlaces, "a layer scored on CUDA must have at most 2^33 weights, got ",
                problem.layer_total[l]);
    const bool half =
        types[l] == static_cast<int32_t>(DType::kBFloat16) || types[l] == static_cast<int32_t>(DType::kFloat16);
    (problem.layer_total[l] <= kBucketSize ? small
     : half                                ? tables[types[l] == static_cast<int32_t>(DType::kFloat16)]
                                           : large)
        .push_back(static_cast<int32_t>(l));
  }
  std::vector<void*> some;
  if (!small.empty()) {
    const Problem part = part_of(problem, small, outs, some);
    with_plan(device, part, some, [&](const Plan& plan) { check(score_small(plan, bad, device.stream)); });
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16})
    score_tables(device, problem, tables[dtype == DType::kFloat16], dtype, outs, bad);
  for (size_t first = 0; first < large.size();) {  // as many as fit the workspace, at least one
    size_t last = first;
    int64_t weights = 0;
    while (last < large.size() && last - first < kBucketLayers &&
           (last == first || weights + problem.layer_total[static_cast<size_t>(large[last])] <= kBucketWeights))
      weights += problem.layer_total[static_cast<size_t>(large[last++])];
    const Problem part = part_of(problem, std::span(large).subspan(first, last - first), outs, some);
    score_buckets(device, part, some, bad);
    first = last;
  }
  with_plan(device, problem, outs, [&](const Plan& plan) { check(spoil(plan, bad, device.stream)); });
  return scores;
}

}  // namespace
}  // namespace dimap::cuda

STABLE_TORCH_LIBRARY_IMPL(dimap, CUDA, m) { m.impl("score", TORCH_BOX(&dimap::cuda::score_op)); }

// score, select, prune_ and their kin on the CPU: checks, contiguous views, then the kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/cpu_common.h"
#include "cpu/apply.h"
#include "cpu/nm.h"
#include "cpu/score/score.h"
#include "cpu/select/engine.h"

namespace dimap::cpu {
namespace {

using Ints = std::vector<int64_t>;

std::vector<Tensor> score_op(std::vector<Tensor> weights, Ints layers) {
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = layers_problem(inputs, layers);
  std::vector<Tensor> scores = empty_like(inputs, ScalarType::Float);
  guarded([&] { score(problem, pointers<float>(scores), TorchPool()); });
  return scores;
}

void score_out_op(std::vector<Tensor> weights, Ints layers, std::vector<Tensor> out) {
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = layers_problem(inputs, layers);
  check_outputs(weights, out, ScalarType::Float);
  guarded([&] { score(problem, pointers<float>(out), TorchPool()); });
}

std::vector<ModuleCut> select_into(const Problem& problem, const std::vector<Tensor>& masks) {
  return guarded([&] { return dimap::cpu::select(problem, pointers<uint8_t>(masks), TorchPool()); });
}

std::tuple<std::vector<Tensor>, Tensor> select_cuts_op(std::vector<Tensor> weights, Ints layers, Ints modules,
                                                       Ints keep) {
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = modules_problem(inputs, layers, modules, keep);
  std::vector<Tensor> masks = empty_like(inputs, ScalarType::Bool);
  const std::vector<ModuleCut> cuts = select_into(problem, masks);
  Tensor thresholds = torch::stable::empty({static_cast<int64_t>(keep.size())}, ScalarType::Double, std::nullopt,
                                           torch::stable::Device(torch::headeronly::DeviceType::CPU));
  auto* out = static_cast<double*>(thresholds.mutable_data_ptr());
  for (size_t m = 0; m < keep.size(); ++m) out[m] = cuts[m].threshold;
  return {std::move(masks), std::move(thresholds)};
}

std::vector<Tensor> select_op(std::vector<Tensor> weights, Ints layers, Ints modules, Ints keep) {
  return std::get<0>(select_cuts_op(std::move(weights), std::move(layers), std::move(modules), std::move(keep)));
}

void select_out_op(std::vector<Tensor> weights, Ints layers, Ints modules, Ints keep, std::vector<Tensor> out) {
  const std::vector<Tensor> inputs = contiguous(weights);
  const Problem problem = modules_problem(inputs, layers, modules, keep);
  check_outputs(weights, out, ScalarType::Bool);
  select_into(problem, out);
}

void prune_op(std::vector<Tensor> weights, Ints layers, Ints modules, Ints keep) {
  const std::vector<Tensor> inputs = writable(weights);
  const Problem problem = modules_problem(inputs, layers, modules, keep);
  guarded([&] { prune(problem, TorchPool()); });
  write_back(weights, inputs);
}

void apply_op(std::vector<Tensor> weights, std::vector<Tensor> masks) {
  DIMAP_CHECK(masks.size() == weights.size(), "masks must have one entry for each of the ", weights.size(),
              " weights, got ", masks.size());
  std::vector<Applied> work;
  const std::vector<Tensor> inputs = writable(weights), bytes = contiguous(masks);
  for (size_t i = 0; i < weights.size(); ++i) {
    DIMAP_CHECK(bytes[i].scalar_type() == ScalarType::Bool, "masks[", i, "] must be bool, got ",
                name_of(bytes[i].scalar_type()));
    DIMAP_CHECK(bytes[i].is_cpu(), "masks[", i, "] must be on cpu like weights[", i, "], got ", device_of(bytes[i]));
    DIMAP_CHECK(std::equal(inputs[i].sizes().begin(), inputs[i].sizes().end(), bytes[i].sizes().begin(),
                           bytes[i].sizes().end()),
                "masks[", i, "] must have the shape of weights[", i, "]");
    const TensorView view = view_of(inputs[i], i, 0);
    work.push_back({inputs[i].mutable_data_ptr(), static_cast<const uint8_t*>(bytes[i].const_data_ptr()), view.numel,
                    size_of(view.dtype)});
  }
  dimap::cpu::apply(work, TorchPool());  // qualified: not std::apply
  write_back(weights, inputs);
}

// masks: [weights], or empty where the weights are to be zeroed.
std::vector<Grouped> grouped(const std::vector<Tensor>& inputs, const std::vector<Tensor>& masks, int64_t n, int64_t m,
                             int64_t dim) {
  const std::vector<GroupShape> shapes = group_shapes(inputs, n, m, dim);
  std::vector<Grouped> work;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const TensorView view = view_of(inputs[i], i, 0);
    auto* mask = masks.empty() ? nullptr : static_cast<uint8_t*>(masks[i].mutable_data_ptr());
    work.push_back({const_cast<void*>(view.data), mask, shapes[i].blocks, shapes[i].inner, view.dtype});
  }
  return work;
}

std::vector<Tensor> select_nm_op(std::vector<Tensor> weights, int64_t n, int64_t m, int64_t dim) {
  const std::vector<Tensor> inputs = contiguous(weights);
  std::vector<Tensor> masks = empty_like(inputs, ScalarType::Bool);
  const std::vector<Grouped> work = grouped(inputs, masks, n, m, dim);
  guarded([&] { select_nm(work, static_cast<int>(n), static_cast<int>(m), TorchPool()); });
  return masks;
}

void nm_op(std::vector<Tensor> weights, int64_t n, int64_t m, int64_t dim) {
  const std::vector<Tensor> inputs = writable(weights);
  const std::vector<Grouped> work = grouped(inputs, {}, n, m, dim);
  guarded([&] { zero_nm(work, static_cast<int>(n), static_cast<int>(m), TorchPool()); });
  write_back(weights, inputs);
}

}  // namespace
}  // namespace dimap::cpu

STABLE_TORCH_LIBRARY_IMPL(dimap, CPU, m) {
  m.impl("score", TORCH_BOX(&dimap::cpu::score_op));
  m.impl("select", TORCH_BOX(&dimap::cpu::select_op));
  m.impl("score.out", TORCH_BOX(&dimap::cpu::score_out_op));
  m.impl("select.out", TORCH_BOX(&dimap::cpu::select_out_op));
  m.impl("prune_", TORCH_BOX(&dimap::cpu::prune_op));
  m.impl("select_cuts", TORCH_BOX(&dimap::cpu::select_cuts_op));
  m.impl("apply_", TORCH_BOX(&dimap::cpu::apply_op));
  m.impl("select_nm", TORCH_BOX(&dimap::cpu::select_nm_op));
  m.impl("nm_", TORCH_BOX(&dimap::cpu::nm_op));
}

// What the CPU operators share: torch's thread pool for the kernels, contiguous inputs, outputs like them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <functional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../kernels/cpu/parallel.h"

namespace dimap::cpu {

class TorchPool final : public Pool {
 public:
  TorchPool() : workers_(static_cast<int>(torch::stable::get_num_threads())) {}
  int workers() const override { return workers_; }
  void run(const std::function<void(int)>& body) const override {
    torch::stable::parallel_for(0, workers_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
    });
  }

 private:
  int workers_;
};

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  for (const Tensor& t : tensors) out.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return out;
}

// What an in-place operator works on: contiguous weights themselves, copies of the others for `write_back`. All that
// would not let itself be written is refused here, before anything has changed.
inline std::vector<Tensor> writable(const std::vector<Tensor>& weights) {
  const std::vector<Tensor> out = contiguous(weights);
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(!overlaps_itself(weights[i]), "weights[", i,
                    "] must not overlap itself, got an expanded tensor or one like it: clone it first");
    if (weights[i].is_contiguous()) {
      weights[i].mutable_data_ptr();  // a lazy clone gets memory of its own
    } else {                          // copying nothing asks torch whether more may be copied
      Tensor none = torch::stable::narrow(const_cast<Tensor&>(weights[i]), 0, 0, 0);
      torch::stable::copy_(none, none);
    }
  }
  return out;
}

inline void write_back(std::vector<Tensor>& weights, const std::vector<Tensor>& written) {
  for (size_t i = 0; i < weights.size(); ++i)
    if (!weights[i].is_contiguous()) torch::stable::copy_(weights[i], written[i]);
}

inline std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors, ScalarType type) {
  std::vector<Tensor> out;
  for (const Tensor& t : tensors)
    out.push_back(
        torch::stable::empty(t.sizes(), type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  return out;
}

template <typename T>
std::vector<T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<T*> out;
  for (const Tensor& t : tensors) out.push_back(static_cast<T*>(t.mutable_data_ptr()));
  return out;
}

// Runs the kernels; their exception for a non-finite weight becomes torch's, with the tensor named.
template <typename Body>
auto guarded(Body&& body) {
  try {
    return body();
  } catch (const NonFinite& e) {
    throw_non_finite(e.tensor, e.index, e.nan);
  }
}

}  // namespace dimap::cpu

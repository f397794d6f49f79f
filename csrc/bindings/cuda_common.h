// What the CUDA operators share: the device and its stream, a plan on the device, workspace from torch's allocator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "bindings/inputs.h"
#include "cuda/host.h"
#include "cuda/kernels.h"

namespace dimap::cuda {

using Ints = std::vector<int64_t>;

inline void check(cudaError_t error) {
  DIMAP_CHECK(error == cudaSuccess, "dimap needs a working CUDA device, got: ", cudaGetErrorString(error));
}

// Makes the tensors' device current, for torch and for this library's own copy of the runtime, and finds its stream.
class Device {
 public:
  explicit Device(const Tensor& like)
      : index(static_cast<int32_t>(like.get_device_index())), like_(like), guard_(index) {
    check(cudaSetDevice(index));
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  Tensor empty(std::vector<int64_t> sizes, ScalarType type) const {
    return torch::stable::new_empty(like_, sizes, type);
  }
  Tensor empty_like(const Tensor& t, ScalarType type) const {
    return empty(std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), type);
  }
  std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors, ScalarType type) const {
    std::vector<Tensor> out;
    for (const Tensor& t : tensors) out.push_back(empty_like(t, type));
    return out;
  }

  const Tensor& like() const { return like_; }

  // Waits for the stream.
  void copy_to_host(void* to, const void* from, size_t bytes) const {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
  }
  template <typename T>
  std::vector<T> to_host(const Tensor& t) const {
    const Tensor whole = torch::stable::contiguous(t);
    std::vector<T> values(static_cast<size_t>(t.numel()));
    copy_to_host(values.data(), whole.const_data_ptr(), values.size() * sizeof(T));
    return values;
  }
  int32_t index;
  cudaStream_t stream;

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// The one device of all weights. A list with a tensor elsewhere comes here, too: its first may be the one on the CPU.
inline Device device_of_all(const std::vector<Tensor>& weights) {
  DIMAP_CHECK(!weights.empty(), "weights must have at least one tensor, got none");
  check_same_device(weights);
  return Device(weights[0]);
}

// One allocation, handed out in aligned parts.
class Workspace {
 public:
  // First call take() for every part with no memory behind it, then allocate, then call it again in the same order.
  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  void allocate(const Device& device) {
    memory_ = {device.empty({std::max<int64_t>(used_, 1)}, ScalarType::Byte)};
    base_ = static_cast<char*>(memory_[0].mutable_data_ptr());
    used_ = 0;
  }

 private:
  std::vector<Tensor> memory_;
  char* base_ = nullptr;
  int64_t used_ = 0;
};

// Room for the solver; stride: bins and two.
inline Scratch take_scratch(Workspace& space, int64_t layers, int64_t modules, int64_t stride) {
  return {space.take<double>(layers * stride),
          space.take<double>(layers * stride),
          space.take<int64_t>(layers * stride),
          space.take<uint32_t>(layers),
          space.take<uint32_t>(layers),
          stride,
          space.take<Search>(modules),
          space.take<Word>(modules * 2 * kProbes),
          space.take<int32_t>(2)};
}

inline std::vector<void*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<void*> out;
  for (const Tensor& t : tensors) out.push_back(t.mutable_data_ptr());
  return out;
}

// A problem as the kernels read it: built on the host, then sent to the device.
class HostPlan {
 public:
  // outs: [tensors] or empty.
  HostPlan(const Problem& problem, std::span<void* const> outs) {
    std::vector<ModuleEntry> modules(problem.modules());
    for (size_t m = 0; m < modules.size(); ++m) modules[m] = {problem.keep[m], problem.module_total[m], 0, 0, 0, 0};
    std::vector<LayerEntry> layers(problem.layers());
    for (size_t l = 0; l < layers.size(); ++l)
      layers[l] = {problem.layer_total[l], problem.layer_module[l], problem.layer_granularity[l]};
    std::vector<TensorEntry> tensors(problem.tensors.size() + 1);
    for (size_t t = 0; t < problem.tensors.size(); ++t) {
      const TensorView& view = problem.tensors[t];
      tensors[t] = {view.data, outs.empty() ? nullptr : outs[t], view.numel,
                    chunks_,   static_cast<int32_t>(view.dtype), view.layer};
      ModuleEntry& module = modules[static_cast<size_t>(problem.layer_module[static_cast<size_t>(view.layer)])];
      const int64_t count = (view.numel + kChunk - 1) / kChunk;
      if (count && module.last_chunk == 0) module.first_chunk = chunks_;
      chunks_ += count;
      if (count) module.last_chunk = chunks_;
    }
    tensors.back() = {nullptr, nullptr, 0, chunks_, 0, 0};
    const std::vector<int32_t> order = order_layers(problem.layer_module, modules);
    counts_ = {static_cast<int32_t>(problem.tensors.size()), static_cast<int32_t>(layers.size()),
               static_cast<int32_t>(modules.size())};
    at_ = {append(tensors), append(layers), append(modules), append(order)};
  }

  int64_t bytes() const { return static_cast<int64_t>(blob_.size()); }
  int64_t chunks() const { return chunks_; }

  // Tells the device where the tensors' outputs are, once they are there: the plan was sent to the same place before.
  void send_outs(char* to, std::span<void* const> outs, cudaStream_t stream) {
    auto* tensors = reinterpret_cast<TensorEntry*>(blob_.data() + at_[0]);
    for (size_t t = 0; t < outs.size(); ++t) tensors[t].out = outs[t];
    const auto bytes = static_cast<int64_t>(outs.size() * sizeof(TensorEntry));
    check(upload(to + at_[0], tensors, bytes, stream));
  }

  Plan send(char* to, cudaStream_t stream) const {
    check(upload(to, blob_.data(), bytes(), stream));
    return {reinterpret_cast<const TensorEntry*>(to + at_[0]),
            reinterpret_cast<const LayerEntry*>(to + at_[1]),
            reinterpret_cast<const ModuleEntry*>(to + at_[2]),
            reinterpret_cast<const int32_t*>(to + at_[3]),
            counts_[0],
            counts_[1],
            counts_[2],
            chunks_};
  }

 private:
  template <typename T>
  size_t append(const std::vector<T>& items) {
    const size_t at = blob_.size();
    blob_.resize(at + (items.size() * sizeof(T) + 15) / 16 * 16);
    if (!items.empty()) std::memcpy(blob_.data() + at, items.data(), items.size() * sizeof(T));
    return at;
  }
  std::vector<char> blob_;
  std::vector<size_t> at_;
  std::vector<int32_t> counts_;
  int64_t chunks_ = 0;
};

}  // namespace dimap::cuda

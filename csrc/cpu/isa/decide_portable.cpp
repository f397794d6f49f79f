#include "cpu/isa/decide_portable.h"

namespace dimap::cpu {
namespace {

template <DType kType>
void decide(const void* weights, int64_t n, const Bracket& bracket, uint8_t* mask, Decided& out) {
  decide_range<kType>(static_cast<const storage_t<kType>*>(weights), 0, n, bracket, Grid(bracket.high), mask, out);
}

template <DType kType>
void zero(void* weights, int64_t n, uint32_t keep_from, uint32_t tie) {
  zero_range<kType>(static_cast<storage_t<kType>*>(weights), n, keep_from, tie);
}

}  // namespace

const Kernels kPortable = {
    "portable",
    {decide<DType::kFloat32>, decide<DType::kBFloat16>, decide<DType::kFloat16>},
    {zero<DType::kFloat32>, zero<DType::kBFloat16>, zero<DType::kFloat16>},
    score_rows_portable,
};

}  // namespace dimap::cpu

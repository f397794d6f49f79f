#include "cpu/select/engine.h"

#include "cpu/large_pages.h"
#include "cpu/select/decision.h"
#include "cpu/select/emit.h"

namespace dimap::cpu {

std::vector<ModuleCut> select(const Problem& problem, std::span<uint8_t* const> masks, const Pool& pool) {
  advise_outputs(problem, masks);
  Decision decision(problem, pool, nullptr, Keeps::kPositions, masks);
  std::vector<int64_t> quota = decision.quotas();
  emit(problem, decision.cuts, quota, masks, &decision.reading(), decision.read(), pool);
  return std::move(decision.modules);
}

std::vector<ModuleCut> prune(const Problem& problem, const Pool& pool) {
  Decision decision(problem, pool, nullptr, Keeps::kPositions, {});
  std::vector<int64_t> quota = decision.quotas();
  zero(problem, decision.cuts, quota, &decision.reading(), decision.read(), pool);
  return std::move(decision.modules);
}

}  // namespace dimap::cpu

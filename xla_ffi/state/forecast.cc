// See forecast.h.
#include "state/forecast.h"

namespace paged_optax {

std::vector<Forecast> MakeForecast(const std::vector<Prospect>& prospects, int64_t free_bytes) {
  std::vector<Residency> states;
  for (const Prospect& prospect : prospects) {
    const Signature& signature = prospect.signature;
    Residency state;
    state.geometry = MakeGeometry(SlotBytes(signature, kChunkBytes), signature.num_slots());
    state.device_bytes = prospect.policy.device_bytes;
    state.headroom_bytes = prospect.policy.headroom_bytes;
    states.push_back(state);
  }
  Residencies shared;
  for (Residency& state : states) shared.push_back(&state);
  Planner().Retarget(shared, free_bytes);

  std::vector<Forecast> forecasts;
  for (size_t i = 0; i < states.size(); ++i) {
    const Geometry& geometry = states[i].geometry;
    const Signature& signature = prospects[i].signature;
    const int64_t resident = geometry.LeadingBytes(states[i].target);
    // A step reads one slot and writes one, which may be the same.
    forecasts.push_back({SlotBytes(signature, kCpuGranularity) * signature.num_slots(),
                         geometry.NumBytes(), resident,
                         (geometry.NumBytes() - resident) / geometry.num_slots});
  }
  return forecasts;
}

}  // namespace paged_optax

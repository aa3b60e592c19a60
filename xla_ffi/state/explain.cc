// See explain.h.
#include "state/explain.h"

#include "rules/rules.h"

namespace paged_optax {
namespace {

constexpr char kWaysOut[] =
    "Go on from paged_optax.newest(opt_state), which is the newest state, or from a new "
    "init(params), after paged_optax.release(opt_state), which frees these moments.";
constexpr char kLeftAsTheyWere[] = " The moments were left as they were.";

// Of an open step: others have other contents since, so that nothing was left as it was.
std::string LostStep() {
  return "this optimizer state is not the newest one any more: while one of its steps was under "
         "way, another step or a reset took its moments, and the rest of the step was left out. The"
         " state was used twice. " +
         std::string(kWaysOut);
}

std::string FailedInTheMiddle() {
  return "a step or a reset of this optimizer state failed in the middle, so its moments cannot be "
         "trusted any more. Restore them from a checkpoint, or make a new state with init(params), "
         "after paged_optax.release(opt_state), which frees these moments.";
}

// Its step is still to run on this device, although others may have run it, or will not run at all.
std::string NotYetMade(const Refusal& refusal) {
  return "the moments of this optimizer state are not the newest ones: they are at version " +
         std::to_string(refusal.version) + ", and the state is of version " +
         std::to_string(refusal.token.version) +
         ". The step that makes them has not run on this device yet, or was refused, or the token "
         "was changed by hand. Wait for the step with jax.block_until_ready(opt_state). " +
         kWaysOut + kLeftAsTheyWere;
}

bool CanRestart(const Refusal& refusal) {
  return refusal.request == nullptr || refusal.request->rule() != kArrayRule;
}

std::string NotTheNewest(const Refusal& refusal) {
  if (refusal.token.version < 0) return LostStep();
  if (refusal.token.version == refusal.version) return FailedInTheMiddle();
  if (refusal.token.version > refusal.version) return NotYetMade(refusal);
  std::string text = "this optimizer state is not the newest one: its moments were at version " +
                     std::to_string(refusal.token.version) +
                     ", and later steps have since moved them to version " +
                     std::to_string(refusal.version) + ". Moments change in place. ";
  if (refusal.here != nullptr && refusal.here->signature.num_slots() > 1) {
    text +=
        "With replay=True the last step can be run again, but no step before it, and a state cannot"
        " go on in two branches. ";
  } else {
    text +=
        "The state was used twice: rolled back, forked into two, kept by jnp.where or"
        " optax.MultiSteps after its update had run, or a step was tried again. To run the last "
        "step"
        " again, build the optimizer with replay=True, which keeps two copies of the moments; to"
        " accumulate gradients use paged_optax.MultiSteps; to skip steps put jax.lax.cond around"
        " tx.update. ";
  }
  return text + kWaysOut + kLeftAsTheyWere;
}

std::string NegativeCount() {
  return "the count of this optimizer state is negative. It is the number of updates so far, as "
         "init and update return it; was the state changed by hand, or cast? "
         "paged_optax.newest(opt_state) has the right one." +
         std::string(kLeftAsTheyWere);
}

std::string OfOtherLeaves(const Refusal& refusal) {
  if (refusal.here != nullptr && refusal.request != nullptr) {
    return Signature::Difference(refusal.here->signature, *refusal.request, refusal.here->names);
  }
  return "the gradients do not have the leaves that the moments were made for. Make a new state "
         "with init(params).";
}

std::string WithoutMoments(const Refusal& refusal) {
  if (refusal.anywhere != nullptr) {
    return "the moments of this optimizer state are on " + Name(refusal.anywhere->device) +
           " but the step ran on " + Name(refusal.device) +
           ". Moments do not follow a token from device to device: run the step where the state "
           "was first used, or make a new state with init(params), after "
           "paged_optax.release(opt_state), which frees these moments.";
  }
  if (refusal.token.handle == 0) {
    return "the token of this optimizer state is zero, as jax.tree.map(jnp.zeros_like, opt_state) "
           "makes it, and names no moments. To set moments to zero use "
           "paged_optax.reset(opt_state), which keeps their memory, or init(params).";
  }
  switch (refusal.origin) {
    case Handles::Origin::kDropped:
      return "this optimizer state is a copy of an initial one that was dropped before its first "
             "update, and its step came too late to find room for its moments. The state is good: "
             "run the step again.";
    case Handles::Origin::kUnused:
      return "this optimizer state claims version " + std::to_string(refusal.token.version) +
             " but was never used. Use the state that init or update returned.";
    case Handles::Origin::kUsed:
      return "the moments of this optimizer state were released. Make a new state with "
             "init(params); paged_optax.states() lists those whose moments are there.";
    case Handles::Origin::kParent:
      return "the moments of this optimizer state are in the process that this one was forked "
             "from, "
             "and a forked process gets no moments. Use the state there, or make a new state here "
             "with init(params).";
    case Handles::Origin::kElsewhere:
      break;
  }
  return "the moments of this optimizer state are not in this process: the state was restored "
         "from a checkpoint, unpickled or sent here as a bare token, and a token carries no "
         "moments. Orbax, Flax and pickle carry them where paged_optax was imported before they "
         "saved; for other formats there are save_moments and load_moments. To go on without "
         "them, " +
         std::string(CanRestart(refusal) ? "build the optimizer with missing='restart', or " : "") +
         "make a new state with init(params), where "
         "a trainer restored it too: trainer.optimizer = nnx.Optimizer(trainer.model, tx, "
         "wrt=...). Parameters can be restored as usual.";
}

}  // namespace

std::string Explain(const Refusal& refusal) {
  const std::string text = refusal.verdict == Verdict::kStale         ? NotTheNewest(refusal)
                           : refusal.verdict == Verdict::kOtherLayout ? OfOtherLeaves(refusal)
                           : refusal.verdict == Verdict::kBadCount    ? NegativeCount()
                                                                      : WithoutMoments(refusal);
  return "paged_optax: " + text;
}

}  // namespace paged_optax

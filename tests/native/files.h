// Arrays into files and out of them again, with the threads of the product.
#pragma once

namespace paged_optax {

// Aborts if an array is not what was saved. What fails once is tried again. `many`: more than there
// is memory for at once.
void SaveAndLoad(bool many);

}  // namespace paged_optax

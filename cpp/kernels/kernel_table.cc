// The kernels of one instruction set. CMake compiles this file once for each, with FOVEAL_ISA_<name> and that set's
// flags.
//
// Everything but the table itself has internal linkage, and no header with inline functions, templates of the standard
// library or libm is included: else the linker could keep the copy of a shared inline function that was compiled for
// the widest set and give it to everybody.
#include "kernels/kernel_table.h"

#include "kernels/merge.inl.h"
#include "kernels/tile_backward.inl.h"
#include "kernels/tile_decode.inl.h"
#include "kernels/tile_forward.inl.h"

#define FOVEAL_CONCAT_(a, b) a##b
#define FOVEAL_CONCAT(a, b) FOVEAL_CONCAT_(a, b)

namespace foveal {
namespace {

template <class V>
static int64_t rows_scratch_nbytes(const HeadTask& h, int64_t rows) {
  return has_threshold(h.normalizer) ? threshold_scratch_nbytes<V>(h, rows) : forward_scratch_nbytes<V>(h, rows);
}

template <class V, class S>
static void forward_rows(const RowTask& task) {
  return has_threshold(task.head->normalizer) ? forward_threshold<V, S>(task) : forward<V, S>(task);
}

template <class V>
static int64_t terms_scratch_nbytes(const HeadTask& h) {
  return has_threshold(h.normalizer) ? threshold_terms_scratch_nbytes<V>(h) : 0;
}

template <class V, class S>
constexpr RowKernels kRowKernels = {kTileRows<V>,
                                    kDecodeRows<V>,
                                    Products<V, S>::kRoundingRows,
                                    rows_scratch_nbytes<V>,
                                    forward_rows<V, S>,
                                    decode_scratch_nbytes<V>,
                                    decode<V, S>,
                                    merge<V, S>,
                                    backward_scratch_nbytes<V, ScoreDot<V, S>>,
                                    key_sums_width<V>,
                                    terms_scratch_nbytes<V>,
                                    backward_terms<V, S>,
                                    backward<V, S>,
                                    backward_keys<V, S>,
                                    ScoreDot<V, S>::kStep == 2};

}  // namespace

extern const KernelTable FOVEAL_CONCAT(kTable_, FOVEAL_ISA);
const KernelTable FOVEAL_CONCAT(kTable_, FOVEAL_ISA) = {kIsaName, kRowKernels<F32, float>, kRowKernels<F64, double>,
                                                        kRowKernels<F32, Float16>, kRowKernels<F32, BFloat16>};

}  // namespace foveal

// The kernels of one instruction set. CMake compiles this file once for each, with FOVEAL_ISA_<name> and that set's
// flags.
//
// Everything but the table itself has internal linkage, and no header with inline functions, templates of the standard
// library or libm is included: else the linker could keep the copy of a shared inline function that was compiled for
// the widest set and give it to everybody.
#if defined(FOVEAL_ISA_avx512bf16)
#define FOVEAL_ISA avx512bf16
#include "simd/avx512.h"
#elif defined(FOVEAL_ISA_avx512)
#define FOVEAL_ISA avx512
#include "simd/avx512.h"
#elif defined(FOVEAL_ISA_avx2)
#define FOVEAL_ISA avx2
#include "simd/avx2.h"
#elif defined(FOVEAL_ISA_neon)
#define FOVEAL_ISA neon
#include "simd/neon.h"
#else
#define FOVEAL_ISA scalar
#include "simd/scalar.h"
#endif

#include "attention/philox.h"
#include "attention/stored.h"
#include "isa/kernel_table.h"
// clang-format off: each builds on those before it
#include "attention/elementary.inl.h"
#include "attention/mask.inl.h"
#include "attention/storage.inl.h"
#include "attention/arena.inl.h"
#include "attention/base2.inl.h"
#include "attention/normalizer.inl.h"
#include "attention/dot.inl.h"
#include "attention/lanes.inl.h"
#include "attention/score_policy.inl.h"
#include "attention/dropout.inl.h"
#include "attention/products.inl.h"
#include "attention/rows.inl.h"
#include "attention/key_rows.inl.h"
#include "attention/tile_forward.inl.h"
#include "attention/ahead.inl.h"
#include "attention/decode_products.inl.h"
#ifdef FOVEAL_HAS_BF16_DOT
#include "attention/value_pairs.inl.h"
#include "attention/code_pairs.inl.h"
#include "attention/bfloat16_products.inl.h"
#endif
#include "attention/tile_decode.inl.h"
#include "attention/merge.inl.h"
#include "attention/gradient_pairs.inl.h"
#include "attention/gradient_tile.inl.h"
#include "attention/bias_gradient.inl.h"
#include "attention/tile_backward.inl.h"
// clang-format on

#define FOVEAL_CONCAT_(a, b) a##b
#define FOVEAL_CONCAT(a, b) FOVEAL_CONCAT_(a, b)

namespace foveal {
namespace {

template <class V, class S>
constexpr RowKernels kRowKernels = {kTileRows<V>,
                                    kDecodeRows<V>,
                                    Products<V, S>::kRoundingRows,
                                    forward_scratch_nbytes<V>,
                                    forward<V, S>,
                                    decode_scratch_nbytes<V>,
                                    decode<V, S>,
                                    merge<V, S>,
                                    backward_scratch_nbytes<V, ScoreDot<V, S>>,
                                    key_sums_width<V>,
                                    backward_delta<V, S>,
                                    backward<V, S>,
                                    backward_keys<V, S>,
                                    ScoreDot<V, S>::kStep == 2};

}  // namespace

extern const KernelTable FOVEAL_CONCAT(kTable_, FOVEAL_ISA);
const KernelTable FOVEAL_CONCAT(kTable_, FOVEAL_ISA) = {kIsaName, kRowKernels<F32, float>, kRowKernels<F64, double>,
                                                        kRowKernels<F32, Float16>, kRowKernels<F32, BFloat16>};

}  // namespace foveal

// The two products of a warp: scores S = Q K^T and output O += P V, for kM tiles of 16 query rows. The backward pass
// multiplies other arrays in the same two forms.
//
// Accumulators of m16n8k16 double as its A operand: columns 16j..16j+15 of P are exactly score tiles 2j and 2j+1, so P
// never leaves registers. Each K or V fragment is loaded once and used for all kM row tiles.
#pragma once

#include "cuda/tile.h"

namespace foveal::cuda {

// score[m][n][i]: row 16m + group + 8*(i/2), key 8n + 2*pair + i%2.   q: the warp's first row.
template <class Element, class QTile, class KTile, int kM, int kN>
FOVEAL_DEVICE void multiply_qk(float (&score)[kM][kN][4], uint32_t q, uint32_t k) {
  static_assert(KTile::kRows == kN * 8 && QTile::kColumns == KTile::kColumns);
  const uint32_t lane_q = lane_address_a<QTile>(q);
  const uint32_t lane_k = lane_address_b<KTile>(k);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) score[m][n][i] = 0.0f;
#pragma unroll
  for (int step = 0; step < KTile::kColumns / 16; ++step) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix_x4(a[m], QTile::advance(lane_q, step) + m * 16 * QTile::kRowNbytes);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, KTile::advance(lane_k, step) + n * 8 * KTile::kRowNbytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<Element>(score[m][n], a[m], b[0], b[1]);
        mma_m16n8k16<Element>(score[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The A operand of 16 keys out of two score tiles.
template <class Element>
FOVEAL_DEVICE void pack_weights(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack<Element>(low[0], low[1]);
  a[1] = pack<Element>(low[2], low[3]);
  a[2] = pack<Element>(high[0], high[1]);
  a[3] = pack<Element>(high[2], high[3]);
}

// out[m][d][i]: row as above, value column 8d + 2*pair + i%2. V may be wider than `out`: its first columns then.
template <class Element, class VTile, int kM, int kN, int kD>
FOVEAL_DEVICE void multiply_pv(float (&out)[kM][kD][4], const float (&weight)[kM][kN][4], uint32_t v) {
  static_assert(VTile::kRows == kN * 8 && VTile::kColumns >= kD * 8);
  const uint32_t lane_v = lane_address_b_trans<VTile>(v);
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) pack_weights<Element>(a[m], weight[m][n], weight[m][n + 1]);
#pragma unroll
    for (int d = 0; d < kD; d += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, VTile::advance(lane_v, d / 2) + n * 8 * VTile::kRowNbytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<Element>(out[m][d], a[m], b[0], b[1]);
        mma_m16n8k16<Element>(out[m][d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace foveal::cuda

// Tensor cores and asynchronous copies (compute capability 8.0 and up) behind functions that the emulator has
// too.
//
// Fragments are those of the PTX manual. With g = lane / 4 and t = lane % 4:
//   m16n8k16  a[0] = A[g][2t, 2t+1]    a[1] = A[g+8][2t, 2t+1]    a[2] = A[g][2t+8, 2t+9]    a[3] =
//   A[g+8][2t+8, 2t+9]
//             b[0] = B[2t, 2t+1][g]    b[1] = B[2t+8, 2t+9][g]
//             d[0], d[1] = D[g][2t, 2t+1]      d[2], d[3] = D[g+8][2t, 2t+1]
//   m16n8k8   a[0] = A[g][t]   a[1] = A[g+8][t]   a[2] = A[g][t+4]   a[3] = A[g+8][t+4]
//             b[0] = B[t][g]   b[1] = B[t+4][g]                      d as above
// where A is 16 x k, B is k x 8, and two 16-bit values share a register, the first in the low half.
#pragma once

#include <type_traits>

#include "core/cuda.h"
#include "core/dtype.h"

#if defined(ARIMG_EMULATOR)
#include "tensor_core.h"
#endif

namespace arimg::cuda {

// Two floats rounded to T (BFloat16 or Half) in one register, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
#if defined(ARIMG_EMULATOR)
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
#else
  uint32_t out;  // one instruction for the pair
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#endif
}

#if !defined(ARIMG_EMULATOR)

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return unsigned(__cvta_generic_to_shared(p));
}

// Starts copying 16 bytes into shared memory; both addresses 16-byte aligned. valid == false writes zeros and
// reads nothing. The bytes are there for the calling thread after cp_async_wait, for others after a barrier
// that follows it.
__device__ __forceinline__ void cp_async16(void* to_shared, const void* from_global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)),
               "l"(from_global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of the copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `groups_left` of this thread's latest committed groups are still on their way.
template <int groups_left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// Loads four 8x8 matrices of 16-bit values. Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes,
// aligned); out[m] is this lane's pair: row lane / 4, columns 2 * (lane % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with every matrix transposed: the pair is column lane / 4, rows 2 * (lane % 4) and the next.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += A B with 16-bit inputs and fp32 sums. T: BFloat16 or Half.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A float rounded to tf32 (10 bits of mantissa, to nearest, ties away from zero).
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}

// d += A B with tf32 inputs and fp32 sums.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace arimg::cuda

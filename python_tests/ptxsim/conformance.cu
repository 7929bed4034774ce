// What the hardware makes of the instructions whose layouts the simulator takes from the PTX manual: one small kernel
// each, on random inputs. On a GPU this is a program (LTOOD_DUMP_MAIN) that writes inputs and outputs to a file; in the
// simulator it is a library, which has to give the same. LTOOD_HOPPER adds wgmma and TMA (sm_90a).
// Not yet verified on hardware.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/primitives/math.cuh"
#include "cuda/primitives/mbarrier.cuh"
#include "cuda/primitives/memory.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/tma.cuh"
#include "cuda/primitives/wgmma.cuh"

enum Kind : int { kBytes, kBFloat16, kFloat16, kFloat32 };  // of the inputs; numbers lie between 1/16 and 2

struct Case {
  char name[32];
  int kind, input_bytes, output_bytes;
  int exact;  // or float32 within the rounding of sums
};

namespace {

using namespace ltood::prim;

// Input: four 8×8 matrices of 16 bits; output: four registers of every lane.
template <bool kTransposed>
__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(16) uint32_t rows[128];
  for (int i = 0; i < 4; ++i) rows[i * 32 + threadIdx.x] = in[i * 32 + threadIdx.x];
  __syncwarp();
  uint32_t found[4];
  if (kTransposed) {
    ldmatrix_x4_trans(found, shared_address(rows + threadIdx.x * 4));
  } else {
    ldmatrix_x4(found, shared_address(rows + threadIdx.x * 4));
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = found[i];
}

__device__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Input: of every lane four registers of A and two of B; output: the accumulator, which starts at lane + register.
template <int kType>
__global__ void mma_kernel(const uint32_t* in, float* out) {
  uint32_t a[4];
  float c[4];
  const uint32_t* own = in + threadIdx.x * 6;
  for (int i = 0; i < 4; ++i) {
    a[i] = own[i];
    c[i] = threadIdx.x + i;
  }
  if (kType == kBFloat16) mma_m16n8k16<__nv_bfloat16>(c, a, own[4], own[5]);
  if (kType == kFloat16) mma_m16n8k16<__half>(c, a, own[4], own[5]);
  if (kType == kFloat32) mma_tf32(c, a, own[4], own[5]);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i];
}

// Every lane copies lane % 17 bytes of its 16 and has the rest filled with zeros.
__global__ void cp_async_kernel(const uint4* in, uint4* out) {
  __shared__ uint4 rows[32];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(rows + threadIdx.x)),
               "l"(in + threadIdx.x), "r"(threadIdx.x % 17)
               : "memory");
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = rows[threadIdx.x];
}

#define SHUFFLE(mode, b, c)                                                                                   \
  {                                                                                                           \
    uint32_t value, inside;                                                                                   \
    asm volatile("{.reg .pred p; shfl.sync." mode ".b32 %0|p, %2, %3, %4, 0xffffffff; selp.u32 %1, 1, 0, p;}" \
                 : "=r"(value), "=r"(inside)                                                                  \
                 : "r"(in[threadIdx.x]), "r"(b), "r"(c));                                                     \
    out[threadIdx.x * 2] = value;                                                                             \
    out[threadIdx.x * 2 + 1] = inside;                                                                        \
    out += 64;                                                                                                \
  }

__global__ void shuffle_kernel(const uint32_t* in, uint32_t* out){
    SHUFFLE("up", 3, 0) SHUFFLE("up", 2, 0x1800) SHUFFLE("down", 5, 0x1f) SHUFFLE("down", 3, 0x181f)
        SHUFFLE("bfly", 7, 0x1f) SHUFFLE("bfly", 12, 0x181f) SHUFFLE("idx", threadIdx.x * 5, 0x1f)
            SHUFFLE("idx", threadIdx.x + 3, 0x181f)}

__global__ void ex2_kernel(const float* in, float* out) {
  for (int i = 0; i < 8; ++i) out[i * 32 + threadIdx.x] = exp2_fast(in[i * 32 + threadIdx.x] * 60);
}

__global__ void convert_kernel(const float* in, uint32_t* out) {
  const float low = in[threadIdx.x * 2], high = in[threadIdx.x * 2 + 1];
  uint32_t tf32;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32) : "f"(low));
  out[threadIdx.x * 3] = pack<__nv_bfloat16>(low, high);
  out[threadIdx.x * 3 + 1] = pack<__half>(low, high);
  out[threadIdx.x * 3 + 2] = tf32;
}

#ifdef LTOOD_HOPPER
constexpr int kTileBytes = 8192;  // 64 rows of 128 bytes

__device__ void fill_shared(unsigned char* shared, const uint4* in, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += 128) reinterpret_cast<uint4*>(shared)[i] = in[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

// D = A B' of a tile of 64 rows and one of kSize * 2 as the descriptors read them, K = 64.
template <typename half_t, int kSize>
__global__ void wgmma_shared_kernel(const uint4* in, float* out) {
  extern __shared__ __align__(1024) unsigned char shared[];
  fill_shared(shared, in, kTileBytes * (1 + kSize / 32));
  const uint32_t a = shared_address(shared), b = a + kTileBytes;
  float d[kSize];
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    wgmma_shared<half_t>(d, matrix_descriptor(a + k * 32), matrix_descriptor(b + k * 32), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kSize; ++i) out[threadIdx.x * kSize + i] = d[i];
}

// D = A B: A comes from the end of the input, four registers a thread; B, kSize / 32 tiles beside each other, is
// transposed by its descriptor.
template <typename half_t, int kSize>
__global__ void wgmma_registers_kernel(const uint4* in, float* out) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kValues = kTileBytes * (kSize / 32);
  fill_shared(shared, in, kValues);
  const uint32_t b = shared_address(shared);
  const uint4 own = in[kValues / 16 + threadIdx.x];
  const uint32_t a[4] = {own.x, own.y, own.z, own.w};
  float d[kSize] = {};
  wgmma_fence();
  for (int k = 0; k < 4; ++k) wgmma_registers<half_t>(d, a, matrix_descriptor(b + k * 2048, kTileBytes), true);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kSize; ++i) out[threadIdx.x * kSize + i] = d[i];
}

// A box that sticks out of the second plane of a [2, 50, 96] array on both sides; output: the tile as it lies in shared
// memory.
__global__ void tma_kernel(const __grid_constant__ CUtensorMap map, uint4* out) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barrier;
  const uint32_t landed = shared_address(&barrier);
  if (threadIdx.x == 0) {
    mbarrier_init(landed, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(landed, kTileBytes);
    tma_load(shared_address(shared), &map, landed, 64, 16, 1);
  }
  __syncthreads();
  mbarrier_wait(landed, 0);
  for (int i = threadIdx.x; i < kTileBytes / 16; i += 128) out[i] = reinterpret_cast<uint4*>(shared)[i];
}

int run_tma(const void* in, uint4* out) {
  CUtensorMap map;
  if (auto error = make_tensor_map(&map, in, false, 2, 50, 96, 64)) return error;
  tma_kernel<<<1, 128, kTileBytes>>>(map, out);
  return cudaGetLastError();
}
#endif

const Case kCases[] = {
    {"ldmatrix", kBytes, 512, 512, 1},
    {"ldmatrix_trans", kBytes, 512, 512, 1},
    {"mma_bf16", kBFloat16, 768, 512, 0},
    {"mma_f16", kFloat16, 768, 512, 0},
    {"mma_tf32", kFloat32, 768, 512, 0},
    {"cp_async", kBytes, 512, 512, 1},
    {"shuffle", kBytes, 128, 2048, 1},
    {"ex2", kFloat32, 1024, 1024, 0},
    {"convert", kFloat32, 256, 384, 1},
#ifdef LTOOD_HOPPER
    {"wgmma_shared_n64", kBFloat16, 2 * kTileBytes, 128 * 128, 0},
    {"wgmma_registers_n64", kBFloat16, kTileBytes + 2048, 128 * 128, 0},
    {"wgmma_shared_n128", kFloat16, 3 * kTileBytes, 128 * 256, 0},
    {"wgmma_registers_n128", kFloat16, 2 * kTileBytes + 2048, 128 * 256, 0},
    {"tma", kBFloat16, 2 * 50 * 96 * 2, kTileBytes, 1},
#endif
};

template <typename in_t, typename out_t>
int run_kernel(void (*kernel)(const in_t*, out_t*), const void* in, void* out, int threads = 32, int shared = 0) {
  kernel<<<1, threads, shared>>>(static_cast<const in_t*>(in), static_cast<out_t*>(out));
  return cudaGetLastError();
}

uint32_t next_random(uint32_t& state) {
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

// A number of random sign and mantissa and one of five exponents, in a format of `mantissa` bits and that bias.
uint32_t random_number(uint32_t& state, int mantissa, int exponent_bits, int bias) {
  const uint32_t bits = next_random(state), exponent = bias - 4 + bits % 5;
  return (bits >> 31) << (mantissa + exponent_bits) | exponent << mantissa | (bits >> 5 & ((1u << mantissa) - 1));
}

}  // namespace

extern "C" {

int conformance_count() { return sizeof kCases / sizeof *kCases; }

void conformance_case(int which, Case* out) { *out = kCases[which]; }

// Fills host memory with the inputs of a case.
void conformance_inputs(int which, uint32_t seed, unsigned char* to) {
  uint32_t state = seed * 2654435761u + which * 40503u + 1;
  const Case& c = kCases[which];
  for (int at = 0; at < c.input_bytes; at += 4) {
    uint32_t word = next_random(state);
    if (c.kind == kFloat32) word = random_number(state, 23, 8, 127);
    if (c.kind == kBFloat16) word = random_number(state, 7, 8, 127) | random_number(state, 7, 8, 127) << 16;
    if (c.kind == kFloat16) word = random_number(state, 10, 5, 15) | random_number(state, 10, 5, 15) << 16;
    std::memcpy(to + at, &word, 4);
  }
}

// in, out: device memory.
int conformance_run(int which, const void* in, void* out) {
  switch (which) {
    case 0:
      return run_kernel(ldmatrix_kernel<false>, in, out);
    case 1:
      return run_kernel(ldmatrix_kernel<true>, in, out);
    case 2:
      return run_kernel(mma_kernel<kBFloat16>, in, out);
    case 3:
      return run_kernel(mma_kernel<kFloat16>, in, out);
    case 4:
      return run_kernel(mma_kernel<kFloat32>, in, out);
    case 5:
      return run_kernel(cp_async_kernel, in, out);
    case 6:
      return run_kernel(shuffle_kernel, in, out);
    case 7:
      return run_kernel(ex2_kernel, in, out);
    case 8:
      return run_kernel(convert_kernel, in, out);
#ifdef LTOOD_HOPPER
    case 9:
      return run_kernel(wgmma_shared_kernel<__nv_bfloat16, 32>, in, out, 128, 2 * kTileBytes);
    case 10:
      return run_kernel(wgmma_registers_kernel<__nv_bfloat16, 32>, in, out, 128, kTileBytes);
    case 11:
      return run_kernel(wgmma_shared_kernel<__half, 64>, in, out, 128, 3 * kTileBytes);
    case 12:
      return run_kernel(wgmma_registers_kernel<__half, 64>, in, out, 128, 2 * kTileBytes);
    case 13:
      return run_tma(in, static_cast<uint4*>(out));
#endif
  }
  return cudaErrorInvalidValue;
}

}  // extern "C"

#ifdef LTOOD_DUMP_MAIN
#include <cstdio>
#include <vector>

// The file: "LTCONF1\n", then of every case its Case, its input and its output.
int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s dump.bin\n", argv[0]), 2;
  FILE* file = std::fopen(argv[1], "wb");
  if (!file) return std::perror(argv[1]), 1;
  std::fputs("LTCONF1\n", file);
  for (int which = 0; which < conformance_count(); ++which) {
    const Case& c = kCases[which];
    std::vector<unsigned char> in(c.input_bytes), out(c.output_bytes);
    conformance_inputs(which, 1, in.data());
    void *device_in = nullptr, *device_out = nullptr;
    cudaMalloc(&device_in, in.size());
    cudaMalloc(&device_out, out.size());
    cudaMemcpy(device_in, in.data(), in.size(), cudaMemcpyHostToDevice);
    int error = conformance_run(which, device_in, device_out);
    if (!error) error = cudaDeviceSynchronize();
    if (error) {
      const char* what = cudaGetErrorString(static_cast<cudaError_t>(error));
      return std::fprintf(stderr, "%s: %s\n", c.name, what), 1;
    }
    cudaMemcpy(out.data(), device_out, out.size(), cudaMemcpyDeviceToHost);
    std::fwrite(&c, sizeof c, 1, file);
    std::fwrite(in.data(), 1, in.size(), file);
    std::fwrite(out.data(), 1, out.size(), file);
    std::printf("%-20s %d bytes\n", c.name, c.output_bytes);
  }
  return std::fclose(file);
}
#endif

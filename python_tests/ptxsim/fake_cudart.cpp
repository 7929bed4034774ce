// The part of the CUDA runtime that our launchers and nvcc's host stubs call, without a device: it keeps the kernel
// names that nvcc registers, checks launch configurations and hands every launch to a callback. Linked into each host
// library of the simulator. A function that is missing here is an undefined symbol when the library is linked.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Launch {
  unsigned grid[3], block[3];
  size_t shared;
};

using LaunchCallback = int (*)(const char* kernel, const Launch* launch, void** arguments);
using MemoryCallback = int (*)(void* to, const void* from, int value, size_t bytes);

struct Device {
  int multiprocessors = 4;
  int major = 8, minor = 0;
  int blocks_per_multiprocessor = 1;
  int shared_optin = 163 * 1024;  // 227 KiB on sm_90
};

struct State {
  std::map<const void*, std::string> kernels;  // host stub -> mangled name
  std::map<const void*, int> shared_limit;     // set by cudaFuncSetAttribute
  std::vector<std::pair<Launch, cudaStream_t>> pushed;
  Device device;
  LaunchCallback on_launch = nullptr;
  MemoryCallback on_memset = nullptr, on_copy = nullptr;
  cudaError_t error = cudaSuccess;
  std::string complaint;
};

State& state() {
  static State instance;
  return instance;
}

cudaError_t fail(cudaError_t error, const std::string& why) {
  state().error = error;
  state().complaint = why;
  return error;
}

constexpr int kSharedWithoutOptIn = 48 * 1024;

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  State& s = state();
  auto kernel = s.kernels.find(function);
  if (kernel == s.kernels.end()) return fail(cudaErrorInvalidDeviceFunction, "launch of an unknown kernel");
  auto limit = s.shared_limit.find(function);
  const int allowed = limit == s.shared_limit.end() ? kSharedWithoutOptIn : limit->second;
  if (shared > static_cast<size_t>(allowed)) {
    return fail(cudaErrorInvalidValue, kernel->second + ": " + std::to_string(shared) +
                                           " bytes of dynamic shared memory, allowed are " + std::to_string(allowed) +
                                           " (cudaFuncSetAttribute raises it)");
  }
  const size_t threads = size_t(block.x) * block.y * block.z;
  const bool empty = threads == 0 || size_t(grid.x) * grid.y * grid.z == 0;
  const bool large = threads > 1024 || block.z > 64 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u;
  if (empty || large) {
    return fail(cudaErrorInvalidConfiguration, kernel->second + ": grid or block is empty or too large");
  }
  const Launch request{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared};
  return s.on_launch(kernel->second.c_str(), &request, arguments) == 0 ? cudaSuccess
                                                                       : fail(cudaErrorLaunchFailure, "kernel failed");
}

// What instructions/bulk_copy.py reads; a CUtensorMap is 128 opaque bytes.
struct TensorMap {
  uint32_t magic;
  uint16_t rank;
  uint8_t element_bytes, swizzle;
  uint64_t address, sizes[5], strides[4];
  uint32_t box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint32_t kMapMagic = 0x53585450;

// cuTensorMapEncodeTiled with the rules of the driver that are easy to break.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool two_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const bool four_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (!two_bytes && !four_bytes) return CUDA_ERROR_INVALID_VALUE;
  TensorMap encoded{kMapMagic, static_cast<uint16_t>(rank), static_cast<uint8_t>(two_bytes ? 2 : 4),
                    static_cast<uint8_t>(swizzle), reinterpret_cast<uint64_t>(address)};
  bool valid = rank >= 1 && rank <= 5 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && encoded.address % 16 == 0 &&
               fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B;
  for (cuuint32_t i = 0; valid && i < rank; ++i) {
    encoded.sizes[i] = sizes[i];
    encoded.box[i] = box[i];
    valid = sizes[i] > 0 && box[i] > 0 && box[i] <= 256 && element_strides[i] == 1;
    if (i + 1 < rank) {
      encoded.strides[i] = strides[i];
      valid = valid && strides[i] % 16 == 0;
    }
  }
  const uint32_t inner = encoded.box[0] * encoded.element_bytes;
  valid = valid && inner % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || inner <= (16u << swizzle));
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

}  // namespace

// What Python calls.
extern "C" {

void ptxsim_connect(LaunchCallback on_launch, MemoryCallback on_memset, MemoryCallback on_copy) {
  state().on_launch = on_launch;
  state().on_memset = on_memset;
  state().on_copy = on_copy;
}

void ptxsim_set_device(int multiprocessors, int major, int minor, int blocks, int shared_optin) {
  state().device = Device{multiprocessors, major, minor, blocks, shared_optin};
}

const char* ptxsim_complaint() { return state().complaint.c_str(); }

void ptxsim_clear() {
  state().error = cudaSuccess;
  state().complaint.clear();
}

// An error that somebody else's launch has left behind, and the one that cudaGetLastError would return now.
void ptxsim_plant_error(int error) { state().error = static_cast<cudaError_t>(error); }
int ptxsim_last_error() { return state().error; }

// What nvcc's stubs call.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  state().kernels[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  state().pushed.push_back({Launch{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared}, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (state().pushed.empty()) return fail(cudaErrorMissingConfiguration, "launch without a configuration");
  const auto [request, on] = state().pushed.back();
  state().pushed.pop_back();
  *grid = dim3(request.grid[0], request.grid[1], request.grid[2]);
  *block = dim3(request.block[0], request.block[1], request.block[2]);
  *shared = request.shared;
  *static_cast<cudaStream_t*>(stream) = on;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}

// The public runtime.

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (!state().kernels.count(function)) return fail(cudaErrorInvalidDeviceFunction, "attribute of an unknown kernel");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > state().device.shared_optin) {
    return fail(cudaErrorInvalidValue, state().kernels[function] + ": the device has at most " +
                                           std::to_string(state().device.shared_optin) +
                                           " bytes of shared memory a block, asked for " + std::to_string(value));
  }
  state().shared_limit[function] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return state().on_memset(to, nullptr, value, bytes) == 0 ? cudaSuccess : fail(cudaErrorInvalidValue, "memset failed");
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind != cudaMemcpyDeviceToDevice && kind != cudaMemcpyDefault) {
    return fail(cudaErrorInvalidMemcpyDirection, "only copies from device to device are modelled");
  }
  return state().on_copy(to, from, 0, bytes) == 0 ? cudaSuccess : fail(cudaErrorInvalidValue, "memcpy failed");
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = state().error;
  state().error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return state().error; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "simulated CUDA error"; }
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice, "one device"); }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device& device = state().device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedWithoutOptIn;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_optin;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_optin + 1024;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 40 << 20;
      break;
    default:
      return fail(cudaErrorInvalidValue, "device attribute not modelled: " + std::to_string(attribute));
  }
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : fail(cudaErrorInvalidValue, std::string("driver function not modelled: ") + symbol);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = state().device.blocks_per_multiprocessor;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

}  // extern "C"

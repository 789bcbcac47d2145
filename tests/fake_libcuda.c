// A libcuda that launches nothing: it writes down what a launch hands to the kernel.
#include <string.h>

#include "cuda.h"

static size_t sizes[64];
static int num_sizes;
static unsigned char record[1 << 16];
static size_t length;

static void put(const void* from, size_t bytes) {
  memcpy(record + length, from, bytes);
  length += bytes;
}

// The bytes of each parameter of the next launch.
void fake_expect(const size_t* of_params, int n) {
  memcpy(sizes, of_params, n * sizeof *of_params);
  num_sizes = n, length = 0;
}

// The last launch: function, grid, block, shared memory, stream, number of attributes, then the parameters.
size_t fake_record(const unsigned char** bytes) {
  *bytes = record;
  return length;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
  const unsigned numbers[] = {config->gridDimX,  config->gridDimY,  config->gridDimZ,       config->blockDimX,
                              config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->numAttrs};
  length = 0;
  put(&function, sizeof function), put(numbers, sizeof numbers), put(&config->hStream, sizeof config->hStream);
  for (int i = 0; i < num_sizes; ++i) put(params[i], sizes[i]);
  return CUDA_SUCCESS;
}

// A descriptor is its own recipe.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const cuuint64_t wide[] = {(cuuint64_t)address, shape[0], shape[1], strides[0], box[0], box[1], steps[0], steps[1]};
  const cuuint32_t narrow[] = {type, rank, interleave, swizzle, promotion, fill};
  memset(map, 0, sizeof *map);
  memcpy(map, wide, sizeof wide);
  memcpy((char*)map + sizeof wide, narrow, sizeof narrow);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "an error of the fake libcuda";
  return CUDA_SUCCESS;
}

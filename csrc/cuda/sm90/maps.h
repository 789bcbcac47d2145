// TMA descriptors, encoded by the driver, which is found at run time: the object links against no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "../../check.h"
#include "operands.h"
#include "params.h"

namespace treegrpo::sm90 {

inline auto encoder() {
  static const auto found = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &result);
    TREEGRPO_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess,
                   "the driver has no cuTensorMapEncodeTiled: it must be of CUDA 12 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol);
  }();
  return found;
}

// [num_rows, num_columns] of 16-bit values in boxes of box_rows rows and one panel of columns.
inline CUtensorMap map_of(Half type, const Matrix& x, int num_rows, int num_columns, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(num_columns), static_cast<cuuint64_t>(num_rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(x.row_stride) * 2};
  const cuuint32_t box[] = {kPanelColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = encoder()(
      &map, type == Half::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TREEGRPO_CHECK(result == CUDA_SUCCESS, "the driver refuses a TMA descriptor (CUresult " + std::to_string(result) +
                                             "): rows must be aligned to 16 bytes");
  return map;
}

}  // namespace treegrpo::sm90

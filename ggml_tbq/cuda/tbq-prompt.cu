// SPDX-License-Identifier: MIT
// The kernels of tbq-prompt.cuh.  tbq.cmake has this file compiled for sm_90a, too, where the option asks for them.
#ifdef GGML_TBQ_CUDA_PROMPT
#include "tbq-prompt.cuh"

bool tbq_prompt_compiled() {
    int device, major, minor;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess || major != 9 ||
        minor != 0) {
        return false;
    }
    // what is compiled for another architecture is empty, and needs hardly any registers
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, tbq_prompt<128, TBQ_PROMPT_LAUNCH>) != cudaSuccess) {
        (void) cudaGetLastError();
        return false;
    }
    return attributes.numRegs > 100;
}

cudaError_t tbq_prompt_launch(const tbq_prompt_args & a, int d, cudaStream_t stream) {
    switch (d) {
        case 64: return tbq_prompt_run<64, TBQ_PROMPT_LAUNCH>(a, stream);
        case 128: return tbq_prompt_run<128, TBQ_PROMPT_LAUNCH>(a, stream);
        case 256: return tbq_prompt_run<256, TBQ_PROMPT_LAUNCH>(a, stream);
        default: return cudaErrorInvalidValue;
    }
}
#endif

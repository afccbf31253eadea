// SPDX-License-Identifier: MIT
// For the programs in this folder: an error of CUDA ends them with status 2.
#pragma once

#include <vector>
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                         \
    do {                                                                                    \
        const cudaError_t e = (call);                                                       \
        if (e != cudaSuccess) {                                                             \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e)); \
            std::exit(2);                                                                   \
        }                                                                                   \
    } while (0)

// Microseconds of a layer: the median of `repeats` launches of a graph of so many layers.  layer(i) launches layer i into
// the stream, which is one of this function's own meanwhile.
template <typename F> static double time_of_a_layer(cudaStream_t & stream, int layers, int repeats, F layer) {
    cudaGraph_t     graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < layers; i++) {
        layer(i);
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    std::vector<float> times;
    for (int r = 0; r < repeats + 2; r++) {
        CHECK(cudaEventRecord(from, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(to, stream));
        CHECK(cudaEventSynchronize(to));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        if (r >= 2) { // the first ones warm up
            times.push_back(ms);
        }
    }
    CHECK(cudaEventDestroy(from));
    CHECK(cudaEventDestroy(to));
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    stream = nullptr;
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1000 / layers;
}

// SPDX-License-Identifier: MIT
// Which block of a tensor a workgroup takes, and where it lies.

// A place in a tensor of four dimensions, the first of which counts blocks.
struct tbq_index4 {
    uint i0, i1, i2, i3;
};

// Block number i of a tensor of these sizes, row after row.
tbq_index4 tbq_index_of(uint i, uvec4 ne) {
    const uint row = i / ne.x, rest = row / ne.y;
    return tbq_index4(i % ne.x, row % ne.y, rest % ne.z, rest / ne.z);
}

uint tbq_offset(uvec3 strides, uint i1, uint i2, uint i3) {
    return i1 * strides.x + i2 * strides.y + i3 * strides.z;
}

// The number of a workgroup.  A device need not take more than 65535 of them in one dimension.
uint tbq_workgroup() {
    return gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x;
}

# SPDX-License-Identifier: MIT
# tbq_add_sources(target): compile the kernels into target, each file with the flags of its instruction set and no others.
# Which implementation runs is chosen at run time, so the rest of the target may be built for any machine.
set(TBQ_SOURCE_DIR "${CMAKE_CURRENT_LIST_DIR}")

function(tbq_add_sources target)
    set(cpu "${TBQ_SOURCE_DIR}/cpu")
    set(sources "${cpu}/tbq.c" "${cpu}/rows/ref.c" "${cpu}/attention/plan.c" "${cpu}/attention/ref.c"
        "${cpu}/search/search.c" "${cpu}/search/ref.c")
    set(have "")

    if(CMAKE_OSX_ARCHITECTURES MATCHES ";")
        set(arch "universal") # one set of flags for several architectures: the reference only
    elseif(CMAKE_OSX_ARCHITECTURES)
        set(arch "${CMAKE_OSX_ARCHITECTURES}")
    else()
        set(arch "${CMAKE_SYSTEM_PROCESSOR}")
    endif()
    string(TOLOWER "${arch}" arch)

    if(MSVC)
        set(avx2 "/arch:AVX2")
        set(avx512 "/arch:AVX512")
        set(vnni "/arch:AVX512 /D__AVX512VNNI__")
        set(exact "/fp:precise")
    else()
        set(avx2 "-mavx2 -mf16c -mfma")
        set(avx512 "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mfma")
        set(vnni "${avx512} -mavx512vnni")
        # The same bits everywhere: a product and a sum are rounded separately.  With errno, sqrtf would stay a call.
        set(exact "-O3 -ffp-contract=off -fno-fast-math -fno-math-errno")
    endif()

    set_source_files_properties(${sources} PROPERTIES COMPILE_FLAGS "${exact}")
    # The kernels of an instruction set: rows, attention and search
    macro(tbq_add_kernels name flags)
        set(files "${cpu}/rows/${name}.c" "${cpu}/attention/${name}.c" "${cpu}/search/${name}.c")
        set_source_files_properties(${files} PROPERTIES COMPILE_FLAGS "${exact} ${flags}")
        list(APPEND sources ${files})
    endmacro()
    if(arch MATCHES "^(x86_64|amd64)$")
        set(have TBQ_HAVE_X86)
        tbq_add_kernels(avx2 "${avx2}")
        tbq_add_kernels(avx512 "${avx512}")
        tbq_add_kernels(avx512vnni "${vnni}")
    elseif(arch MATCHES "^(aarch64|arm64)$" AND NOT MSVC)
        set(have TBQ_HAVE_NEON)
        tbq_add_kernels(neon "")
        tbq_add_kernels(neon-dotprod "-march=armv8.2-a+dotprod")
    endif()

    target_sources(${target} PRIVATE ${sources})
    target_include_directories(${target} PUBLIC "$<BUILD_INTERFACE:${TBQ_SOURCE_DIR}/include>")
    target_compile_definitions(${target} PRIVATE ${have})
    get_target_property(type ${target} TYPE)
    if(type STREQUAL "SHARED_LIBRARY")
        target_compile_definitions(${target} PUBLIC TBQ_SHARED PRIVATE TBQ_BUILD)
    endif()
    if(UNIX)
        target_link_libraries(${target} PRIVATE m)
    endif()
endfunction()

# tbq_add_ggml(target): the kernels, and what connects them with ggml's tables.  The patched ggml calls this for ggml-base,
# so that every backend and every variant of the CPU backend shares one copy.
function(tbq_add_ggml target)
    tbq_add_sources(${target})
    target_sources(${target} PRIVATE "${TBQ_SOURCE_DIR}/ggml/tbq-ggml.c")
    target_include_directories(${target} PUBLIC "$<BUILD_INTERFACE:${TBQ_SOURCE_DIR}/ggml>")
    # when the patched ggml has added its CUDA backend, which compiles cuda/*.cu
    cmake_language(DEFER CALL tbq_compile_for_sm_90a)
endfunction()

# tbq_compile_shaders(result, glslc): the files that tbq-vulkan.cpp includes, each with the words of a SPIR-V module, and the
# rules that make them in the folder `tbq` of the build.  GLSL has no literals of 64 bits and no hexadecimal floats, so
# the tables are made from tbq-tables.h with other spellings of the same values.
function(tbq_compile_shaders result glslc)
    set(folder "${TBQ_SOURCE_DIR}/vulkan")
    set(out "${CMAKE_CURRENT_BINARY_DIR}/tbq")
    set(hex8 "[0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F]")
    file(READ "${TBQ_SOURCE_DIR}/include/tbq-tables.h" tables)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${TBQ_SOURCE_DIR}/include/tbq-tables.h")
    string(REPLACE "#pragma once" "" tables "${tables}")
    string(REGEX REPLACE "0x(${hex8})(${hex8})ull" "uvec2(0x\\2u, 0x\\1u)" tables "${tables}")
    string(REGEX REPLACE "0x1p(-?[0-9]+)f" "uintBitsToFloat(uint(127 + \\1) << 23)" tables "${tables}")
    file(CONFIGURE OUTPUT "${out}/tbq-tables.glsl" CONTENT "${tables}" @ONLY)
    file(GLOB included CONFIGURE_DEPENDS "${folder}/*.glsl")
    set(modules)
    foreach(name quantize dequantize attention attention-merge rotate matvec)
        set(module "${out}/tbq-${name}.spv.inc")
        # The optimizer loses NoContraction where it unrolls a loop, and with it the CPU's bytes.
        set(optimize "$<IF:$<STREQUAL:${name},quantize>,-O0,-O>")
        add_custom_command(
            OUTPUT "${module}"
            COMMAND "${glslc}" ${optimize} --target-env=vulkan1.2 -mfmt=c -I "${out}" "${folder}/tbq-${name}.comp" -o "${module}"
            DEPENDS "${folder}/tbq-${name}.comp" ${included} "${out}/tbq-tables.glsl"
            COMMENT "Compiling tbq-${name}.comp"
            VERBATIM)
        list(APPEND modules "${module}")
    endforeach()
    set(${result} ${modules} PARENT_SCOPE)
endfunction()

# tbq_add_vulkan(target, glslc): what the patched ggml compiles into its Vulkan backend.
function(tbq_add_vulkan target glslc)
    tbq_compile_shaders(modules "${glslc}")
    target_sources(${target} PRIVATE "${TBQ_SOURCE_DIR}/vulkan/tbq-vulkan.cpp" ${modules})
    target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/tbq" "${CMAKE_CURRENT_SOURCE_DIR}")
endfunction()

# Attention of prompts needs instructions that only code for sm_90a has: that one file is compiled for it, too, where the
# backend is compiled for an H100 or H200 by nvcc 12.0 or later.  Other files, and other architectures, stay as they are.
function(tbq_compile_for_sm_90a)
    if(NOT TARGET ggml-cuda)
        return()
    endif()
    get_target_property(folder ggml-cuda SOURCE_DIR)
    get_directory_property(compiler DIRECTORY "${folder}" DEFINITION CMAKE_CUDA_COMPILER_ID)
    get_directory_property(version DIRECTORY "${folder}" DEFINITION CMAKE_CUDA_COMPILER_VERSION)
    get_target_property(architectures ggml-cuda CUDA_ARCHITECTURES)
    if(compiler STREQUAL "NVIDIA" AND version VERSION_GREATER_EQUAL 12.0 AND
            "${architectures}" MATCHES "(^|;)(90(-real|-virtual)?|all|all-major|native)(;|$)")
        target_compile_definitions(ggml-cuda PRIVATE GGML_TBQ_CUDA_PROMPT)
        set_source_files_properties("${TBQ_SOURCE_DIR}/cuda/tbq-prompt.cu" DIRECTORY "${folder}"
            PROPERTIES COMPILE_OPTIONS "--generate-code=arch=compute_90a,code=sm_90a")
    elseif("${architectures}" MATCHES "90a")
        target_compile_definitions(ggml-cuda PRIVATE GGML_TBQ_CUDA_PROMPT)
    endif()
endfunction()

# tbq_add_sources(target): compile the kernels into target, each file with the flags of its instruction set and
# no other.  Which of them runs is decided at run time, so the rest of the target may be built for anything.
set(TBQ_SOURCE_DIR "${CMAKE_CURRENT_LIST_DIR}")

function(tbq_add_sources target)
    set(cpu "${TBQ_SOURCE_DIR}/cpu")
    set(sources "${cpu}/tbq.c" "${cpu}/tbq-ref.c")
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
        set(avx2 "-mavx2 -mf16c")
        set(avx512 "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c")
        set(vnni "${avx512} -mavx512vnni")
        # the same bits everywhere: a product and a sum stay two roundings.  errno would keep sqrtf a call.
        set(exact "-O3 -ffp-contract=off -fno-fast-math -fno-math-errno")
    endif()

    if(arch MATCHES "^(x86_64|amd64)$")
        set(have TBQ_HAVE_X86)
        set_source_files_properties("${cpu}/tbq-avx2.c" PROPERTIES COMPILE_FLAGS "${exact} ${avx2}")
        set_source_files_properties("${cpu}/tbq-avx512.c" PROPERTIES COMPILE_FLAGS "${exact} ${avx512}")
        set_source_files_properties("${cpu}/tbq-avx512vnni.c" PROPERTIES COMPILE_FLAGS "${exact} ${vnni}")
        list(APPEND sources "${cpu}/tbq-avx2.c" "${cpu}/tbq-avx512.c" "${cpu}/tbq-avx512vnni.c")
    elseif(arch MATCHES "^(aarch64|arm64)$" AND NOT MSVC)
        set(have TBQ_HAVE_NEON)
        set_source_files_properties("${cpu}/tbq-neon.c" PROPERTIES COMPILE_FLAGS "${exact}")
        set_source_files_properties("${cpu}/tbq-neon-dotprod.c" PROPERTIES COMPILE_FLAGS "${exact} -march=armv8.2-a+dotprod")
        list(APPEND sources "${cpu}/tbq-neon.c" "${cpu}/tbq-neon-dotprod.c")
    endif()
    set_source_files_properties("${cpu}/tbq.c" "${cpu}/tbq-ref.c" PROPERTIES COMPILE_FLAGS "${exact}")

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

# tbq_add_ggml(target): the kernels and what connects them with ggml's tables.  Called by the patched ggml for
# ggml-base, so that every backend and every variant of the CPU backend shares one copy.
function(tbq_add_ggml target)
    tbq_add_sources(${target})
    target_sources(${target} PRIVATE "${TBQ_SOURCE_DIR}/ggml/tbq-ggml.c")
    target_include_directories(${target} PUBLIC "$<BUILD_INTERFACE:${TBQ_SOURCE_DIR}/ggml>")
endfunction()

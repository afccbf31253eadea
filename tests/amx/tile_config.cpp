// SPDX-License-Identifier: MIT
// What does ldtilecfg read, in llama.cpp's AMX code as the compiler at hand compiles it?
//
// On a processor with AMX the configuration is stored back and compared.  Without, the instruction traps, and the
// handler reads the 64 bytes at the address that it names: what the processor would have loaded.
//
// Exit status: 0 the configuration that the source spells out, 1 another one, 77 the compiler has no AMX.
#include "amx/mmq.cpp"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

// The test's own functions run where there is no AVX-512 either.
#pragma GCC push_options
#pragma GCC target("no-avx512f")

// palette, start row, 14 reserved bytes, 16 x bytes per row, 16 x rows
static bool expected(const uint8_t * config) {
    static const uint16_t colsb[16] = { 64, 64, 32, 32, 64, 64, 64, 64 };
    static const uint8_t  rows[16]  = { 8, 8, 16, 16, 16, 16, 16, 16 };
    uint8_t               want[64]  = { 1 };
    memcpy(want + 16, colsb, sizeof(colsb));
    memcpy(want + 48, rows, sizeof(rows));
    if (memcmp(config, want, sizeof(want)) == 0) {
        return true;
    }
    printf("ldtilecfg would read:");
    for (int i = 0; i < 64; i++) {
        printf(" %02x", config[i]);
    }
    printf("\n");
    return false;
}

// The address that "ldtilecfg m512" at code names: VEX, opcode 49, ModRM, SIB, displacement.
static const uint8_t * operand(const uint8_t * code, const greg_t * gregs) {
    static const int order[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || code[2] != 0x78 || code[3] != 0x49) {
        return nullptr;
    }
    const int       b = code[1] & 0x20 ? 0 : 8, x = code[1] & 0x40 ? 0 : 8;
    const int       mod = code[4] >> 6, rm = code[4] & 7;
    const uint8_t * next     = code + 5;
    uintptr_t       address  = 0;
    bool            absolute = false;
    if (rm == 4) {
        const int sib   = *next++;
        absolute        = (sib & 7) == 5 && mod == 0;
        address         = absolute ? 0 : (uintptr_t) gregs[order[(sib & 7) | b]];
        const int index = (sib >> 3 & 7) | x;
        address += index == 4 ? 0 : (uintptr_t) gregs[order[index]] << (sib >> 6);
    } else if (!(mod == 0 && rm == 5)) {
        address = (uintptr_t) gregs[order[rm | b]];
    }
    int32_t displacement = 0;
    if (mod == 1) {
        displacement = (int8_t) *next++;
    } else if (mod == 2 || absolute || (mod == 0 && rm == 5)) {
        memcpy(&displacement, next, 4);
        next += 4;
    }
    if (mod == 0 && rm == 5) {
        address = (uintptr_t) next; // relative to the next instruction
    }
    return (const uint8_t *) (address + (intptr_t) displacement);
}

static void trapped(int, siginfo_t *, void * context) {
    const greg_t *  gregs   = ((ucontext_t *) context)->uc_mcontext.gregs;
    const uint8_t * address = operand((const uint8_t *) gregs[REG_RIP], gregs);
    if (!address) {
        printf("trapped on something other than ldtilecfg\n");
    }
    const bool ok = address && expected(address);
    fflush(stdout);
    _exit(ok ? 0 : 1);
}

int main() {
    struct sigaction action = {};
    action.sa_sigaction     = trapped;
    action.sa_flags         = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
    sigaction(SIGSEGV, &action, nullptr); // with AMX, a bad configuration is a protection fault

    syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    ggml_tile_config_init();

    uint8_t stored[64] = {};
    asm volatile("sttilecfg %0" : "=m"(stored)::"memory");
    printf("loaded and stored back\n");
    return expected(stored) ? 0 : 1;
}

#pragma GCC pop_options

#else
int main() {
    return 77;
}
#endif

/* Hides AVX-512, AVX-VNNI and AMX from a program, so that it computes as on a plain laptop's processor.
 *
 *     cc -O2 -shared -fPIC -o avx2_only.so scripts/avx2_only.c
 *     LD_PRELOAD=./avx2_only.so ONEDNN_MAX_CPU_ISA=AVX2 python ...
 *
 * Linux lets the instruction CPUID fault on processors that can ("cpuid_fault" in /proc/cpuinfo); the handler answers
 * in its place. Libraries that have no setting for it, as onnxruntime and ncnn, are limited in this way too. The
 * variable is for onestepsr itself, which reads /proc/cpuinfo. glibc has asked before, for its memcpy and the like.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(number) (1u << (number))
enum { ARCH_SET_CPUID = 0x1012 };

static struct sigaction usual;

static void answer(int signal_number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    unsigned leaf = (unsigned)registers[REG_RAX], part = (unsigned)registers[REG_RCX], a, b, c, d;
    (void)info;
    if (code[0] != 0x0f || code[1] != 0xa2) { /* no CPUID, but a real fault: it comes again */
        sigaction(signal_number, &usual, NULL);
        return;
    }
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, part, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && part == 0) {
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 F to VL */
        c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* 4VNNIW to FP16, AMX */
    } else if (leaf == 7 && part == 1) {
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
        d = 0;                                       /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX10 */
    } else if (leaf == 0xd && part == 0) {
        a &= 7; /* state of x87, SSE and AVX */
    } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        a = b = c = d = 0; /* tiles, and the version of AVX10 */
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    static const char message[] = "avx2_only: this processor or kernel cannot let CPUID fault\n";
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (sigaction(SIGSEGV, &action, &usual) || syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        (void)!write(2, message, sizeof message - 1);
        _exit(2);
    }
}

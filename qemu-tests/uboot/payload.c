/*
 * A kernel for the boot script's tests: an arm64 Image that tells what it was started with and ends.
 *
 * It prints "booted NAME ARGUMENTS" on QEMU's serial port, where NAME is what the build was given and ARGUMENTS is the device tree's
 * /chosen/bootargs, and turns the machine off. On a trial it resets the machine instead, as a kernel that panics does.
 */
#include <stdint.h>

#define UART (*(volatile uint32_t *)0x09000000)
#define PSCI_SYSTEM_OFF 0x84000008u
#define PSCI_SYSTEM_RESET 0x84000009u

/* Documentation/arch/arm64/booting.rst: 64 bytes, then the code. */
__asm__(".section .head, \"ax\"\n"
        "b start\n"
        ".word 0\n"
        ".quad 0\n"       /* text_offset */
        ".quad 0x100000\n" /* image_size */
        ".quad 0xa\n"     /* little endian, 4K pages, anywhere in memory */
        ".quad 0, 0, 0\n"
        ".ascii \"ARM\\x64\"\n"
        ".word 0\n"
        "start:\n"
        "adr x1, stack_top\n"
        "mov sp, x1\n"
        "b run\n"
        ".balign 16\n"
        ".space 4096\n"
        "stack_top:\n");

static void print(const char *text)
{
    for (; *text; text++)
        UART = (uint8_t)*text;
}

static uint32_t big(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static int contains(const char *text, const char *word)
{
    for (; *text; text++) {
        const char *a = text, *b = word;
        while (*b && *a == *b)
            a++, b++;
        if (!*b)
            return 1;
    }
    return 0;
}

/* The property "bootargs"; only /chosen has one. */
static const char *arguments(const uint8_t *tree)
{
    const uint8_t *at = tree + big(tree + 8);
    const char *names = (const char *)tree + big(tree + 12);
    for (;;) {
        uint32_t token = big(at);
        at += 4;
        if (token == 1) { /* a node begins: its name, padded */
            while (*at)
                at++;
            at = (const uint8_t *)(((uintptr_t)at + 4) & ~(uintptr_t)3);
        } else if (token == 3) { /* a property: length, name, value, padded */
            uint32_t length = big(at);
            if (same(names + big(at + 4), "bootargs"))
                return (const char *)at + 8;
            at += 8 + ((length + 3) & ~3u);
        } else if (token == 9) {
            return "";
        }
    }
}

static void psci(uint64_t function)
{
    register uint64_t x0 __asm__("x0") = function;
    __asm__ volatile("hvc #0" : "+r"(x0) : : "memory");
}

void run(const uint8_t *tree)
{
    const char *bootargs = arguments(tree);
    print("booted " NAME " ");
    print(bootargs);
    print(".\n");
    psci(contains(bootargs, "offshoot.trial=") && contains(bootargs, "dies") ? PSCI_SYSTEM_RESET : PSCI_SYSTEM_OFF);
    for (;;)
        ;
}
